"""The plots of a page: time against N with peers, memory against batch, roofline, ratios. SVG, the same bytes for the
same results."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.measured import Measured, best_peer, flops_limit
from benchmarks.peers import PEERS
from benchmarks.registry import OPS

__all__ = ["draw"]

# Okabe and Ito's colours: told apart with any colour vision.
_BLUE, _ORANGE, _GREEN, _RED, _PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"
_SKY, _GREY, _BLACK, _YELLOW = "#56B4E9", "#7A7A7A", "#222222", "#B5A800"
_OURS = {"color": _BLUE, "linewidth": 2.4, "marker": "o", "markersize": 5, "zorder": 5, "label": "ours"}
_MARKERS = ("s", "^", "D", "v", "P", "X", "<", ">", "h")
_CYCLE = (_ORANGE, _GREEN, _RED, _PURPLE, _SKY, _YELLOW, _BLACK)
_STYLE = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "crosspoint",
    "figure.facecolor": "white",
}


def draw(machine: Measured, folder: Path, suffix: str = "svg") -> list[tuple[str, str]]:
    """Writes the plots that this machine's results allow; their file names and captions."""
    if not machine.runs:
        return []
    made = []
    with matplotlib.rc_context(_STYLE):
        for name, caption, make in (
            ("ratios", "Time of plain PyTorch and of the best peer, over ours", _ratios),
            ("time", "Time against the number of points or pairs", _times),
            ("memory", "Peak memory against the batch", _memory),
            ("roofline", "The least work of each case over its time, under this machine's limits", _roofline),
        ):
            figure = make(machine)
            if figure is not None:
                folder.mkdir(parents=True, exist_ok=True)
                file = f"{machine.name}-{name}.{suffix}"
                metadata = {"Date": None} if suffix == "svg" else None
                figure.savefig(folder / file, metadata=metadata, dpi=110, bbox_inches="tight")
                made.append((file, f"{caption} ({machine.name})"))
    return made


def _look(name: str) -> dict:
    """Of a peer's line: the same in every plot."""
    if name == "plain":
        return {"color": _GREY, "marker": "s", "markersize": 4, "linewidth": 1.6, "label": "plain PyTorch"}
    place = list(PEERS).index(name)
    return {
        "color": _CYCLE[place % len(_CYCLE)],
        "marker": _MARKERS[place % len(_MARKERS)],
        "markersize": 4,
        "linewidth": 1.2,
        "label": name,
    }


# ---- lines over a size


def _times(machine: Measured) -> Figure | None:
    rows = [row for row in machine.main.get("scaling", []) if row["size"] == "N"]
    return _panels(rows, "ms", "milliseconds", 1.0)


def _memory(machine: Measured) -> Figure | None:
    rows = [row for row in machine.main.get("scaling", []) if row.get("peak_bytes")]
    return _panels(rows, "peak_bytes", "peak MiB", 2.0**-20)


def _panels(rows: list[dict], key: str, unit: str, scale: float) -> Figure | None:
    """A panel per operator, with both axes logarithmic."""
    rows = [row for row in rows if row[key]]
    if not rows:
        return None
    across = min(3, len(rows))
    down = math.ceil(len(rows) / across)
    figure = Figure(figsize=(3.5 * across, 2.9 * down + 0.5), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False)
    shown: dict[str, object] = {}
    for axes, row in zip(panels.flat, rows, strict=False):
        _lines(axes, row, key, scale)
        rest = ", ".join(f"{name}={value}" for name, value in row["middle"].items() if name != row["size"])
        axes.set_title(row["op"], loc="left", pad=16)
        axes.text(0, 1.02, rest, transform=axes.transAxes, color="#555555", fontsize=8)
        axes.set_xlabel({"N": "N", "B": "B, clouds"}[row["size"]] if "B" in row["middle"] else "N, pairs")
        axes.set_ylabel(unit)
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            shown.setdefault(label, handle)
    for axes in list(panels.flat)[len(rows) :]:
        axes.remove()
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=min(7, len(shown)))
    return figure


