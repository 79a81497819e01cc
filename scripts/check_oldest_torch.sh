#!/usr/bin/env bash
# Loads the operator library that was built against the pinned torch under the oldest supported one and runs the battery
# there; then builds the library anew against that torch, with its CUDA kernels where it has CUDA and nvcc is here.
#   scripts/check_oldest_torch.sh PYTHON
set -euo pipefail
cd "$(dirname "$0")/.."
oldest=2.11.0
venv=build/torch-$oldest
if [ ! -e "$venv/ready" ]; then
  "$1" -m venv "$venv"
  # Without torch's own list of packages: most of it is CUDA libraries, of gigabytes.
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "torch==$oldest"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
    typing-extensions sympy networkx jinja2 fsspec filelock numpy wheel pybind11 'setuptools>=77' \
    pytest pytest-timeout hypothesis 2> >(grep -v "^torch $oldest requires\|dependency resolver" >&2)
  torch=$("$venv/bin/python" -c "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])")
  python3 scripts/stub_cuda_libraries.py "$torch" "$venv/stubs"
  touch "$venv/ready"
fi
export LD_LIBRARY_PATH=$PWD/$venv/stubs
python=$venv/bin/python
values="(matches_reference and float32) or repeatable"

"$python" -c "import torch; print('the library built here under torch', torch.__version__)"
"$python" -m pytest -q tests/ops -k "$values"

if "$python" -c "import torch, sys; sys.exit(torch.version.cuda is None)" && command -v nvcc > /dev/null; then
  echo "building against torch $oldest with CUDA"
  CROSSPOINT_CUDA=1 TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-9.0+PTX}" \
    "$python" setup.py --quiet build_ext --build-lib build/oldest
  CROSSPOINT_LIBRARY=build/oldest/crosspoint/ops/libcrosspoint_ops.so "$python" - <<'PYTHON'
from crosspoint.ops import _library, describe_backends

assert _library.load_error is None, _library.load_error
print(_library.build_info())
assert "CUDA kernels: CUDA" in _library.build_info()
usable = [row.op for row in describe_backends() if (row.backend, row.device) == ("native", "cuda") and row.usable]
print("native CUDA operators:", *usable)
assert "knn_graph" in usable
PYTHON
fi
