"""The kernels of gather_max and neighbor_sum, for points and for features."""

from crosspoint.kernels import gather_max, neighbor_sum
from crosspoint.kernels._common import gather_blocks
from offline import Variant

MODULES = (gather_max, neighbor_sum)
TYPES = {
    **dict.fromkeys(["M", "N", "k", "C"], "i32"),
    **dict.fromkeys(["p_slots", "p_start", "p_edges"], "*i32"),
    **dict.fromkeys(["p_x", "p_out", "p_grad"], "*fp32"),
    "p_idx": "*i64",
}


def variants() -> list[Variant]:
    kernels = [(neighbor_sum.sum_kernel, {"WIDE": True}), (neighbor_sum.sum_turned_kernel, {})]
    kernels += [(gather_max.most_kernel, {}), (gather_max.winners_kernel, {})]
    double = {**TYPES, **dict.fromkeys(["p_x", "p_out", "p_grad"], "*fp64")}
    found = []
    for kernel, more in kernels:
        name = kernel.__name__.removesuffix("_kernel")
        for channels in (3, 64):
            constants = {**gather_blocks(1, 1, channels)[1], **more}
            found.append(Variant(f"{name}-{channels}", kernel, TYPES, constants))
        found.append(Variant(f"{name}-double", kernel, double, constants))
    return found
