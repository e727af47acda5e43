# Everything runs in .venv, which the first command makes; nothing needs an activated environment.
#   make train ARGS="agent=flashsac env=hopper"     make test     make test-all     make lint     make format
#   TORCH_INDEX=https://download.pytorch.org/whl/cpu   the small CPU build of torch (PyPI's own on Linux is the CUDA build)
#   PYTHON=/path/to/python3.11                         another interpreter
# Both are read when .venv is made: `make clean` first to change them.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

ARGS ?= agent=flashsac env=humanoid
TORCH_INDEX ?=
PYTHON ?=
JOBS ?= 2

comma := ,
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := rlplastic tests benchmarks examples docs
INDEX := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
# One thread per test worker: the workers already fill the cores. The caller's PYTHONPATH must not shadow .venv.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal
SUPPORTED := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 13))
unexport PYTHONPATH PYTHONHOME

.PHONY: help install train test test-all coverage docs lint typecheck format clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

install: $(STAMP) ## make .venv and install everything; instant when nothing changed

$(STAMP): pyproject.toml constraints.txt
	@found=""; for python in $(if $(PYTHON),"$(PYTHON)",python3 python3.11 python3.12); do \
	  if "$$python" -c '$(SUPPORTED)' >/dev/null 2>&1; then found="$$python"; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "rlplastic needs Python 3.11 or 3.12 with its venv module$(if $(PYTHON),$(comma) and PYTHON=$(PYTHON) is not that):" \
	    "on Debian or Ubuntu run 'apt install python3 python3-venv', or name an interpreter with PYTHON=…" >&2; exit 1; \
	fi; \
	[ -x $(BIN)/python ] || "$$found" -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check $(INDEX) -c constraints.txt -e ".[dev,docs,export,video,kernels]"
	@touch $@

train: $(STAMP) ## train; choose with ARGS="agent=flashsac env=hopper seed=1"
	$(BIN)/python -m rlplastic.train $(ARGS)

test: lint typecheck ## the gate: lint, types and every test that is not slow
	$(PYTEST) -m "not slow"

test-all: lint typecheck ## the gate and the slow tests
	$(PYTEST)

coverage: $(STAMP) ## which lines of rlplastic the tests run
	OMP_NUM_THREADS=1 $(BIN)/python -m coverage run -m pytest -m "not slow"
	$(BIN)/python -m coverage combine
	$(BIN)/python -m coverage report

docs: $(STAMP) ## the documentation as a site, in build/site; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet --config-file docs/site/mkdocs.yml

lint: $(STAMP) ## style and formatting
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

typecheck: $(STAMP) ## mypy --strict on the package
	$(BIN)/mypy

format: $(STAMP) ## repair what ruff can repair
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

clean: ## remove .venv, caches and builds; runs stay
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage .coverage.*
	find $(SOURCES) -type d -name __pycache__ -prune -exec rm -rf {} +
