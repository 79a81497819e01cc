"""Steps on batches whose activations do not fit: embeddings first, then gradients a part at a time.

A contrastive loss needs the embeddings of the whole batch, but of activations, which take the memory, only those
between one embedding and its gradient. So (GradCache, arXiv 2101.06983): embed the batch part by part, keeping nothing
else; differentiate the loss by the embeddings; then embed each part again, with its gradient at hand, and go backward
at once. The activations of one part exist at a time, for one more forward pass.

Batch norm sees parts: the step equals, exactly, one on the whole batch whose batch norms take each part's statistics.
Running statistics are updated once for each part, and both passes draw the same random numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from crosspoint.models import CrossPoint, CrossPointOutput

__all__ = ["cached_backward"]


def cached_backward(
    model: CrossPoint,
    view1: Tensor,
    view2: Tensor,
    images: Tensor,
    *,
    parts: int,
    autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> CrossPointOutput:
    """The losses that `model(view1, view2, images)` has; their gradients are added to the parameters' here.

    parts: how many the batch is cut into, as evenly as it goes; the same on every rank where ranks share statistics.
    autocast: makes the context in which the model runs.
    """
    batch = list(zip(*(tensor.tensor_split(parts) for tensor in (view1, view2, images)), strict=True))
    former = [buffer.clone() for buffer in model.buffers()]
    states, found = [], []
    with torch.no_grad(), autocast():
        for part in batch:
            states.append(_random_state(view1.device))
            found.append(model.project(*part))
    after = _random_state(view1.device)
    for buffer, value in zip(model.buffers(), former, strict=True):
        buffer.copy_(value)

    embeddings = [torch.cat(z).requires_grad_() for z in zip(*found, strict=True)]
    with autocast():
        output = model.losses(*embeddings)
    output.loss.backward()
    gradients = zip(*(z.grad.tensor_split(parts) for z in embeddings), strict=True)
    for part, state, grads in zip(batch, states, gradients, strict=True):
        _set_random_state(view1.device, state)
        with autocast():
            again = model.project(*part)
        torch.autograd.backward(again, grads)
    _set_random_state(view1.device, after)
    return CrossPointOutput(*(None if value is None else value.detach() for value in output))


def _random_state(device: torch.device) -> list[Tensor]:
    """Of the global generators that a model on this device draws from."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _set_random_state(device: torch.device, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
