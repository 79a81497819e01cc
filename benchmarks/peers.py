"""What we are measured against: plain PyTorch, and other packages where they are installed.

A peer is a table of functions with the signatures of benchmarks/plain.py, made when it is first used: nothing is
imported before. `why_not` says why a peer takes no part in a case. `compiled` is plain
PyTorch after torch.compile.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import plain
from benchmarks.registry import ENTRIES, TEMPERATURE, Case, Functions, Problem

__all__ = ["COMPILED", "PEERS", "of", "peer", "versions", "why_not"]

COMPILED = "compiled"
_PAIRS_AT_ONCE = 1 << 26  # of a block of chunked cdist
_MATRIX_BYTES = {"cpu": 4e9, "cuda": 20e9}  # the largest N x N tensor that a peer may ask for


# ---- plain PyTorch


def _plain() -> Functions:
    return {
        "knn_graph": lambda x, k: plain.nearest(x.transpose(1, 2), k),
        "edge_conv": plain.edge_conv,
        "edge_conv2": plain.edge_conv,
        "conv_bn_act_pool": plain.conv_bn_act_pool,
        "gather_max": lambda x, idx: plain.gathered(x, idx).max(2).values,
        "neighbor_sum": lambda x, idx: plain.gathered(x, idx).sum(2),
        "nt_xent": plain.nt_xent,
        "info_nce": plain.info_nce,
        "sup_con": plain.sup_con,
    }


def _algebra() -> Functions:
    return {**_plain(), "edge_conv": plain.edge_conv_by_nodes, "nt_xent": plain.nt_xent_by_rows}


def _cdist() -> Functions:
    def knn(query: Tensor, points: Tensor, k: int) -> Tensor:
        rows = max(1, _PAIRS_AT_ONCE // (len(points) * points.shape[1]))
        mode = (
            "donot_use_mm_for_euclid_dist" if points.shape[2] <= 8 else "use_mm_for_euclid_dist_if_necessary"
        )
        parts = [
            torch.cdist(part, points, compute_mode=mode).topk(k, dim=2, largest=False).indices
            for part in query.split(rows, dim=1)
        ]
        return torch.cat(parts, 1)

    return {"knn_graph": lambda x, k: knn(x, x, k), "knn": knn}


def _embedding_bag() -> Functions:
    """PyTorch's own gather with a reduction: nothing with an edge axis and a channel axis there either."""

    def bag(mode: str) -> Callable[..., Tensor]:
        def reduce(x: Tensor, idx: Tensor) -> Tensor:
            b, n, c = x.shape
            first = torch.arange(b, device=x.device).view(b, 1, 1) * n
            rows = (idx + first).view(-1, idx.shape[2])
            return F.embedding_bag(rows, x.reshape(-1, c), mode=mode).view(b, idx.shape[1], c)

        return reduce

    return {"gather_max": bag("max"), "neighbor_sum": bag("sum")}


# ---- graphs


def _each_cloud(search: Callable[[Tensor, Tensor, int], Tensor]) -> Functions:
    """From a search in one cloud on the CPU."""

    def knn(query: Tensor, points: Tensor, k: int) -> Tensor:
        return torch.stack([search(q, p, k) for q, p in zip(query, points, strict=True)])

    return {"knn_graph": lambda x, k: knn(x, x, k), "knn": knn}


def _scipy() -> Functions:
    from scipy.spatial import cKDTree

    def search(query: Tensor, points: Tensor, k: int) -> Tensor:
        tree = cKDTree(points.numpy())
        found = tree.query(query.numpy(), k, workers=torch.get_num_threads())[1]
        return torch.from_numpy(found).view(len(query), k)

    return _each_cloud(search)


def _faiss() -> Functions:
    import faiss

    def search(query: Tensor, points: Tensor, k: int) -> Tensor:
        faiss.omp_set_num_threads(torch.get_num_threads())
        return torch.from_numpy(faiss.knn(query.numpy(), points.numpy(), k)[1])

    return _each_cloud(search)


