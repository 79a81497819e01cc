"""The documentation: its code runs, its commands exist, its errors and tolerances are the real ones."""

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from crosspoint import cli, testing

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
)
# language, the rest of the opening line, content
FENCE = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```$", re.M | re.S)
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


def blocks(page: str, *languages: str) -> list[str]:
    """Fenced blocks in one of the languages; those with a title are files, not programs, and are left out."""
    return [
        body
        for language, rest, body in FENCE.findall(text_of(page))
        if language in languages and "title=" not in rest
    ]


def spans(page: str) -> list[str]:
    """Inline code, line breaks as spaces."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", FENCE.sub("", text_of(page)))]


def shell_lines(page: str) -> list[str]:
    """Commands of the page's shell blocks, without comments and loops."""
    found = []
    for block in blocks(page, "", "sh", "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            found.append(line.partition(" #")[0].partition("->")[0].strip().replace("$seed", "0"))
    return [line for line in found if line and not line.startswith("#")]


def run_python(*arguments: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env={**ENV, **env}, capture_output=True, text=True, timeout=240)


def some(pages: list[str], found) -> list[str]:
    kept = [page for page in pages if found(page)]
    assert kept
    return kept


@pytest.mark.parametrize("page", some(PAGES, lambda page: blocks(page, "python")))
def test_python_code_runs(page, tmp_path):
    program = tmp_path / "page.py"
    program.write_text("\n".join(blocks(page, "python")))
    done = run_python(str(program), cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr


# ---- commands


@pytest.fixture
def configs(monkeypatch):
    """What each command of the CLI would have run."""
    seen = []
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)
    for command in cli._COMMANDS.values():
        monkeypatch.setattr(importlib.import_module(command.module), command.function, seen.append)
    return seen


@pytest.mark.parametrize(
    "page", some(PAGES, lambda page: any(line.startswith("crosspoint ") for line in shell_lines(page)))
)
def test_crosspoint_commands_parse(page, configs, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for line in shell_lines(page):
        program, *arguments = shlex.split(line)
        if program == "crosspoint":
            assert cli.main(arguments) == 0, f"{line}\n{capsys.readouterr().err}"


def test_crosspoint_commands_in_sentences_exist(capsys):
    seen = 0
    for page in PAGES:
        for span in spans(page):
            words = span.split()
            if words[0] != "crosspoint" or len(words) == 1 or words[1].isupper() or words[1].startswith("-"):
                continue
            name, rest = cli._split(words[1:])
            group = any(command.startswith(f"{words[1]} ") for command in cli._COMMANDS)
            assert name is not None or group, f"{page}: {span}"
            with suppress(SystemExit):
                cli.main([*(name or words[1]).split(), "--help"])
            options = capsys.readouterr().out + "--config --traceback --help"
            for word in rest:
                assert not word.startswith("--") or word.partition("=")[0] in options, f"{page}: {span}"
            seen += 1
    assert seen > 5


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = [
        (page, match[1])
        for page in PAGES
        for text in [*spans(page), *shell_lines(page)]
        for match in [re.match(r"make ([a-z-]+)$", text)]
        if match
    ]
    assert len(named) > 3
    for page, target in named:
        assert target in targets, f"{page}: make {target}"


def test_modules_run_as_programs_know_their_options():
    helps: dict[str, str] = {}
    commands = [
        line for page in PAGES for line in shell_lines(page) if line.startswith("python -m benchmarks.")
    ]
    assert commands
    for line in commands:
        _, _, module, *arguments = shlex.split(line)
        if module not in helps:
            helps[module] = run_python("-m", module, "--help").stdout
        assert helps[module], line
        for word in arguments:
            assert not word.startswith("--") or word in helps[module], line


# ---- tolerances


@pytest.mark.parametrize(
    "op", ["knn", "edge_conv", "edge_conv2", "conv_bn_act_pool", "neighbours", "nt_xent"]
)
def test_tolerances_are_those_of_the_battery(op):
    rows = re.findall(
        r"^\| (float\d+|bfloat16) \| ([\d.e-]+) \|$", text_of(f"docs/derivations/{op}.md"), re.M
    )
    assert {getattr(torch, dtype): float(value) for dtype, value in rows} == testing.TOLERANCE


def test_tie_tolerance_is_the_one_that_graphs_are_compared_with():
    rows = re.findall(r"^\| (\w+) \| \(C \+ 2\) 2\^-(\d+) \|$", text_of("docs/derivations/knn.md"), re.M)
    assert [name for name, _ in rows] == ["float64", "others"]
    for name, bits in rows:
        for dtype in [torch.float64] if name == "float64" else [torch.float32, torch.float16, torch.bfloat16]:
            for channels in (1, 3, 64):
                assert testing.tie_tolerance(channels, dtype) == (channels + 2) * 2.0 ** -int(bits)


# ---- errors

CALL = """
import torch
from crosspoint import ops
ops.knn_graph(torch.zeros(1, 2, 3), 1, impl="native")
"""


def setup_in_a_copy(folder: Path, **env: str) -> str:
    """What building says in a copy of the tree, in which nothing has been built yet."""
    source = folder / "source"
    for name in ("csrc", "crosspoint", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    return run_python("setup.py", "-q", "build_ext", cwd=source, **env).stderr


def without(module: str, folder: Path) -> str:
    """A folder that hides `module` when it is on PYTHONPATH."""
    (folder / module).mkdir()
    (folder / module / "__init__.py").write_text("raise ImportError('hidden by the test', name=__name__)\n")
    return str(folder)


def no_torch(folder):
    return setup_in_a_copy(folder, PYTHONPATH=without("torch", folder))


def no_compiler(folder):
    return setup_in_a_copy(folder, CC="gcc-absent", CXX="g++-absent")


def no_cuda(folder):
    return setup_in_a_copy(folder, CROSSPOINT_CUDA="1")


def no_library(folder):
    return run_python("-c", CALL, CROSSPOINT_LIBRARY=str(folder / "libcrosspoint_ops.so")).stderr


def broken_library(folder):
    (folder / "libcrosspoint_ops.so").write_text("not a library")
    return run_python("-c", CALL, CROSSPOINT_LIBRARY=str(folder / "libcrosspoint_ops.so")).stderr


def no_cuda_kernels(folder):
    code = "from crosspoint.ops import _dispatch; print(_dispatch._why_not_native(('cpu_variant',), 'cuda'))"
    return run_python("-c", code).stdout


def unknown_instruction_set(folder):
    return run_python("-c", CALL, CROSSPOINT_CPU="sse9").stderr


def missing_extra(folder):
    return run_python("-m", "crosspoint", "demo", PYTHONPATH=without("tyro", folder)).stderr


CAUSES = [
    no_torch,
    no_compiler,
    no_cuda,
    no_library,
    broken_library,
    no_cuda_kernels,
    unknown_instruction_set,
    missing_extra,
]


def quoted_errors() -> list[str]:
    return [block.strip() for block in blocks("docs/install.md", "text")]


def test_every_quoted_error_has_its_cause_here():
    assert len(quoted_errors()) == len(CAUSES)


@pytest.mark.parametrize(("cause", "quoted"), list(zip(CAUSES, quoted_errors(), strict=False)))
def test_quoted_error_is_the_real_one(cause, quoted, tmp_path):
    if cause is no_cuda and torch.version.cuda is not None:
        pytest.skip("this torch has CUDA, so the build goes on")
    said = " ".join(cause(tmp_path).split())
    pattern = ".*".join(re.escape(" ".join(part.split())) for part in quoted.split("..."))
    assert re.search(pattern, said), said


# ---- the site


def test_links_of_moved_pages_lead_to_the_site(docs_hooks):
    text = "[a](docs/design.md) ![b](docs/images/b.jpg) [c](CONTRIBUTING.md) [d](https://example.org/docs/x)"
    expected = "[a](design.md) ![b](images/b.jpg) [c](contributing.md) [d](https://example.org/docs/x)"
    assert docs_hooks.for_site(text) == expected


@pytest.mark.parametrize(
    ("tag", "remote"),
    [
        ('<script src="https://cdn.example.org/x.js">', True),
        ('<img alt="" src="//example.org/x.png">', True),
        ('<link rel="stylesheet" href="https://example.org/x.css">', True),
        ('<link rel="canonical" href="https://example.org/">', False),
        ('<link rel="stylesheet" href="assets/x.css">', False),
        ('<img src="images/x.png">', False),
        ('<a href="https://example.org">', False),
    ],
)
def test_pages_that_need_the_network_are_found(docs_hooks, tag, remote):
    assert bool(docs_hooks.fetched_from_network(f"<p>text {tag} more</p>")) == remote
