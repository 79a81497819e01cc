#!/usr/bin/env bash
# Builds sdist and wheel, installs the wheel into a fresh venv and runs the operators' battery against it.
#   scripts/check_wheel.sh PYTHON BUILD_PYTHON      (BUILD_PYTHON has torch and setuptools)
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
python=$1
build_python=$root/$2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$build_python" -c "
from setuptools import build_meta
build_meta.build_sdist('$work')
"
mkdir "$work/source"
tar -xzf "$work"/crosspoint-*.tar.gz -C "$work/source" --strip-components 1
for path in CMakeLists.txt csrc/cmake/crosspoint-config.cmake.in csrc/python_module.cpp tests/cpp/example/main.cpp; do
  test -f "$work/source/$path" || { echo "the sdist has no $path"; exit 1; }
done
(cd "$work/source" && "$build_python" -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir "$work" .)

"$python" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
  torch numpy pytest pytest-timeout hypothesis "$work"/crosspoint-*.whl
cp -r tests pyproject.toml "$work/"
cd "$work"
"$work/venv/bin/python" -c "
import crosspoint.ops as ops, pathlib
assert pathlib.Path(ops.__file__).is_relative_to('$work/venv'), ops.__file__
native = [row for row in ops.describe_backends() if (row.backend, row.device) == ('native', 'cpu')]
assert native and all(row.usable for row in native), native
"
"$work/venv/bin/crosspoint" info
"$work/venv/bin/python" -m pytest -q -o pythonpath=tests/ops tests/ops -k "matches_reference and float32"
"$work/venv/bin/python" -m pytest -q tests/test_numpy.py
