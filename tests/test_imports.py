"""What importing costs and what may import what."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import crosspoint
import crosspoint.kernels

PACKAGE = Path(crosspoint.__file__).parent
BASE_INSTALL = {"torch", "numpy"}
# layer -> the other layers that it may import; private modules at the top (crosspoint._*) are open to all
LAYERS = {
    "ops": {"kernels"},
    "nn": {"ops"},
    "interop": {"nn", "ops"},
    "models": {"nn", "ops"},
    "data": set(),
    "train": {"models", "data"},
    "evaluate": {"train", "models", "data"},
}


def imports(tree: ast.AST) -> set[str]:
    """Dotted names of the modules imported anywhere below `tree`."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used here"
            names.add(node.module)
            if node.module == "crosspoint":
                names |= {f"crosspoint.{alias.name}" for alias in node.names}
    return names


def at_import_time(tree: ast.Module) -> list[ast.stmt]:
    """The statements that run when the module is imported, functions and type-checking blocks left out."""
    found, queue = [], list(tree.body)
    while queue:
        node = queue.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.append(node)
        queue += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
    return found


def sources(layer: str) -> list[Path]:
    return sorted((PACKAGE / layer).rglob("*.py"))


def allowed(name: str, layers: set[str]) -> bool:
    parts = name.split(".")
    return parts[0] != "crosspoint" or len(parts) == 1 or parts[1].startswith("_") or parts[1] in layers


@pytest.mark.parametrize("layer", LAYERS)
def test_dependencies_point_one_way(layer):
    assert sources(layer)
    for path in sources(layer):
        for name in imports(ast.parse(path.read_text())):
            assert allowed(name, {layer, *LAYERS[layer]}), (
                f"{path.relative_to(PACKAGE)} imports {name}, which layer {layer} may not"
            )


def test_kernels_import_torch_and_triton_only():
    paths = sorted(Path(crosspoint.kernels.__file__).parent.glob("*.py"))
    assert len(paths) > 1
    for path in paths:
        for name in imports(ast.parse(path.read_text())):
            top = name.partition(".")[0]
            assert top in {*sys.stdlib_module_names, "torch", "triton"} or name.startswith(
                "crosspoint.kernels"
            ), f"kernels/{path.name} imports {name}"


def test_private_modules_import_no_layer():
    private = sorted(PACKAGE.glob("_[a-z]*.py"))
    assert private
    for path in private:
        for name in imports(ast.parse(path.read_text())):
            assert allowed(name, set()), f"{path.name} imports {name}, but every layer imports {path.name}"


def test_the_numpy_module_imports_no_layer():
    for name in imports(ast.parse((PACKAGE / "numpy.py").read_text())):
        assert allowed(name, set()), f"numpy.py imports {name}, but it must run without torch"


def test_modules_import_only_the_base_install():
    for path in sorted(set(PACKAGE.rglob("*.py")) - set(sources("kernels"))):
        for node in at_import_time(ast.parse(path.read_text())):
            for name in imports(node):
                top = name.partition(".")[0]
                allowed = top in sys.stdlib_module_names or top in BASE_INSTALL or top == "crosspoint"
                assert allowed, f"{path.relative_to(PACKAGE)} imports {name} at import time"


def run_python(code: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, timeout=120
    )


def test_importing_everything_is_silent_and_light():
    code = """
import importlib, sys
interop = ["dgcnn", "lightly", "pointcept", "pyg", "pytorch3d", "pytorch_metric_learning"]
interop = [f"interop.{name}" for name in interop]
for name in ("ops", "nn", "models", "data", "train", "evaluate", "testing", "cli", "kernels", *interop):
    importlib.import_module("crosspoint." + name)
heavy = {"triton", "sklearn", "trimesh", "h5py", "matplotlib", "tensorboard", "tyro", "kornia", "safetensors"}
heavy |= {"torch_geometric", "pytorch_metric_learning", "lightly"}
raise SystemExit(f"imported {sorted(heavy & set(sys.modules))}" if heavy & set(sys.modules) else 0)
"""
    done = run_python(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_op_runs_without_the_compiled_library():
    code = """
import torch
from crosspoint import ops
assert all("CROSSPOINT_NATIVE=0" in row.why for row in ops.describe_backends() if row.backend == "native")
x = torch.randn(2, 20, 3, requires_grad=True)
idx = ops.knn_graph(x, 4)
y = ops.edge_conv(x, idx, torch.randn(8, 6), torch.ones(8), torch.zeros(8), training=True)
(ops.nt_xent(y[:, 0], y[:, 1]) + ops.info_nce(y[:, 0], y[:, 1]) + ops.knn(x, x, 3)[0].sum()).backward()
assert x.grad.isfinite().all()
try:
    ops.knn_graph(x, 4, impl="native")
except RuntimeError as error:
    assert "CROSSPOINT_NATIVE=0" in str(error), error
else:
    raise SystemExit("impl='native' ran without the native library")
"""
    done = run_python(code, CROSSPOINT_NATIVE="0")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["h5py", "trimesh", "sklearn"])
def test_missing_extra_is_named(module, monkeypatch):
    from crosspoint._optional import require

    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"pip install 'crosspoint\[eval\]'"):
        require(module, extra="eval")


def test_crosspoint_itself_imports_no_torch():
    done = run_python(
        "import sys, crosspoint; assert 'torch' not in sys.modules; crosspoint.explain; assert 'torch' in sys.modules"
    )
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        crosspoint.nothing  # noqa: B018
