# Entry points of a checkout. Everything is installed in .venv/; nothing outside the checkout is touched.
#
#   PYTHON=python3.12   the interpreter (3.10 or newer) that .venv is made with
#   TORCH=torch==2.13.0 what to install where .venv has no torch yet; a torch that is there stays
#   COSMOS_NATIVE, COSMOS_CUDA = AUTO | ON | OFF   see setup.py
#   OUT=folder          where gpu-check leaves its one JSON and one archive, instead of the results folder
#   PART=tests          one part of gpu-check, for a check in several calls: tests, bench or sweeps

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$p && break; done)
TORCH ?= torch==2.13.0
COSMOS_NATIVE ?= AUTO
COSMOS_CUDA ?= AUTO
export COSMOS_NATIVE COSMOS_CUDA

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# One stamp for the package alone, one for what its tests and benchmarks need on top (Triton and DALI among it: 450 MB).
CORE := $(VENV)/.installed-core-$(COSMOS_NATIVE)-$(COSMOS_CUDA)
DEV := $(VENV)/.installed-dev-$(COSMOS_NATIVE)-$(COSMOS_CUDA)
SOURCES := pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*.*)

.PHONY: help setup demo demo-ranks test lint bench kernel-resources gpu-check clean
.DELETE_ON_ERROR:

help:
	@echo "make setup      install everything in .venv/ (a few minutes the first time)"
	@echo "make demo       train a small COSMOS model on generated data, report in runs/demo/"
	@echo "make demo-ranks the same COSMOS model on two ranks, by DeepSpeed; on CPUs"
	@echo "make test       all tests"
	@echo "make lint       ruff and mypy"
	@echo "make bench      benchmarks of this machine"
	@echo "make gpu-check  correctness and speed of the GPU code; needs a GPU, nvcc and torch, no .venv"
	@echo "make kernel-resources  registers and spills of every kernel, into docs/; needs no GPU"

setup: $(DEV)

$(BIN)/python:
	@test -n "$(PYTHON)" && $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "error: no Python 3.10 or newer found; install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; \
	  exit 2; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "error: $(PYTHON) cannot make virtual environments (Debian, Ubuntu: apt install python3-venv)" >&2; exit 2; }

# $(1): what to install. The stamps of other switches go: their libraries are gone too.
define install
@rm -f $(VENV)/.installed-*
@$(BIN)/python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' \
  || { set -x; $(PIP) install "$(TORCH)"; }
$(PIP) install -e '$(1)'
@$(BIN)/python -c 'from cosmos_kernels import native; \
  [print(f"native {k} library:", native.why_missing(k) or "built and loaded") for k in native.LIBRARIES]'
endef

$(CORE): $(SOURCES) | $(BIN)/python
	$(call install,.)
	@touch $(CORE)

$(DEV): $(SOURCES) | $(BIN)/python
	$(call install,.[dev])
	@touch $(CORE) $(DEV)

demo: $(CORE)
	$(BIN)/cosmos-fast data synth --out data/demo --train 8000 --heldout 500 --seed 0
	$(BIN)/cosmos-fast train --recipe demo --resume
	$(BIN)/cosmos-fast train --recipe demo_clip --resume
	$(BIN)/cosmos-fast eval report --cosmos runs/demo/cosmos --clip runs/demo/clip --data data/demo/heldout --out runs/demo \
	  --segmentation-samples 250 --require-chance-multiple 50

# The same samples a step as `demo`: what comes out is the same, up to rounding.
demo-ranks: $(DEV)
	$(BIN)/cosmos-fast data synth --out data/demo --train 8000 --heldout 500 --seed 0
	DS_ACCELERATOR=cpu PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/deepspeed --num_gpus 2 --module cosmos_fast.cli.train \
	  --recipe demo --set name=cosmos_ranks --set run.batch_size=32 --set run.device=cpu --resume

test: $(DEV)
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(DEV)
	$(BIN)/python -m benchmarks

kernel-resources: $(DEV)
	$(BIN)/python -m tests.kernels.resources --write

gpu-check:
	PYTHONPATH=.:kernels:$(PYTHONPATH) $(PYTHON) benchmarks/gpu_check.py $(if $(PART),--only $(PART)) $(if $(OUT),--out "$(OUT)")

clean:
	rm -rf $(VENV) build dist *.egg-info kernels/cosmos_kernels/_lib
