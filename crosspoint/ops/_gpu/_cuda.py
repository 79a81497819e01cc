"""The leaves in CUDA C++: private operators crosspoint::_OP_LEAF that fill the tensors they are given."""

from __future__ import annotations

import torch

from crosspoint.ops import _library

__all__ = ["LEAVES", "Leaves", "has_leaves"]

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
        "normalise(Tensor z, int product, Tensor(a!) rows, Tensor(b!) scale) -> ()",
        "positives(Tensor left, Tensor right, Tensor? partner, Tensor(a!) cosine) -> ()",
        "row_sums(Tensor rows, Tensor scale, Tensor temperature, Tensor? labels, Tensor? target, int product, "
        "int first_row, bool within_views, Tensor(a!) sums) -> ()",
        "gradient(Tensor rows, Tensor scale, Tensor temperature, Tensor exponents, Tensor? labels, Tensor? target, "
        "int product, int first_row, bool within_views, Tensor(a!) partial, Tensor(b!) moments) -> ()",
        "finish(Tensor partial, Tensor z, Tensor other, Tensor? partner, Tensor pull, Tensor factors, int first_row, "
        "Tensor(a!) dz) -> ()",
    ),
}

for _op, _schemas in LEAVES.items():
    for _schema in _schemas:
        _library.define_leaf(f"_{_op}_{_schema}")


def has_leaves(op: str) -> bool:
    """Whether the compiled library has CUDA kernels for all of them."""
    names = (schema.partition("(")[0] for schema in LEAVES.get(op, ()))
    return op in LEAVES and all(_library.has_kernel(f"_{op}_{name}", "cuda") for name in names)


class Leaves:
    """`Leaves(op).NAME` is operator crosspoint::_OP_NAME."""

    def __init__(self, op: str) -> None:
        self._op = op

    def __getattr__(self, name: str):
        return getattr(torch.ops.crosspoint, f"_{self._op}_{name}").default