def _lines(axes: Axes, row: dict, key: str, scale: float) -> None:
    for name, costs in row[key].items():
        look = _OURS if name == row["ours"] else _look(name)
        axes.plot([int(v) for v in costs], [max(scale * cost, 1e-3) for cost in costs.values()], **look)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(row["values"], [f"{value:,}" for value in row["values"]])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


# ---- roofline


def _roofline(machine: Measured) -> Figure | None:
    limits = machine.main.get("limits")
    rows = [row for row in machine.main["rows"].values() if row["ours"] in row["ms"]]
    if not limits or not rows:
        return None
    figure = Figure(figsize=(8.2, 4.8), layout="constrained")
    axes = figure.subplots()
    ops = [op for op in OPS if any(row["op"] == op for row in rows)]
    for place, op in enumerate(ops):
        mine = [row for row in rows if row["op"] == op]
        intensity = [row["floor"]["flops"] / row["floor"]["bytes"] for row in mine]
        rate = [1e-6 * row["floor"]["flops"] / row["ms"][row["ours"]]["median"] for row in mine]
        colour = (_BLUE, *_CYCLE)[place % 8]
        axes.scatter(
            intensity, rate, s=38, color=colour, marker=("o", *_MARKERS)[place % 10], label=op, zorder=4,
            linewidth=0,
        )  # fmt: skip
    low = min(row["floor"]["flops"] / row["floor"]["bytes"] for row in rows) / 2
    high = 2 * max(row["floor"]["flops"] / row["floor"]["bytes"] for row in rows)
    peak, bandwidth = flops_limit(limits), limits["read_gb_s"]
    corner = peak / bandwidth
    axes.plot([low, corner, max(high, corner)], [low * bandwidth, peak, peak], color=_BLACK, linewidth=1.5)
    roofs = ((peak, f"{peak:.0f} GFLOP/s"), (limits["gflops"], f"torch.mm {limits['gflops']:.0f} GFLOP/s"))
    for value, text in roofs if limits["gflops"] < 0.97 * peak else roofs[:1]:
        if value != peak:
            axes.axhline(value, color=_GREY, linewidth=0.9, linestyle="--")
        axes.annotate(text, (high, value), (0, 3), textcoords="offset points", ha="right", fontsize=8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, max(high, corner))
    middle = (low * corner) ** 0.5
    axes.annotate(
        f"{bandwidth:.0f} GB/s, reading memory", (middle, middle * bandwidth), (7, -9), fontsize=8,
        textcoords="offset points",
    )  # fmt: skip
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("least work: FLOP per byte that must move")
    axes.set_ylabel("least work: GFLOP/s reached")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


# ---- ratios


def _ratios(machine: Measured) -> Figure | None:
    rows = [row for row in machine.main["rows"].values() if row["ratio"]]
    if not rows:
        return None
    rows.sort(key=lambda row: OPS.index(row["op"]))
    figure = Figure(figsize=(8.2, 0.26 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(rows):
        for name, look, shift in (("plain", _GREY, -0.16), (best_peer(row), _ORANGE, 0.16)):
            if name in row["ratio"]:
                ratio = row["ratio"][name]
                axes.plot([ratio["low"], ratio["high"]], [place + shift] * 2, color=look, linewidth=1.5)
                axes.plot(ratio["median"], place + shift, "o", color=look, markersize=4.5, zorder=4)
                if name != "plain":
                    axes.annotate(
                        name, (ratio["high"], place + shift), (4, -2.5), textcoords="offset points", fontsize=6.5,
                        color="#8a5f00",
                    )  # fmt: skip
    axes.axvline(1, color=_BLACK, linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(range(len(rows)), [row["case"].replace(", forward + backward", "") for row in rows])
    axes.tick_params(axis="y", labelsize=7, length=0)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("times as long as ours takes (median and range)")
    for colour, text in ((_GREY, "plain PyTorch"), (_ORANGE, "best other peer")):
        axes.plot([], [], "o-", color=colour, markersize=4.5, label=text)
    axes.legend(loc="upper left", bbox_to_anchor=(0, 1.0 + 1.1 / len(rows)), ncols=2, borderaxespad=0)
    return figure
