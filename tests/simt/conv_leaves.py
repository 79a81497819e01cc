"""The leaves of edge_conv in CUDA C++, run by the harness for its orchestrator and edge_conv2's."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from simt_leaves import SimtLeaves


class ConvLeaves(SimtLeaves):
    """The leaves of csrc/torch/cuda/edge_conv.cpp and edge_layer.cpp."""

    def degrees(self, idx, degrees):
        self.run("degrees", idx, *idx.shape, degrees, given=(degrees,), filled=(degrees,))

    def centre(self, x, degrees, centre):
        self.run("centre", _double(x), *x.shape, x, degrees, centre, filled=(centre,))

    def subtract(self, x, centre, degrees, out):
        self.run("subtract", _double(x), *x.shape, x, centre, degrees, out, filled=(out,))

    def neighbor_sum(self, x, idx, out):
        self.run("neighbor_sum", _double(x), idx, *idx.shape, x.shape[2], x, out, filled=(out,))

    def moments(self, x, sums, degrees, gram, first):
        sizes = (*x.shape, gram.shape[1])
        self.run("moments", _double(x), *sizes, x, sums, degrees, gram, first, filled=(gram, first))

    def sum_parts(self, gram, first, moments):
        sizes = (*gram.shape[:2], gram.shape[3])
        self.run("sum_parts", _double(gram), *sizes, gram, first, moments, filled=(moments,))

    def norm(self, moments, *rest):
        self._norm(moments, None, *rest)

    def sums_norm(
        self, partial, weight, gamma, beta, signs, mean, var, centre, edges, momentum, eps, *filled
    ):
        layer = (weight, gamma, beta, signs, mean, var)
        self._norm(None, partial, *layer, centre, edges, momentum, eps, None, *filled)

    def _norm(self, moments, partial, weight, gamma, beta, signs, running_mean, running_var, *rest):
        centre, edges, momentum, eps, *filled = rest
        running = (running_mean, running_var)
        sizes = (*centre.shape, weight.shape[1], len(weight))
        parts = 0 if partial is None else partial.shape[2]
        self.run(
            *(
                "norm",
                _double(weight),
                *sizes,
                moments,
                parts,
                partial,
                weight,
                gamma,
                beta,
                int(signs),
                *running,
            ),
            *(0 if running_mean is None else _double(running_mean), centre, _double(centre), edges),
            *(momentum, eps, *filled),
            given=running,
            filled=(*running, *filled),
        )

    def pivot(self, gamma, beta, rstd, offset, negative_slope, pivot):
        is_double = 0 if gamma is None else _double(gamma)
        self.run(
            "pivot",
            is_double,
            *offset.shape,
            gamma,
            beta,
            rstd,
            offset,
            negative_slope,
            pivot,
            filled=(pivot,),
        )

    def affine(self, gamma, beta, signs, rstd, offset, *filled):
        self.run(
            *("affine", _double(filled[0]), *offset.shape, gamma, beta, int(signs), rstd, offset, *filled),
            filled=filled,
        )

    def norm_gradient(self, partial, gamma, signs, offset, rstd, edges, *filled):
        self.run(
            *("norm_gradient", _double(filled[0]), *partial.shape[1:], partial, gamma, int(signs), offset),
            *(rstd, edges, *filled),
            filled=filled,
        )

    def input_terms(self, weight, gamma, signs, rstd, mean_term, slope_term, *filled):
        clouds = 0 if mean_term is None else len(mean_term)
        sizes = (clouds, filled[0].shape[1], weight.shape[1], len(weight))
        self.run(
            *("input_terms", _double(weight), *sizes, weight, gamma, int(signs), rstd, mean_term, slope_term),
            *filled,
            filled=filled,
        )

    def weight_gradient(self, sparse, weight, gamma, signs, rstd, centre, edges, *rest):
        mean_term, slope_term, moments, total, grad = rest
        sizes = (*centre.shape, weight.shape[1], len(weight))
        self.run(
            *("weight_gradient", _double(weight), *sizes, sparse, weight, gamma, int(signs), rstd, centre),
            *(_double(centre), edges, mean_term, slope_term, moments, total, grad),
            given=(total,),
            filled=(total, grad),
        )

    def gather_max(self, nodes, idx, gamma, scale, shift, negative_slope, out, winner, slot):
        self.run(
            *("gather_max", _double(nodes), idx, *idx.shape, out.shape[2], nodes, gamma, scale, shift),
            *(float(negative_slope), out, winner, slot, 1 if slot is None else slot.element_size()),
            filled=(out, winner, slot),
        )

    def winner_gradient(self, grad, winner, degrees, scale, shift, negative_slope, routed, sums):
        sizes = (*winner.shape, sums.shape[2])
        arrays = (grad, winner, degrees, scale, shift, float(negative_slope), routed, routed.shape[2], sums)
        self.run("winner_gradient", _double(winner), *sizes, *arrays, given=(routed,), filled=(routed, sums))

    def reverse_graph(self, idx, start, edges):
        sizes = (*idx.shape, start.shape[1] - 1)
        size = self.device.library.reverse_graph_bytes(None, *map(ctypes.c_int64, sizes))
        workspace = torch.empty(size, dtype=torch.uint8)
        edges.zero_()  # what lies after the last edge is not defined, and is copied with the rest
        self.run(
            *("turn_graph", idx, *sizes, start, edges, workspace),
            given=(edges,),
            filled=(start, edges, workspace),
        )

    def route(self, slot, start, edges, k, routed):
        sizes = (*slot.shape[:2], k, slot.shape[2])
        self.run(
            *("route", _double(routed), start, edges, *sizes, slot, slot.element_size(), routed),
            given=(routed,),
            filled=(routed,),
        )

    def dense_gradient(self, x, sums, degrees, start, edges, k, constant, dense, grad_x):
        sizes = (*x.shape[:2], k, x.shape[2])
        self.run(
            *("dense_gradient", _double(x), start, edges, *sizes, x, sums, degrees, constant, dense, grad_x),
            given=(grad_x,),
            filled=(dense, grad_x),
        )


def _double(x: Tensor) -> int:
    return int(x.dtype == torch.float64)