def _pykeops() -> Functions:
    from pykeops.torch import LazyTensor

    def knn(query: Tensor, points: Tensor, k: int) -> Tensor:
        difference = LazyTensor(query[:, :, None].contiguous()) - LazyTensor(points[:, None].contiguous())
        return (difference**2).sum(-1).argKmin(k, dim=2)

    return {"knn_graph": lambda x, k: knn(x, x, k), "knn": knn}


def _torch_cluster() -> Functions:
    from torch_cluster import knn as search

    def knn(query: Tensor, points: Tensor, k: int) -> Tensor:
        (b, m, c), n = query.shape, points.shape[1]
        clouds = torch.arange(b, device=query.device)
        pairs = search(
            points.reshape(-1, c),
            query.reshape(-1, c),
            k,
            clouds.repeat_interleave(n),
            clouds.repeat_interleave(m),
        )
        return pairs[1].view(b, m, k) - n * clouds.view(b, 1, 1)

    return {"knn_graph": lambda x, k: knn(x, x, k), "knn": knn}


def _pytorch3d() -> Functions:
    from pytorch3d.ops import knn_points

    def knn(query: Tensor, points: Tensor, k: int) -> Tensor:
        return knn_points(query, points, K=k).idx

    return {"knn_graph": lambda x, k: knn(x, x, k), "knn": knn}


def _flashlib() -> Functions:
    from flashlib import flash_knn

    def knn(query: Tensor, points: Tensor, k: int) -> Tensor:
        return flash_knn(query, points, k, return_distances=False)

    return {"knn_graph": lambda x, k: knn(x, x, k), "knn": knn}


# ---- layers


def _pyg() -> Functions:
    from torch_geometric.nn import EdgeConv

    def edge_conv(x: Tensor, idx: Tensor, *layers: Tensor) -> Tensor:
        b, n, k = idx.shape
        c = x.shape[2]
        first = torch.arange(b, device=x.device).view(b, 1, 1) * n
        centre = torch.arange(b * n, device=x.device).repeat_interleave(k)

        class Layers(torch.nn.Module):
            def forward(self, h: Tensor) -> Tensor:  # [x_i, x_j - x_i] of every edge
                for place in range(0, len(layers), 3):
                    weight, gamma, beta = layers[place : place + 3]
                    if place == 0:
                        weight = torch.cat([weight[:, c:], weight[:, :c]], 1)
                    h = F.batch_norm(F.linear(h, weight), None, None, gamma, beta, training=True)
                    h = F.leaky_relu(h, 0.2)
                return h

        y = EdgeConv(Layers(), aggr="max")(x.reshape(-1, c), torch.stack([(idx + first).view(-1), centre]))
        return y.view(b, n, -1)

    return {**_plain(), "edge_conv": edge_conv, "edge_conv2": edge_conv}


# ---- losses


def _lightly_class() -> type[torch.nn.Module]:
    """lightly's NTXentLoss from its two files: the package around them asks for torchvision, the loss does not."""
    folder = Path(importlib.util.find_spec("lightly").submodule_search_locations[0])
    loaded = {}
    stand_ins = {"torchvision": mock.MagicMock(), "lightly.models": mock.MagicMock()}
    with mock.patch.dict(sys.modules, stand_ins):
        for name in ("lightly.models.modules.memory_bank", "lightly.loss.ntx_ent_loss"):
            spec = importlib.util.spec_from_file_location(
                name, folder.parent / (name.replace(".", "/") + ".py")
            )
            loaded[name] = sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(loaded[name])
    return loaded["lightly.loss.ntx_ent_loss"].NTXentLoss


def _lightly() -> Functions:
    return {"nt_xent": _lightly_class()(temperature=TEMPERATURE)}


