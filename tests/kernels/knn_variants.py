"""The kernels of k-NN graphs, with every entry of their tables."""

from crosspoint.kernels import knn_direct, knn_filter, knn_tree
from offline import Variant

MODULES = (knn_direct, knn_filter, knn_tree)
TYPES = {
    **dict.fromkeys(["M", "N", "k", "C", "n_block", "s_point", "s_channel"], "i32"),
    **dict.fromkeys(["p_lengths", "p_lengths_query", "p_lengths_points", "p_idx", "p_space"], "*i64"),
    **dict.fromkeys(["p_order", "p_near"], "*i64"),
    **dict.fromkeys(
        ["p_candidates", "p_count", "p_wanted", "p_extent", "p_code", "p_index", "p_lowest"], "*i32"
    ),
    **dict.fromkeys(["p_query", "p_points", "p_dist2", "p_centre", "p_x"], "*fp32"),
    **dict.fromkeys(["p_divisions", "p_sorted", "p_sides"], "*fp32"),
    **dict.fromkeys(["p_norm2", "p_lost2", "p_norm2_query", "p_lost2_query"], "*fp32"),
    "p_rounded": "*bf16",
}


def variants() -> list[Variant]:
    direct, filtered = knn_direct, knn_filter
    graph = {"SELF": direct.SELF_FIRST.value, "p_dist2": None}
    found = []
    for entry in direct.DIRECT:
        few = {**entry.constants(), **graph, "CHANNELS": 3, "p_wanted": None, "s_point": 1}
        any_number = {**entry.constants(), "SELF": direct.OTHER_SET.value, "CHANNELS": 0}
        found += [
            Variant(f"direct-{entry.k}-3", direct.direct_kernel, TYPES, few, entry.options()),
            Variant(f"direct-{entry.k}-any", direct.direct_kernel, TYPES, any_number, entry.options()),
        ]
    double = {**TYPES, **dict.fromkeys(["p_query", "p_points", "p_dist2"], "*fp64")}
    for name, kernel, entry, types in (
        ("merge", direct.merge_kernel, direct.MERGE, TYPES),
        ("sweep", direct.sweep_kernel, direct.SWEEP, double),
    ):
        constants = {**entry.constants(), "SELF": direct.OTHER_SET.value, "CHANNELS": 3, "s_point": 1}
        found.append(Variant(name, kernel, types, constants, {"num_warps": entry.warps}))
    found.append(Variant("centre", filtered.centre_kernel, TYPES, filtered.CENTRE))
    for width in filtered.WIDTHS:
        constants = {"ROWS": filtered.ROUND_ROWS, "WIDTH": width}
        found.append(Variant(f"round-{width}", filtered.round_kernel, TYPES, constants))
    halves = {**TYPES, **dict.fromkeys(["p_query", "p_points"], "*bf16")}
    for entry in filtered.FILTER:
        for width in filtered.WIDTHS:
            constants = {**entry.constants(), "SELF": direct.SELF_FIRST.value, "WIDTH": width}
            options = {"num_warps": entry.warps}
            name = f"filter-{entry.k}-{width}"
            found.append(Variant(name, filtered.filter_kernel, halves, constants, options, tensor_cores=True))
        constants = {**entry.rerank_constants(), "SELF": direct.OTHER_SET.value}
        found.append(Variant(f"rerank-{entry.k}", filtered.rerank_kernel, TYPES, constants))
    found.append(Variant("encode", knn_tree.encode_kernel, TYPES, knn_tree.ENCODE))
    found.append(Variant("plant", knn_tree.plant_kernel, TYPES, {}))
    found.append(Variant("enclose", knn_tree.enclose_kernel, TYPES, {}, {"num_warps": 1}))
    for entry in knn_tree.TREE:
        sets = {**entry.constants(), "SELF": direct.OTHER_SET.value}
        own = {**entry.constants(), **graph, "p_near": None}
        found += [
            Variant(f"tree-{entry.k}", knn_tree.tree_kernel, TYPES, sets, entry.options()),
            Variant(f"tree-graph-{entry.k}", knn_tree.tree_kernel, TYPES, own, entry.options()),
        ]
    return found
