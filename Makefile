# `make demo` and `make test` do everything on a fresh machine with git, Python >= 3.10, make and a C++17 compiler.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
OUT ?= runs/demo
MINUTES ?= 14
comma := ,
# The part of the operators' battery that compares values.
VALUES := matches_reference and (float32 or float64) or repeatable
# The part of it that interprets Triton kernels in a few minutes.
INTERPRETED := forward and not float16 or gradients and float32 and not TestKnnGraph or gradcheck or opcheck or compiles and static \
  or strides or asked_for or zero_gradient or not_finite or padding or far_offsets
# Of the tests beside the battery of the contrastive losses.
CONTRAST := contrast_precision or half_types or parts_make and 0.2 or visit and 0.2 or tiny or adds_up_too or ring or triton_equals
# Of edge_conv2's, whose tiles are thousands of small steps to it, one precision a question.
INTERPRETED_TILES := gradients and float32 and not (t_net or part_seg or wide_to_narrow or many_neighbours_some or missing_edges_) \
  or forward and bfloat16 and (training or ragged) or forward and float64 and (sizes_off or lattice or nan) or strides or asked_for \
  or gamma2_zero and training

.PHONY: help install build demo test measured variants interpret sanitize wheel oldest-torch docs cpp cpp-sanitize arm64 lint clean

help:
	@echo "make demo   install, build, then generate shapes, pre-train, evaluate and report under $(OUT)"
	@echo "make test   install, build, then run the test suite"
	@echo "make variants, make interpret, make sanitize, make wheel, make oldest-torch"
	@echo "            run the operators' battery on AVX2 and baseline, on a sanitized build, on the built wheel, under"
	@echo "            the oldest torch supported (a download of 530 MB)"
	@echo "make measured MACHINE=name"
	@echo "            measure this machine, which should do nothing else, in 14 minutes (MINUTES=): benchmarks/results/name, and"
	@echo "            docs/performance/measured.md of all results"
	@echo "make docs   build the documentation site into build/site"
	@echo "make cpp, make cpp-sanitize, make arm64"
	@echo "            build the C++ library and run its tests: on every instruction set, under the sanitizers, on arm64 in qemu"
	@echo "make lint   check style"
	@echo "make clean  remove what was built"

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt torch numpy pybind11 setuptools wheel
	CROSSPOINT_BUILD=0 $(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	$(PIP) install --quiet --constraint constraints.txt --no-deps lightly  # its torchvision would fix another torch
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
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q tests/ops/test_knn.py tests/ops/test_edge_conv.py tests/ops/test_gather_max.py \
	  tests/ops/test_neighbor_sum.py tests/ops/test_conv_bn_act_pool.py -k "triton and ($(INTERPRETED))"
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q tests/ops/test_nt_xent.py tests/ops/test_sup_con.py tests/ops/test_contrast_rows.py \
	  tests/ops/test_contrast_precision.py tests/distributed -k "triton and ($(INTERPRETED) or $(CONTRAST))"
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q tests/ops/test_edge_conv2.py -k "triton and ($(INTERPRETED_TILES))"

# The widest instruction set that this processor runs. `make cpp-sanitize` sanitizes the others' kernels.
WIDEST = $(shell $(BIN)/python -c "from crosspoint.ops import _library; print(_library.cpu_variant())")

# The operators' battery on kernels built with the address and undefined-behaviour sanitizers.
sanitize: build
	CROSSPOINT_ONLY=$(WIDEST) CROSSPOINT_SANITIZE=address,undefined \
	  $(BIN)/python setup.py --quiet build_ext --build-lib build/sanitized
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 CROSSPOINT_LIBRARY=build/sanitized/crosspoint/ops/libcrosspoint_ops.so \
	$(BIN)/python -m pytest -q tests/ops -k "$(VALUES) or bad_input"

# The built wheel, in a fresh venv that holds nothing but torch, numpy and the test tools.
wheel: install
	scripts/check_wheel.sh $(PYTHON) $(BIN)/python

# The library built here, loaded under the oldest torch; and the CUDA route, built against that torch.
oldest-torch: build
	scripts/check_oldest_torch.sh $(PYTHON)

measured: build
	@test -n "$(MACHINE)" || { echo "make measured MACHINE=name: which machine is this?"; exit 1; }
	status=0; $(BIN)/python -m benchmarks.suite --no-report --minutes $(MINUTES) --out benchmarks/results/$(MACHINE) || status=$$?; \
	$(BIN)/python -m benchmarks.report benchmarks/results/* --out docs/performance/measured.md && exit $$status

# Warnings (broken links, names that resolve to nothing) are errors.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# The C++ library and its tests; build/cmake/release is where tests/test_cmake.py builds too.
CTEST = $(BIN)/ctest --output-on-failure --parallel $(or $(MAX_JOBS),2) --test-dir
define cpp
	$(BIN)/cmake -S . -B build/cmake/$(1) -DCROSSPOINT_BUILD_TESTS=ON $(2) > /dev/null
	$(BIN)/cmake --build build/cmake/$(1) --parallel $(or $(MAX_JOBS),2)
	$(CTEST) build/cmake/$(1)
endef

cpp: install
	$(call cpp,release)

cpp-sanitize: build
	$(call cpp,asan,-DCROSSPOINT_SANITIZE=address$(comma)undefined)
	$(call cpp,tsan,-DCROSSPOINT_SANITIZE=thread -DCROSSPOINT_ONLY=$(WIDEST))

arm64: install
	@{ command -v aarch64-linux-gnu-g++ && command -v qemu-aarch64; } > /dev/null || { echo "make arm64 needs a cross compiler and" \
	  "an emulator: apt-get install g++-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user"; exit 1; }
	$(call cpp,arm64,-DCMAKE_TOOLCHAIN_FILE=$(CURDIR)/csrc/cmake/aarch64-linux-gnu.cmake)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf build dist *.egg-info crosspoint/*.so crosspoint/ops/*.so
