"""Image encoders by name: the ResNets here, and what torchvision, timm and transformers have where installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor, nn

from crosspoint.models.registry import IMAGE_ENCODERS, create

__all__ = ["ImageFeatures", "check_image_encoder", "create_image_encoder"]


class ImageFeatures(nn.Module):
    """Another library's network as an image encoder: (B, 3, H, W) -> (B, feature_dim)."""

    def __init__(self, body: nn.Module, feature_dim: int, pool: Callable[[object], Tensor] | None = None):
        super().__init__()
        self.body = body
        self.feature_dim = feature_dim
        self.pool = pool

    def forward(self, images: Tensor) -> Tensor:
        output = self.body(images)
        return output if self.pool is None else self.pool(output)


def check_image_encoder(name: object) -> None:
    """Raise ValueError unless `name` is one of the ResNets here or LIBRARY:MODEL."""
    library, colon, model = name.partition(":") if isinstance(name, str) else ("", "", "")
    if name not in IMAGE_ENCODERS and not (colon and model and library in _LIBRARIES):
        raise ValueError(
            f"image_encoder must be one of {', '.join(IMAGE_ENCODERS)}, or a library's model, such as "
            f"torchvision:convnext_tiny, timm:vit_small_patch16_224 or transformers:FOLDER; got {name!r}"
        )


def create_image_encoder(
    name: str, *, weights: str = "random", projection_dim: int | None = 256
) -> nn.Module:
    """An image encoder with a `feature_dim`.

    Args:
        name: "resnet18", "resnet50" (which have a `projection` of width `projection_dim`), or one that another library
            has: "torchvision:NAME", "timm:NAME", "transformers:NAME", of which its classifier is taken away.
        weights: "random", from torch's global generator, or "pretrained": those that torchvision (also for the ResNets
            here), timm or transformers has for the name; they download what is not in their cache.

    Raises ImportError where the library is not installed, ValueError for a model that it does not have.
    """
    check_image_encoder(name)
    if weights not in ("random", "pretrained"):
        raise ValueError(f"image weights must be 'random' or 'pretrained', got {weights!r}")
    library, _, model = name.partition(":")
    if model:
        return _LIBRARIES[library](model, weights == "pretrained")
    encoder = create(name, projection_dim=projection_dim)
    if weights == "pretrained":
        models = _import("torchvision.models", name)
        state = models.get_model_weights(name).DEFAULT.get_state_dict(progress=False, check_hash=True)
        own = {key: value for key, value in encoder.state_dict().items() if key.startswith("projection.")}
        encoder.load_state_dict(
            {**own, **{key: value for key, value in state.items() if not key.startswith("fc.")}}
        )
    return encoder


def _import(module: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:  # the latter where it was built for another torch
        package = module.partition(".")[0]
        raise ImportError(
            f"image encoder {name!r} needs {package}, which could not be imported ({error}): pip install "
            f"{package}, in the version that fits torch {torch.__version__}"
        ) from error


def _torchvision(name: str, pretrained: bool) -> ImageFeatures:
    models = _import("torchvision.models", f"torchvision:{name}")
    if name not in models.list_models(module=models):
        raise ValueError(
            f"torchvision has no classification model {name!r}; torchvision.models.list_models() lists them"
        )
    body = models.get_model(name, weights="DEFAULT" if pretrained else None)
    place, last = [item for item in body.named_modules() if isinstance(item[1], nn.Linear)][-1]
    parent, _, child = place.rpartition(".")
    setattr(body.get_submodule(parent), child, nn.Identity())
    return ImageFeatures(body, last.in_features)


def _timm(name: str, pretrained: bool) -> ImageFeatures:
    timm = _import("timm", f"timm:{name}")
    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}; timm.list_models() lists them")
    body = timm.create_model(name, pretrained=pretrained, num_classes=0)
    # The width after a head's last layer but one, which networks such as MobileNetV3 keep without a classifier.
    return ImageFeatures(body, getattr(body, "head_hidden_size", body.num_features))


def _transformers(name: str, pretrained: bool) -> ImageFeatures:
    transformers = _import("transformers", f"transformers:{name}")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        auto = transformers.AutoModel
        body = auto.from_pretrained(name) if pretrained else auto.from_config(config)
    except OSError as error:
        raise ValueError(f"transformers could not load {name!r}: {error}") from error
    widths = [getattr(config, "hidden_size", None), *(getattr(config, "hidden_sizes", None) or [])[-1:]]
    width = next((each for each in widths if isinstance(each, int)), None)
    if width is None:
        raise ValueError(f"{name!r} is no image encoder that is known here: its config has no hidden_size")
    return ImageFeatures(body, width, _pooled)


def _pooled(output: object) -> Tensor:
    """The pooled feature of a transformers output, else the mean over its tokens."""
    pooled = getattr(output, "pooler_output", None)
    return output.last_hidden_state.mean(1) if pooled is None else pooled.flatten(1)


_LIBRARIES = {"torchvision": _torchvision, "timm": _timm, "transformers": _transformers}
