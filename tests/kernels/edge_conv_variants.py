"""The kernels of edge_conv, for points and for features, with every entry of their tables."""

from crosspoint.kernels import edge_conv, edge_conv_backward, neighbor_sum
from crosspoint.kernels._edge_conv_tiles import CENTRE, GATHER, MOMENTS, MOMENTS_DOUBLE, PASS
from offline import Variant

MODULES = (edge_conv, edge_conv_backward)
VALUES = ("p_x", "p_nodes", "p_out", "p_winner", "p_grad", "p_routed", "p_dense", "p_grad_x", "p_constant")
VALUES += ("p_gamma", "p_scale", "p_shift", "p_centre", "p_sum", "p_sums", "p_gram")
TYPES = {
    **dict.fromkeys(["clouds", "M", "N", "k", "C", "STRIDE", "parts", "PART"], "i32"),
    **dict.fromkeys(["p_degrees", "p_start", "p_edges"], "*i32"),
    **dict.fromkeys(VALUES, "*fp32"),
    "p_first": "*fp64",
    "p_idx": "*i64",
    "p_slot": "*u8",
}
SLOPE = {"SLOPE": 0.2}


def variants() -> list[Variant]:
    double = {**TYPES, **dict.fromkeys(VALUES, "*fp64")}
    partial = {"p_sums": "*fp64"}  # gradient_kernel's sums over parts of a cloud
    listed = (
        (edge_conv.centre_kernel, CENTRE, CENTRE, {}, {}),
        (edge_conv.subtract_kernel, PASS, PASS, {}, {}),
        (neighbor_sum.sum_kernel, GATHER, GATHER, {}, {"WIDE": False}),
        (edge_conv.moments_kernel, MOMENTS, MOMENTS_DOUBLE, {}, {}),
        (edge_conv.max_kernel, GATHER, GATHER, {}, SLOPE),
        (edge_conv_backward.gradient_kernel, PASS, PASS, partial, SLOPE),
        (edge_conv_backward.route_kernel, GATHER, GATHER, {}, {}),
        (edge_conv_backward.dense_kernel, GATHER, GATHER, {}, {}),
    )
    found = [Variant("conv-degrees", edge_conv.degrees_kernel, TYPES, {"ROWS": edge_conv.DEGREES_ROWS})]
    for kernel, table, table_double, types, constants in listed:
        name = "conv-" + kernel.__name__.removesuffix("_kernel")
        for tile in table:
            tiled = {**tile.constants(), **constants}
            options = {"num_warps": tile.warps}
            cores = tile.product == "tf32x3"
            found.append(
                Variant(
                    f"{name}-{tile.channels}", kernel, {**TYPES, **types}, tiled, options, tensor_cores=cores
                )
            )
        tile = table_double[-1]
        tiled = {**tile.constants(), **constants}
        options = {"num_warps": tile.warps}
        found.append(Variant(f"{name}-double", kernel, {**double, **types}, tiled, options))
    tile = GATHER[-1]
    for name, types, constants in (
        ("evaluated", TYPES, {"p_gamma": None, "p_winner": None, "p_slot": None}),
        ("slots", {**TYPES, "p_slot": "*i32"}, {}),
    ):
        constants = {**tile.constants(), **SLOPE, **constants}
        options = {"num_warps": tile.warps}
        found.append(Variant(f"conv-max-{name}", edge_conv.max_kernel, types, constants, options))
    return found
