"""The kernels of the contrastive losses, every entry of their tables on the processors that it is for."""

from crosspoint.kernels import nt_xent, nt_xent_rows
from crosspoint.kernels._nt_xent_tiles import GRADIENT, ROW_SUMS
from crosspoint.kernels.nt_xent import ACROSS, BEHIND, LABELS, WITHIN
from offline import Variant

MODULES = (nt_xent, nt_xent_rows)
ARCHITECTURES = {"sm_90": (90,), "sm_100": (100,), "other": (80,)}
SHARED = 99 << 10  # the least that "other" processors have
SCALARS = ("p_scale", "p_temperature", "p_target", "p_sums", "p_exponents", "p_partial", "p_moments")
TYPES = {
    **dict.fromkeys(["N", "first", "n", "D", "parts"], "i32"),
    "W": "i32/16",
    **dict.fromkeys(["p_labels", "p_partner"], "*i32"),
    **dict.fromkeys(["p_z", "p_left", "p_right", "p_other", "p_dz", *SCALARS], "*fp32"),
    **dict.fromkeys(["p_cosine", "p_pull", "p_factors"], "*fp64"),
}
DOUBLE = {**TYPES, **dict.fromkeys(["p_rows", *SCALARS], "*fp64")}
ROW_TYPES = {"bf16": "*bf16", "f16": "*fp16", "tf32": "*fp32", "tf32x3": "*fp32"}
WIDEST = 1024


def variants() -> list[Variant]:
    found = list(of_rows())
    for leaf, kernel, table in (
        ("sums", nt_xent.sums_kernel, ROW_SUMS),
        ("gradient", nt_xent.gradient_kernel, GRADIENT),
    ):
        for processor, products in table.items():
            for product, entries in products.items():
                for most, tile in entries.items():
                    width = min(most, WIDEST)
                    # The flagship in all its forms, any other entry in the one that needs most registers.
                    every = (WITHIN, ACROSS, BEHIND, LABELS)
                    kinds = every if product == "half" and width == 256 else (LABELS,)
                    if product == "half" and "half, labels" in products:
                        kinds = every[:3]
                    for kind in kinds:
                        constants = {**tile.constants(width), "KIND": kind.value}
                        constants["PRODUCT"] = "bf16" if product.startswith("half") else product
                        if kind.value != LABELS.value:
                            constants.update(p_labels=None, p_target=None)
                        if kernel is nt_xent.sums_kernel:
                            del constants["SLICE"]
                        found.append(
                            Variant(
                                f"contrast-{leaf}-{product}-{width}-{kind.value}-{processor}",
                                kernel,
                                types_of(constants["PRODUCT"]),
                                constants,
                                tile.options(),
                                tensor_cores=product != "float64",
                                architectures=ARCHITECTURES[processor],
                                shared=SHARED if processor == "other" else None,
                            )
                        )
    return found


def types_of(product: str) -> dict:
    return DOUBLE if product == "float64" else {**TYPES, "p_rows": ROW_TYPES[product]}


def of_rows():
    """The kernels that take rows one by one, for half types with two views and float64 with labels."""
    halves = dict.fromkeys(["p_z", "p_left", "p_right", "p_other", "p_dz", "p_rows"], "*bf16")
    doubles = dict.fromkeys(["p_z", "p_left", "p_right", "p_other", "p_dz"], "*fp64")
    tf32 = {"p_rows": "*fp32"}
    for kernel in (
        nt_xent_rows.normalise_kernel,
        nt_xent_rows.positives_kernel,
        nt_xent_rows.finish_kernel,
    ):
        name = "contrast-" + kernel.__name__.removesuffix("_kernel")
        for kind, types in (("half", halves), ("tf32", tf32), ("double", doubles)):
            constants = dict(nt_xent_rows.BLOCK)
            if kernel is nt_xent_rows.normalise_kernel:
                constants["TF32"] = kind == "tf32"
            elif kind == "half":
                constants["p_partner"] = None
            base = DOUBLE if kind == "double" else TYPES
            # Nothing in them is a processor's own: one kind is compiled for all.
            where = {"half": (80, 90, 100), "tf32": (80,), "double": (90,)}[kind]
            yield Variant(f"{name}-{kind}", kernel, {**base, **types}, constants, architectures=where)
