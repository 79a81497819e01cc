# `make demo` and `make test` do everything on a fresh machine with git, Python >= 3.10, make and a C++17 compiler.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
OUT ?= runs/demo
# The part of the operators' battery that compares values.
VALUES := matches_reference and (float32 or float64) or repeatable
# The part of it that interprets Triton kernels in a few minutes.
INTERPRETED := forward and not float16 or gradients and float32 and not TestKnnGraph or gradcheck or opcheck or compiles \
  or strides or asked_for or zero_gradient or not_finite or padding or far_offsets

.PHONY: help install build demo test variants interpret sanitize wheel oldest-torch docs lint clean

help:
	@echo "make demo   install, build, then generate shapes, pre-train, evaluate and report under $(OUT)"
	@echo "make test   install, build, then run the test suite"
	@echo "make variants, make interpret, make sanitize, make wheel, make oldest-torch"
	@echo "            run the operators' battery on AVX2 and baseline, on a sanitized build, on the built wheel, under"
	@echo "            the oldest torch supported (a download of 530 MB)"
	@echo "make docs   build the documentation site into build/site"
	@echo "make lint   check style"
	@echo "make clean  remove what was built"

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt torch numpy pybind11 setuptools wheel
	CROSSPOINT_BUILD=0 $(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	touch $@

install: $(VENV)/installed

build: install
	$(BIN)/python setup.py --quiet build_ext --inplace

demo: build
	$(BIN)/crosspoint demo --out $(OUT)

test: build
	$(BIN)/python -m pytest --durations=10

# The operators' battery on the lower instruction sets.
variants: build
	CROSSPOINT_CPU=avx2 $(BIN)/python -m pytest -q tests/ops -k "$(VALUES)"
	CROSSPOINT_CPU=baseline $(BIN)/python -m pytest -q tests/ops -k "$(VALUES)"

# The battery on the Triton kernels, interpreted: indices, masks and control flow, on a CPU. It says nothing of precision.
interpret: build
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q tests/ops/test_knn.py -k "triton-cpu and ($(INTERPRETED))"

# The operators' battery on kernels built with the address and undefined-behaviour sanitizers.
sanitize: install
	CROSSPOINT_SANITIZE=address,undefined $(BIN)/python setup.py --quiet build_ext --build-lib build/sanitized
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 CROSSPOINT_LIBRARY=build/sanitized/crosspoint/ops/libcrosspoint_ops.so \
	$(BIN)/python -m pytest -q tests/ops -k "$(VALUES) or bad_input"

# The built wheel, in a fresh venv that holds nothing but torch, numpy and the test tools.
wheel: install
	scripts/check_wheel.sh $(PYTHON) $(BIN)/python

# The library built here, loaded under the oldest torch; and the CUDA route, built against that torch.
oldest-torch: build
	scripts/check_oldest_torch.sh $(PYTHON)

# Warnings (broken links, names that resolve to nothing) are errors.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf build dist *.egg-info crosspoint/*.so crosspoint/ops/*.so
