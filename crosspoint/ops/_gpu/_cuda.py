"""The leaves in CUDA C++: private operators crosspoint::_OP_LEAF that fill the tensors they are given."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from crosspoint.ops import _library

__all__ = ["LEAVES", "Leaves", "has_leaves", "leaves_for"]

_TILES = "Tensor nodes, Tensor idx, Tensor gain, Tensor shift"
_CONTRAST_PASSES = (
    "normalise(Tensor z, int product, Tensor(a!) rows, Tensor(b!) scale) -> ()",
    "row_sums(Tensor rows, Tensor scale, Tensor temperature, Tensor? labels, Tensor? target, int product, "
    "int first_row, bool within_views, Tensor(a!) sums) -> ()",
    "gradient(Tensor rows, Tensor scale, Tensor temperature, Tensor exponents, Tensor? labels, Tensor? target, "
    "int product, int first_row, bool within_views, Tensor(a!) partial, Tensor(b!) moments) -> ()",
)
# operator -> schemas of its leaves, without the prefix
LEAVES = {
    "conv_bn_act_pool": (
        "sums(Tensor x, Tensor? lengths, Tensor(a!) out) -> ()",
        "gram(Tensor x, Tensor? lengths, Tensor centre, int product, Tensor(a!) gram, Tensor(b!) first) -> ()",
        "pool(Tensor x, Tensor? lengths, Tensor centre, Tensor weight, Tensor gamma, Tensor scale, Tensor shift, "
        "int product, Tensor(a!) values, Tensor(b!) places, Tensor(c!)? mask) -> ()",
        "finish(Tensor values, Tensor places, Tensor? lengths, int n, Tensor gamma, Tensor scale, Tensor shift, "
        "Tensor mean, Tensor rstd, float negative_slope, Tensor(a!) out, Tensor(b!)? winner, Tensor(c!)? slopes) -> ()",
        "terms(Tensor grad, Tensor slopes, Tensor? lengths, int n, Tensor count, Tensor gamma, Tensor scale, "
        "Tensor shift, Tensor mean, Tensor rstd, float negative_slope, bool training, Tensor(a!) spread, "
        "Tensor(b!) affine) -> ()",
        "x_gradient(Tensor mask, Tensor spread, Tensor winner, Tensor weight, Tensor x, Tensor? lengths, "
        "Tensor centre, Tensor? square, int product, Tensor(a!) out) -> ()",
        "weight_gradient(Tensor mask, Tensor spread, Tensor winner, Tensor x, Tensor? lengths, Tensor centre, "
        "int product, Tensor(a!) out) -> ()",
    ),
    "edge_conv": (
        "degrees(Tensor idx, Tensor(a!) degrees) -> ()",
        "centre(Tensor x, Tensor degrees, Tensor(a!) centre) -> ()",
        "subtract(Tensor x, Tensor centre, Tensor degrees, Tensor(a!) out) -> ()",
        "neighbor_sum(Tensor x, Tensor idx, Tensor(a!) out) -> ()",
        "moments(Tensor x, Tensor sums, Tensor degrees, Tensor(a!) gram, Tensor(b!) first) -> ()",
        "sum_parts(Tensor gram, Tensor first, Tensor(a!) moments) -> ()",
        "norm(Tensor? moments, Tensor weight, Tensor? gamma, Tensor? beta, bool signs, Tensor(a!)? running_mean, "
        "Tensor(b!)? running_var, Tensor centre, Tensor edges, float momentum, float eps, Tensor(c!) halves, "
        "Tensor(d!) offset, Tensor(e!) rstd, Tensor(f!) scale, Tensor(g!) shift) -> ()",
        "affine(Tensor? gamma, Tensor? beta, bool signs, Tensor rstd, Tensor offset, Tensor(a!) scale, "
        "Tensor(b!) shift) -> ()",
        "norm_gradient(Tensor partial, Tensor? gamma, bool signs, Tensor offset, Tensor rstd, Tensor edges, "
        "Tensor(a!) grad_gamma, Tensor(b!) grad_beta, Tensor(c!) sum, Tensor(d!) mean_term, "
        "Tensor(e!) slope_term) -> ()",
        "input_terms(Tensor weight, Tensor? gamma, bool signs, Tensor rstd, Tensor? mean_term, Tensor? slope_term, "
        "Tensor(a!) halves, Tensor(b!)? constant, Tensor(c!)? square) -> ()",
        "weight_gradient(Tensor sparse, Tensor weight, Tensor? gamma, bool signs, Tensor rstd, Tensor centre, "
        "Tensor edges, Tensor? mean_term, Tensor? slope_term, Tensor? moments, Tensor(a!) sum, "
        "Tensor(b!) grad) -> ()",
        "gather_max(Tensor nodes, Tensor idx, Tensor? gamma, Tensor scale, Tensor shift, float negative_slope, "
        "Tensor(a!) out, Tensor(b!)? winner, Tensor(c!)? slot) -> ()",
        "winner_gradient(Tensor grad, Tensor winner, Tensor degrees, Tensor scale, Tensor shift, float negative_slope, "
        "Tensor(a!) routed, Tensor(b!) sums) -> ()",
        "reverse_graph(Tensor idx, Tensor(a!) start, Tensor(b!) edges) -> ()",
        "route(Tensor slot, Tensor start, Tensor edges, int k, Tensor(a!) routed) -> ()",
        "dense_gradient(Tensor x, Tensor sums, Tensor degrees, Tensor start, Tensor edges, int k, Tensor constant, "
        "Tensor(a!) dense, Tensor(b!) grad_x) -> ()",
    ),
    "nt_xent": (
        *_CONTRAST_PASSES,
        "positives(Tensor left, Tensor right, Tensor? partner, Tensor(a!) cosine) -> ()",
        "finish(Tensor partial, Tensor z, Tensor other, Tensor? partner, Tensor pull, Tensor factors, int first_row, "
        "Tensor(a!) dz) -> ()",
    ),
    "nt_xent_wgmma": _CONTRAST_PASSES,
    "edge_conv2": (
        f"edge_max({_TILES}, Tensor weight, Tensor? gamma, float negative_slope, int product, Tensor(a!) winner, "
        "Tensor(b!)? slot, Tensor(c!) sums) -> ()",
        "activate(Tensor winner, Tensor degrees, Tensor scale, Tensor shift, float negative_slope, "
        "Tensor(a!) out) -> ()",
        f"own_gradient({_TILES}, Tensor g, Tensor slot, float negative_slope, int product, Tensor rows, Tensor q, "
        "Tensor(a!) routed, Tensor(b!) sums) -> ()",
        f"neighbour_gradient({_TILES}, Tensor g, Tensor slot, float negative_slope, int product, Tensor rows, "
        "Tensor q, Tensor start, Tensor edges, Tensor(a!) runs) -> ()",
        "add_runs(Tensor runs, Tensor start, int k, Tensor(a!) routed) -> ()",
        f"edge_products({_TILES}, Tensor g, Tensor slot, float negative_slope, int product, Tensor(a!) out) -> ()",
        "pivot(Tensor? gamma, Tensor? beta, Tensor rstd, Tensor offset, float negative_slope, Tensor(a!) pivot) -> ()",
        "sums_norm(Tensor? partial, Tensor weight, Tensor? gamma, Tensor? beta, bool signs, Tensor(a!)? running_mean, "
        "Tensor(b!)? running_var, Tensor centre, Tensor edges, float momentum, float eps, Tensor(c!) offset, "
        "Tensor(d!) rstd, Tensor(e!) scale, Tensor(f!) shift) -> ()",
    ),
}
# operator -> the one whose leaves it calls beside its own
BORROWS = {"edge_conv2": "edge_conv", "nt_xent_wgmma": "nt_xent"}

for _op, _schemas in LEAVES.items():
    for _schema in _schemas:
        _library.define_leaf(f"_{_op}_{_schema}")


def has_leaves(op: str) -> bool:
    """Whether the compiled library has CUDA kernels for all of them, those that it borrows included."""
    if op not in LEAVES or not all(_library.has_kernel(f"_{op}_{name}", "cuda") for name in _names(op)):
        return False
    return op not in BORROWS or has_leaves(BORROWS[op])


def _names(op: str) -> list[str]:
    return [schema.partition("(")[0] for schema in LEAVES[op]]


class Leaves:
    """`Leaves(op).NAME` is operator crosspoint::_OP_NAME, or that of the operator from which it borrows."""

    def __init__(self, op: str) -> None:
        self._op = op

    def __getattr__(self, name: str):
        owner = self._op if name in _names(self._op) else BORROWS[self._op]
        return getattr(torch.ops.crosspoint, f"_{owner}_{name}").default


def leaves_for(op: str, z: Tensor) -> Leaves:
    """Those of `op`; of nt_xent, those of Hopper's own instructions where CROSSPOINT_WGMMA=1 asks for them and they can
    take z: they are not chosen otherwise, for no GPU has measured them."""
    if op == "nt_xent" and os.environ.get("CROSSPOINT_WGMMA") == "1" and has_leaves("nt_xent_wgmma"):
        from crosspoint.ops._gpu.nt_xent import fits_wgmma

        if fits_wgmma(z):
            return Leaves("nt_xent_wgmma")
    return Leaves(op)
