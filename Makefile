# `make help` lists the targets. Everything runs in .venv, which is made on the first need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Two test processes of one thread each: the suite is made of many small models, which more threads only slow down.
TEST_PROCESSES ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_PROCESSES)
BY_FILE := --dist loadfile --no-loadscope-reorder
EVENLY := --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-gpu bench-gpu check format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## make .venv with everything in it (7 GB: torch brings CUDA)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { $(PYTHON) --version; echo "fat_train needs Python 3.11 or newer: make setup PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(READY) ## train a FAT on scanned digits, for real: about a minute on two cores
	$(BIN)/python -m fat_train experiment=digits resume=never overwrite=true

test: $(READY) ## all quick tests (under 10 minutes on two cores)
	$(PYTEST) $(BY_FILE) -m 'not slow and not gpu and not compile'
	JAXTYPING_DISABLE=1 $(PYTEST) $(EVENLY) -m 'compile and not slow and not gpu'

test-slow: $(READY) ## the tests that take longer
	$(PYTEST) $(BY_FILE) -m 'slow and not compile and not gpu'
	JAXTYPING_DISABLE=1 $(PYTEST) $(EVENLY) -m 'slow and compile and not gpu'

test-gpu: $(READY) ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m 'gpu and not compile'
	JAXTYPING_DISABLE=1 $(BIN)/python -m pytest -m 'gpu and compile'

bench-gpu: $(READY) ## on a machine with a GPU: its tests and every benchmark, appended to docs/log.md
	@$(BIN)/python -m fat_train benchmark all tests=tests log=docs/log.md

check: $(READY) ## lint, types, import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY) ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv and caches, never runs/
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .import_linter_cache build dist
