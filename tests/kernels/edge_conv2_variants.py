"""The kernels of edge_conv2, with every entry of their tables; the widest of them in every precision."""

from crosspoint.kernels import edge_conv2
from offline import Variant

MODULES = (edge_conv2,)
VALUES = ("p_nodes", "p_gain", "p_shift", "p_weight", "p_gamma", "p_winner", "p_g", "p_rows", "p_q", "p_runs")
VALUES += ("p_routed", "p_out", "p_scale")
TYPES = {
    **dict.fromkeys(["clouds", "N", "k", "C", "C_mid", "COUNT", "PART"], "i32"),
    **dict.fromkeys(["p_degrees", "p_start", "p_edges"], "*i32"),
    **dict.fromkeys(VALUES, "*fp32"),
    "p_idx": "*i64",
    "p_slot": "*u8",
    "p_sums": "*fp64",
}
DOUBLE = {**TYPES, **dict.fromkeys(VALUES, "*fp64")}
SLOPE = {"SLOPE": 0.2}
# kernel -> constants of training
ON_EDGES = (
    (edge_conv2.max_kernel, {"STATISTICS": True}),
    (edge_conv2.own_kernel, {"TRAINING": True}),
    (edge_conv2.neighbour_kernel, {"TRAINING": True}),
    (edge_conv2.products_kernel, {}),
)


def variants() -> list[Variant]:
    found = []

    def add(name, kernel, tile, product, types=TYPES, **constants):
        constants = {
            "PRODUCT": product,
            "WIDTH": tile.width,
            "DEPTH": tile.depth,
            "ROWS": edge_conv2.ROWS,
            **SLOPE,
            **constants,
        }
        options = edge_conv2.options_of(tile)
        found.append(Variant(name, kernel, types, constants, options, tensor_cores=product != "float64"))

    for kernel, training in ON_EDGES:
        name = "edges-" + kernel.__name__.removesuffix("_kernel")
        for tile in edge_conv2.TILES:
            add(f"{name}-{tile.width}", kernel, tile, "tf32x3", **training)
        add(f"{name}-bf16", kernel, edge_conv2.TILES[-1], "bf16", **training)
        add(f"{name}-double", kernel, edge_conv2.DOUBLE[-1], "float64", DOUBLE, **training)
    largest = edge_conv2.TILES[-1]
    slots = {**TYPES, "p_slot": "*i32"}
    kernel = edge_conv2.max_kernel
    add("edges-max-tf32", kernel, largest, "tf32", STATISTICS=True)
    add("edges-max-evaluated", kernel, largest, "tf32x3", STATISTICS=False, p_gamma=None, p_slot=None)
    add("edges-own-evaluated", edge_conv2.own_kernel, largest, "tf32x3", slots, TRAINING=False)

    rows = {"ROWS": edge_conv2.ROWS, "CHANNELS": edge_conv2.COLUMNS}
    for kernel, constants in (
        (edge_conv2.activate_kernel, SLOPE),
        (edge_conv2.runs_kernel, {"TILE": edge_conv2.ROWS}),
    ):
        name = "edges-" + kernel.__name__.removesuffix("_kernel")
        found.append(Variant(name, kernel, TYPES, {**rows, **constants}))
        found.append(Variant(f"{name}-double", kernel, DOUBLE, {**rows, **constants}))
    return found
