"""The page and the plots, from results that were made up, and from those that are committed."""

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from benchmarks import plots, registry, report, targets
from benchmarks.measured import Measured, best_peer, load, share_of_limit

ROOT = Path(__file__).parents[2]
LIMITS = {"gflops": 80.0, "gflops_registers": 100.0, "read_gb_s": 10.0, "copy_gb_s": 20.0}


def row_of(name, ms, ratios, *, right=True, **more):
    """A row of one of the registry's cases, as benchmarks.run writes it."""
    case = next(case for case in registry.cases(None, registry.SIZES) if case.name == name)
    times = {"native": ms, **{peer: ms * ratio for peer, ratio in ratios.items()}} if right else {}
    spread = {peer: {"median": time, "low": 0.9 * time, "high": 1.2 * time} for peer, time in times.items()}
    return {
        "op": case.op, "case": name, "source": "random", "sizes": case.sizes, "ours": "native",
        "checks": {"native": {"right": right, "error": 1e-7 if right else 0.5}},
        "absent": {"faiss": "faiss is not installed"},
        "floor": registry.ENTRIES[case.op].floor(case)._asdict(),
        "ms": spread,
        "ratio": {peer: {"median": r, "low": 0.8 * r, "high": 1.1 * r} for peer, r in ratios.items()} if right else {},
        **more,
    }  # fmt: skip


@pytest.fixture
def results(tmp_path):
    """A machine's folder: tuned and default allocator, a narrower instruction set, a step."""
    graph, loss = "knn_graph (8, 1024, 3), k=20", "nt_xent N=256, D=256, forward + backward"
    wrong = "edge_conv (8, 1024, 3) -> 64, k=20, forward + backward"
    peaks = {"native": 2 << 20, "plain": 20 << 20, "cdist": 1 << 19}
    head = {
        "schema": 2, "machine": "a processor, 2 threads", "device": "cpu", "instruction_set": "avx2", "commit": "abc",
        "date": "2026-01-01", "python": "3.11", "torch": "2.13", "threads": 2, "malloc": "tuned",
        "peers": {"scipy": "1.17", "faiss": None}, "limits": LIMITS, "others": 0.5,
    }  # fmt: skip
    sweep = {
        "op": "nt_xent", "size": "N", "middle": {"N": 512, "D": 256}, "values": [256, 512], "ours": "native",
        "ms": {"native": {"256": 1.0, "512": 3.0}, "plain": {"256": 2.0, "512": 8.0}},
        "slope": {"native": 1.58, "plain": 2.0},
        "peak_bytes": {"native": {"256": 1 << 20, "512": 2 << 20}}, "slope_bytes": {"native": 1.0},
    }  # fmt: skip
    threads = {
        "case": graph,
        "ms": {"1": 3.8, "2": 2.0},
        "speedup": {"1": {"median": 1.0}, "2": {"median": 1.9}},
    }
    files = {
        "tuned": {
            **head,
            "rows": [
                row_of(graph, 2.0, {"plain": 30.0, "cdist": 10.0, "scipy": 0.5}, peak_bytes=peaks),
                row_of(loss, 4.0, {"plain": 1.25}),
                row_of(wrong, 1.0, {"plain": 99.0}, right=False),
            ],
            "scaling": [sweep],
            "thread_scaling": [threads],
        },
        "default": {**head, "malloc": "default", "rows": [row_of(graph, 2.0, {"plain": 60.0})]},
        "baseline": {**head, "instruction_set": "baseline", "rows": [row_of(graph, 5.0, {})]},
        "step": {
            "model": "crosspoint", "batch": 4, "points": 1024, "k": 20, "malloc": "default",
            "fused": {"seconds": 1.5, "peak_mib": 200}, "plain": {"failed": "does not fit in 1.0 GiB: why"},
            "largest_batch": {"limit_mib": 4096, "fused": {"batch": 60}, "plain": {"batch": 7}},
        },
    }  # fmt: skip
    folder = tmp_path / "box"
    folder.mkdir()
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_page_and_plots(results, tmp_path):
    out = tmp_path / "page.md"
    report.main([str(results), "--out", str(out)])
    text = out.read_text()
    for line in (
        "| (8, 1024, 3), k=20 | 2.00 (1.80 to 2.40) | **30.0x** (24.0 to 33.0) | **10.0x** (8.0 to 11.0) | **0.5x** "
        "(0.4 to 0.6) | **60.0x** (48.0 to 66.0) |",
        "| (8, 1024, 3), k=20 | 11.1 | 11 % | 2.0 | 20.0 | 10.0x | 0.5 (cdist) |",
        "- faiss: faiss is not installed",
        "| knn_graph (8, 1024, 3), k=20 | plain | 20x | 35x | **30.0x** | met |",
        "| knn_graph (8, 1024, 3), k=20 | scipy | 8x | 15x | **0.5x** | missed |",
        "- knn_graph (8, 1024, 3), k=20: scipy is 2.00x faster than ours",
        "- knn_graph (8, 1024, 3), k=20: cdist takes 0.5 MiB, ours 2.0 MiB",
        "| nt_xent | N = 256, 512 | D=256 | time | 1.58 | 2.00 |",
        "| nt_xent | N = 256, 512 | D=256 | memory | 1.00 |  |",
        "| knn_graph (8, 1024, 3), k=20 | 1.00x | 1.90x |",
        "| knn_graph (8, 1024, 3), k=20 | 2.00 ms | 2.5x |",
        "| crosspoint | 4 x 1024, k=20 | default | does not fit in 1.0 GiB: why | 1.50 s |  |  | 200 |  |",
        "| crosspoint | 1024 points, k=20 | 4.0 GiB | 7 | 60 |",
        "| taken by other processes | 50 % of the processors: not a quiet machine, so trust ratios alone, and these "
        "with care |",
        "| multiply-adds on registers | 100 GFLOP/s |",
    ):
        assert line in text.splitlines(), f"{line}\n\n{text}"
    for name in ("ratios", "time", "memory", "roofline"):
        assert f"(page/box-{name}.svg)" in text
        ElementTree.parse(tmp_path / "page" / f"box-{name}.svg")