def _pytorch_metric_learning() -> Functions:
    from pytorch_metric_learning.losses import NTXentLoss, SupConLoss

    pairs, labelled = NTXentLoss(temperature=TEMPERATURE), SupConLoss(temperature=TEMPERATURE)

    def nt_xent(z1: Tensor, z2: Tensor) -> Tensor:
        return pairs(torch.cat([z1, z2]), torch.arange(len(z1), device=z1.device).repeat(2))

    return {"nt_xent": nt_xent, "sup_con": labelled}


def _both_directions(one: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Functions:
    """info_nce from a cross entropy of (rows, columns, the column that is right)."""

    def info_nce(z1: Tensor, z2: Tensor) -> Tensor:
        z1, z2 = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
        target = torch.arange(len(z1), device=z1.device)
        return (one(z1 / TEMPERATURE, z2, target) + one(z2 / TEMPERATURE, z1, target)) / 2

    return {"info_nce": info_nce}


def _open_clip() -> Functions:
    from open_clip.loss import ClipLoss

    loss = ClipLoss()

    def info_nce(z1: Tensor, z2: Tensor) -> Tensor:
        return loss(F.normalize(z1, dim=1), F.normalize(z2, dim=1), 1 / TEMPERATURE)

    return {"info_nce": info_nce}


def _inf_cl() -> Functions:
    from inf_cl import cal_flash_loss

    return _both_directions(
        lambda rows, columns, _: cal_flash_loss(rows, columns, head_dim=rows.shape[1]).mean()
    )


def _cut_cross_entropy() -> Functions:
    from cut_cross_entropy import linear_cross_entropy

    # filter_eps=None drops no gradient: the others compute all of it, too.
    return _both_directions(lambda *tensors: linear_cross_entropy(*tensors, filter_eps=None))


def _liger_kernel() -> Functions:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return _both_directions(lambda rows, columns, target: loss(columns, rows, target))


# ---- the table


class _Peer(NamedTuple):
    what: str
    module: str | None  # what it imports; None: torch alone
    devices: tuple[str, ...]
    functions: Callable[[], Functions]
    ops: tuple[str, ...]


_GRAPHS = ("knn_graph", "knn")
_BOTH, _CPU, _CUDA = ("cpu", "cuda"), ("cpu",), ("cuda",)
_LAYERS = ("edge_conv", "dgcnn_backbone", "dgcnn")
_EVERY = tuple(op for op in ENTRIES if op != "knn")
PEERS: dict[str, _Peer] = {
    "plain": _Peer("plain PyTorch, DGCNN's formulas", None, _BOTH, _plain, _EVERY),
    COMPILED: _Peer("torch.compile of plain PyTorch", None, _BOTH, _plain, _EVERY),
    "algebra": _Peer("the same algebra in plain PyTorch", None, _BOTH, _algebra, (*_LAYERS, "nt_xent")),
    "cdist": _Peer("chunked torch.cdist and topk", None, _BOTH, _cdist, _GRAPHS),
    "embedding_bag": _Peer("torch's embedding_bag", None, _BOTH, _embedding_bag, ("gather_max", "neighbor_sum")),
    "scipy": _Peer("cKDTree with as many workers as torch has threads", "scipy", _CPU, _scipy, _GRAPHS),
    "faiss": _Peer("faiss.knn, cloud by cloud", "faiss", _CPU, _faiss, _GRAPHS),
    "pykeops": _Peer("LazyTensor.argKmin", "pykeops", _BOTH, _pykeops, _GRAPHS),
    "torch_cluster": _Peer("torch_cluster.knn", "torch_cluster", _BOTH, _torch_cluster, _GRAPHS),
    "pytorch3d": _Peer("pytorch3d.ops.knn_points", "pytorch3d", _CUDA, _pytorch3d, _GRAPHS),
    "flashlib": _Peer("flashlib.flash_knn", "flashlib", _CUDA, _flashlib, _GRAPHS),
    "pyg": _Peer("torch_geometric.nn.EdgeConv", "torch_geometric", _BOTH, _pyg, (*_LAYERS, "edge_conv2")),
    "lightly": _Peer("lightly's NTXentLoss", "lightly", _BOTH, _lightly, ("nt_xent",)),
    "pytorch_metric_learning": _Peer(
        "its NTXentLoss and SupConLoss", "pytorch_metric_learning", _BOTH, _pytorch_metric_learning,
        ("nt_xent", "sup_con"),
    ),
    "open_clip": _Peer("open_clip's ClipLoss", "open_clip", _BOTH, _open_clip, ("info_nce",)),
    "inf_cl": _Peer("Inf-CL, both directions", "inf_cl", _CUDA, _inf_cl, ("info_nce",)),
    "cut_cross_entropy": _Peer(
        "cut-cross-entropy, both directions", "cut_cross_entropy", _CUDA, _cut_cross_entropy, ("info_nce",)
    ),
    "liger_kernel": _Peer("Liger, both directions", "liger_kernel", _CUDA, _liger_kernel, ("info_nce",)),
}  # fmt: skip


def of(op: str) -> list[str]:
    """Who has this operator."""
    return [name for name, peer in PEERS.items() if op in peer.ops]


def versions() -> dict[str, str | None]:
    """Of the packages that peers import; None where it is not installed."""
    packages = metadata.packages_distributions()
    modules = [peer.module for peer in PEERS.values() if peer.module]
    return {
        module: metadata.version(packages[module][0]) if module in packages else None for module in modules
    }


def why_not(name: str, case: Case, device: str) -> str | None:
    """Why a peer takes no part in a case of an operator that it has; None if it does."""
    return _absent(name, device) or _unsuited(name, case, device)


def peer(name: str, problem: Problem) -> Callable[..., Tensor]:
    """A peer's call on a problem."""
    apply = ENTRIES[problem.case.op].apply
    if name == COMPILED:
        return _compiled(apply(_plain(), problem))
    return apply(PEERS[name].functions(), problem)


def _compiled(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.compile for the shapes of one case."""
    torch._dynamo.reset()
    return torch.compile(f, dynamic=False)


def _absent(name: str, device: str) -> str | None:
    """Why a peer cannot take part on this kind of device; None if it can."""
    module, devices = PEERS[name].module, PEERS[name].devices
    if device not in devices:
        return f"runs on {devices[0]} alone"
    if module is not None and importlib.util.find_spec(module) is None:
        return f"{module} is not installed (benchmarks/requirements.txt)"
    return None


def _unsuited(name: str, case: Case, device: str) -> str | None:
    """Why a peer cannot do a case of an operator that it has; None if it can."""
    s, most = case.sizes, _MATRIX_BYTES[device]
    if case.op in _GRAPHS:
        pairs = s["B"] * s.get("M", s["N"]) * s["N"]
        if name in ("plain", COMPILED) and 4 * pairs > most:
            return f"needs {4 * pairs / 1e9:.0f} GB for N x N distances"
        if name == "scipy" and s["C"] > 16:
            return "a k-d tree is no search in more than 16 dimensions"
        if device == "cpu" and pairs > 2e9 and name in ("cdist", "faiss", "pykeops"):
            return f"would compare {pairs / 1e9:.0f}e9 pairs one by one: half a minute a call"
        if name == "pykeops" and s["C"] > 128:
            return "compiles for small numbers of channels"
        if name == "torch_cluster" and s["k"] > 100:
            return "finds at most 100"
    if "D" in s and name not in ("algebra", "inf_cl", "cut_cross_entropy", "liger_kernel"):
        rows = s["N"] * (2 if case.op == "nt_xent" else 1)
        # Its pairs are lists of indices: 2.2 GB for 256 pairs of views.
        logits = 4 * rows * rows * (2000 if name == "pytorch_metric_learning" and case.op == "nt_xent" else 1)
        if logits > most:
            return f"needs {logits / 1e9:.0f} GB for its logits"
    return None
