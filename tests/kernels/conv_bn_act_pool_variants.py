"""The kernels of conv_bn_act_pool, for every product, with float32 and bfloat16 points."""

from crosspoint.kernels import conv_bn_act_pool as pool
from offline import Variant

MODULES = (pool,)
VALUES = ("p_centre", "p_gamma", "p_scale", "p_shift", "p_values", "p_gram", "p_grad", "p_spread", "p_out")
OPERANDS = ("p_x", "p_weight", "p_square")
DOUBLES = ("p_first", "p_mean", "p_rstd", "p_slopes", "p_affine", "p_count")
TYPES = {
    **dict.fromkeys(["clouds", "N", "tiles", "parts", "words"], "i32"),
    **dict.fromkeys(["C", "C_in", "C_out"], "i32/16"),
    **dict.fromkeys(["p_places", "p_winner", "p_mask"], "*i32"),
    **dict.fromkeys(VALUES + OPERANDS, "*fp32"),
    **dict.fromkeys(DOUBLES, "*fp64"),
    "p_lengths": "*i64",
}
SLOPE = {"SLOPE": 0.2}


def variants() -> list[Variant]:
    double = {**TYPES, **dict.fromkeys(VALUES + OPERANDS, "*fp64")}
    half = {**TYPES, **dict.fromkeys(OPERANDS, "*bf16")}
    found = []
    for name, kernel, table in (
        ("gram", pool.gram_kernel, pool.GRAM),
        ("pool", pool.pool_kernel, pool.POOL),
        ("x-gradient", pool.x_gradient_kernel, pool.X_GRADIENT),
        ("weight-gradient", pool.weight_gradient_kernel, pool.WEIGHT_GRADIENT),
    ):
        for product, tile in table.items():
            types = {"bf16": half, "float64": double}.get(product, TYPES)
            if product == "bf16" and name == "x-gradient":
                types = {**types, "p_out": "*bf16"}
            constants = {**tile.constants(), "PRODUCT": product}
            cores = product != "float64"
            title = f"{name}-{product}"
            found.append(Variant(title, kernel, types, constants, tile.options(), tensor_cores=cores))
    tile = pool.POOL["tf32x3"]
    constants = {**tile.constants(), "PRODUCT": "tf32x3", "p_mask": None, "p_lengths": None}
    found.append(
        Variant("pool-evaluated", pool.pool_kernel, TYPES, constants, tile.options(), tensor_cores=True)
    )
    for name, types in (("", TYPES), ("-double", double)):
        found += [
            Variant(f"sums{name}", pool.sums_kernel, types, {"ROWS": 128, "COLUMNS": pool.SUMS_COLUMNS}),
            Variant(
                f"finish{name}",
                pool.finish_kernel,
                types,
                {**SLOPE, "COLUMNS": pool.FINISH_COLUMNS},
                {"num_warps": 2},
            ),
            Variant(
                f"terms{name}",
                pool.terms_kernel,
                types,
                {**SLOPE, "TRAINING": True, "COLUMNS": pool.TERMS_COLUMNS},
                {"num_warps": 1},
            ),
        ]
    return found