def test_results_of_a_gpu_are_a_table(results):
    rows = [
        {
            "op": "knn_graph",
            "case": "(1, 8, 3), k=4",
            "us": {"native": 20.0, "plain": 90.5},
            "target_us": 30.0,
        },
        {"op": "nt_xent", "case": "N=8, D=8", "us": {"triton": 7.0}, "target_us": None},
    ]
    environment = [{"name": "device", "value": "a GPU"}, {"name": "torch", "value": "2.13"}]
    fused = {"seconds": 0.0042, "shapes_per_second": 7619.04, "peak_mib": 512}
    step = {
        "model": "dgcnn",
        "batch": 32,
        "points": 1024,
        "fused": fused,
        "plain": {"failed": "does not fit"},
    }
    found = {"environment": environment, "speeds": rows, "steps": [step]}
    (results / "gpu_check.json").write_text(json.dumps(found))
    text = report.page([load(results)], "page", {})
    assert "### a GPU" in text
    assert "| dgcnn, 32 x 1024, fused | 4.20 | 7619 | 512 |" in text
    assert "| knn_graph (1, 8, 3), k=4 | 30 | 20.0 | 90.5 |  |\n| nt_xent N=8, D=8 |  |  |  | 7.0 |" in text


def test_no_speed_of_a_wrong_answer(results):
    text = report.page([load(results)], "page", {})
    (line,) = [line for line in text.splitlines() if "-> 64" in line and "wrong" in line]
    assert line == "| (8, 1024, 3) -> 64, k=20, forward + backward | wrong by 5.0e-01: no speed |"
    assert "99.0" not in text


def test_plots_are_the_same_bytes_every_time(results, tmp_path):
    for place in ("a", "b"):
        plots.draw(load(results), tmp_path / place)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_share_of_the_limit_is_that_of_the_scarcer_resource():
    row = {"ours": "native", "ms": {"native": {"median": 4.0}}, "floor": {"flops": 1e8, "bytes": 1e6}}
    assert share_of_limit(row, LIMITS) == pytest.approx(0.25)  # 1 ms at 100 GFLOP/s, 0.1 ms at 10 GB/s
    row["floor"] = {"flops": 1e6, "bytes": 2e7}
    assert share_of_limit(row, LIMITS) == pytest.approx(0.5)
    assert share_of_limit(row, {}) is None


def test_best_peer_is_neither_plain_nor_wrong():
    row = {
        "ratio": {
            name: {"median": r} for name, r in {"plain": 1, "compiled": 2, "scipy": 5, "cdist": 4}.items()
        }
    }
    assert best_peer(row) == "cdist"
    assert best_peer({"ratio": {"plain": {"median": 3}}}) is None


@pytest.mark.parametrize("content", [None, {"schema": 1, "results": []}])
def test_folders_without_results_are_refused(tmp_path, content, capsys):
    if content is not None:
        (tmp_path / "old.json").write_text(json.dumps(content))
    with pytest.raises(
        SystemExit, match=r"benchmarks\.report: .*(holds no result files|none of the result files)"
    ):
        report.main([str(tmp_path)])


def test_the_committed_page_is_that_of_the_committed_results():
    page = ROOT / "docs" / "performance" / "measured.md"
    machines: list[Measured] = [
        load(folder) for folder in sorted((ROOT / "benchmarks" / "results").iterdir())
    ]
    pictures = {m.name: sorted((page.parent / "measured").glob(f"{m.name}-*.svg")) for m in machines}
    text = page.read_text()
    without = "\n".join(line for line in text.splitlines() if not line.startswith("!["))
    expected = "\n".join(line for line in report.page(machines, "measured", {}).splitlines())
    assert [line for line in without.splitlines() if line] == [
        line for line in expected.splitlines() if line
    ], "run: python -m benchmarks.report benchmarks/results/* --out docs/performance/measured.md"
    for paths in pictures.values():
        assert all(f"(measured/{path.name})" in text for path in paths)
    shown = re.findall(r"\]\((measured/[^)]+)\)", text)
    assert shown and all((page.parent / name).is_file() for name in shown)


def test_targets_name_cases_that_exist():
    names = {case.name for case in registry.cases(None, registry.SIZES)}
    assert all(target.case in names for target in targets.TARGETS)
