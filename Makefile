# Entry points of a checkout. Everything is installed in .venv/; nothing outside the checkout is touched.
#
#   PYTHON=python3.12   the interpreter (3.10 or newer) that .venv is made with
#   TORCH=torch==2.13.0 what to install where .venv has no torch yet; a torch that is there stays
#   COSMOS_NATIVE, COSMOS_CUDA = AUTO | ON | OFF   see setup.py

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$p && break; done)
TORCH ?= torch==2.13.0
COSMOS_NATIVE ?= AUTO
COSMOS_CUDA ?= AUTO
export COSMOS_NATIVE COSMOS_CUDA

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed-$(COSMOS_NATIVE)-$(COSMOS_CUDA)

.PHONY: help setup demo test lint bench gpu-check clean
.DELETE_ON_ERROR:

help:
	@echo "make setup      install everything in .venv/ (a few minutes the first time)"
	@echo "make demo       train a small COSMOS model on generated data, report in runs/demo/"
	@echo "make test       all tests"
	@echo "make lint       ruff and mypy"
	@echo "make bench      benchmarks of this machine"
	@echo "make gpu-check  correctness and speed of the CUDA code; needs a GPU, nvcc and torch, no .venv"

setup: $(STAMP)

$(BIN)/python:
	@test -n "$(PYTHON)" && $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "error: no Python 3.10 or newer found; install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; \
	  exit 2; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "error: $(PYTHON) cannot make virtual environments (Debian, Ubuntu: apt install python3-venv)" >&2; exit 2; }

$(STAMP): pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*) | $(BIN)/python
	@rm -f $(VENV)/.installed-*
	@$(BIN)/python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' \
	  || { set -x; $(PIP) install "$(TORCH)"; }
	$(PIP) install -e '.[dev]'
	@$(BIN)/python -c 'from cosmos_kernels import native; \
	  [print(f"native {k} library:", native.why_missing(k) or "built and loaded") for k in native.LIBRARIES]'
	@touch $@

demo: setup
	$(BIN)/cosmos-fast data synth --out data/demo --train 8000 --heldout 500 --seed 0
	$(BIN)/cosmos-fast train --recipe demo --resume
	$(BIN)/cosmos-fast train --recipe demo_clip --resume
	$(BIN)/cosmos-fast eval report --cosmos runs/demo/cosmos --clip runs/demo/clip --data data/demo/heldout --out runs/demo \
	  --require-chance-multiple 50

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m benchmarks

gpu-check:
	PYTHONPATH=.:kernels $(PYTHON) benchmarks/gpu_check.py

clean:
	rm -rf $(VENV) build dist *.egg-info kernels/cosmos_kernels/_lib
