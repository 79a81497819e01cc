"""The kernels of a layer's algebra: with the batch's statistics, with running ones, and without a norm."""

from crosspoint.kernels import edge_layer
from offline import Variant

MODULES = (edge_layer,)
VALUES = (
    "p_weight",
    "p_gamma",
    "p_beta",
    "p_running_mean",
    "p_running_var",
    "p_centre",
    "p_halves",
    "p_scale",
)
VALUES += ("p_shift", "p_grad_gamma", "p_grad_beta", "p_out", "p_sparse", "p_grad", "p_parts")
DOUBLES = (
    "p_moments",
    "p_edges",
    "p_offset",
    "p_rstd",
    "p_partial",
    "p_sum",
    "p_mean_term",
    "p_slope_term",
    "p_left",
    "p_pivot",
)
TYPES = {
    **dict.fromkeys(["clouds", "parts", "rows", "C", "W", "O"], "i32"),
    **dict.fromkeys(VALUES, "*fp32"),
    **dict.fromkeys(DOUBLES, "*fp64"),
}
SIGNS = {"SIGNS": True}
CLOUDS = {"CLOUDS": edge_layer.CLOUDS}
MATRIX = {"ROWS": edge_layer.ROWS, "COLUMNS": edge_layer.COLUMNS, **CLOUDS, **SIGNS}
NUMBERS = {"NUMBERS": edge_layer.NUMBERS}


def variants() -> list[Variant]:
    double = {**TYPES, **dict.fromkeys(VALUES, "*fp64")}
    norm, weight = edge_layer.norm_kernel, edge_layer.weight_gradient_kernel
    norm_constants = {**MATRIX, "EPS": 1e-5, "MOMENTUM": 0.1, "p_partial": None}
    sums_norm = {**norm_constants, "p_moments": None, "p_halves": None}
    no_norm = dict.fromkeys(["p_moments", "p_gamma", "p_beta", "p_running_mean", "p_running_var"])
    not_training = dict.fromkeys(["p_moments", "p_mean_term", "p_slope_term"])
    sums = {**NUMBERS, "HEIGHT": edge_layer.HEIGHT}
    listed = [
        ("sum_parts", edge_layer.sum_parts_kernel, {**sums, "GRAM": True}),
        ("sum_first", edge_layer.sum_parts_kernel, {**sums, "GRAM": False}),
        ("norm", norm, norm_constants),
        ("norm-evaluated", norm, {**norm_constants, "p_moments": None}),
        ("norm-none", norm, {**norm_constants, **no_norm}),
        ("sums_norm-evaluated", norm, sums_norm),
        ("affine", edge_layer.affine_kernel, {**NUMBERS, **SIGNS}),
        ("pivot", edge_layer.pivot_kernel, {**NUMBERS, "SLOPE": 0.2}),
        ("norm_gradient", edge_layer.norm_gradient_kernel, {**CLOUDS, **SIGNS, "PARTS": edge_layer.PARTS}),
        *(
            (
                f"input_terms-{which}",
                edge_layer.input_terms_kernel,
                {**edge_layer.TERMS, **SIGNS, "WHICH": which},
            )
            for which in range(3)
        ),
        ("weight_gradient", weight, {**MATRIX, "PAIRED": True}),
        ("weight_gradient-single", weight, {**MATRIX, "PAIRED": False}),
        ("weight_gradient-evaluated", weight, {**MATRIX, "PAIRED": True, **not_training}),
    ]
    found = []
    for name, kernel, constants in listed:
        options = edge_layer.OPTIONS if kernel in (norm, weight) else {}
        found.append(Variant(f"layer-{name}", kernel, TYPES, constants, options))
        found.append(Variant(f"layer-{name}-double", kernel, double, constants, options))
    # Of edge_conv2's second layer the centres are float64's.
    pivots = {**TYPES, "p_centre": "*fp64"}
    del sums_norm["p_partial"]
    found.append(Variant("layer-sums_norm", norm, pivots, sums_norm, edge_layer.OPTIONS))
    return found
