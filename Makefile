# `make demo` and `make test` do everything on a fresh machine with git, Python >= 3.10, make and a C++17 compiler.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
OUT ?= runs/demo

.PHONY: help install build demo test lint clean

help:
	@echo "make demo   install, build, then generate shapes, pre-train, evaluate and report under $(OUT)"
	@echo "make test   install, build, then run the test suite"
	@echo "make lint   check style"
	@echo "make clean  remove what was built"

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt torch numpy setuptools wheel
	CROSSPOINT_BUILD=0 $(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	touch $@

install: $(VENV)/installed

build: install
	$(BIN)/python setup.py --quiet build_ext --inplace

demo: build
	$(BIN)/crosspoint demo --out $(OUT)

test: build
	$(BIN)/python -m pytest --durations=10

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf build dist *.egg-info crosspoint/ops/*.so
