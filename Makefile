# make demo | test | lint | test-gpu | bench      (each makes .venv first; PYTHON=... picks the interpreter)
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: help demo test lint format test-gpu bench clean
help:            ## what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

# The environment is made anew when what it is made from changes.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "flash-gsa needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@# CUDA builds of torch bring their Triton; for the interpreter tests any will do, and the CPU build has none.
	@$(BIN)/python -c 'import triton' 2>/dev/null || \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check 'triton==3.9.0'
	@touch $@

demo: $(VENV)/.installed   ## train a small GSA language model on Python's standard library, then use it
	$(BIN)/flash-gsa demo

test: $(VENV)/.installed   ## every test that needs no GPU
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not gpu"

lint: $(VENV)/.installed   ## ruff (lint, format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed   ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-gpu: $(VENV)/.installed   ## everything that needs a CUDA device; writes benchmarks/results/test_gpu.json
	$(BIN)/python -m pytest -m gpu -n $(or $(JOBS),4) --dist worksteal --record benchmarks/results/test_gpu.json

bench: $(VENV)/.installed   ## the operator on this machine's CPU: result, pictures, tables in the documents
	$(BIN)/flash-gsa bench op --device cpu --output benchmarks/results/op_cpu.json --plots docs/results
	$(BIN)/python -m benchmarks.render

clean:           ## remove the environment and caches (runs/ stays)
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
