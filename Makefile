# Every check runs through here: CI (.ci/run) and pre-commit call these same targets.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-full parity lint ruff format-check types imports format notebooks gpu-check schema clean

help:  ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP)  ## Create .venv with the tested versions (PYTHON=... picks the interpreter)

# constraints.txt pins torch, so no other package can pull in a newer one (and its gigabytes of CUDA).
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,notebooks]'
	@touch $@

demo: setup  ## The whole loop on this machine: profile, plan, simulate, run, validate
	$(BIN)/muxtune demo

# A worker more than a small machine has cores, since tests that start processes wait a third of their time. Long modules
# begin (tests/scheduling.py), so the order is kept. A debugger wants one process: make test ARGS="-n 0 ...".
test: setup  ## All tests but parity; ARGS go to pytest: make test ARGS="-m 'not slow'"
	$(BIN)/python -m pytest -n 3 --dist loadscope --no-loadscope-reorder $(ARGS)

test-full: export MUXTUNE_TESTS = full
test-full: test  ## The same with all instances of the planner's properties, of which test looks at some

parity: setup  ## The whole parity matrix, 756 runs against solo runs; takes an hour
	$(BIN)/python -m pytest -m parity $(ARGS) tests/integration/test_parity_matrix.py

lint: ruff format-check types imports  ## Rules, format, types, arrows between the rooms

ruff: setup
	$(BIN)/ruff check .

format-check: setup
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

imports: setup
	$(BIN)/lint-imports

format: setup  ## Mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# A cell may train for minutes, so the limit of a test does not apply; --nbmake-timeout bounds each cell.
notebooks: setup  ## Execute the notebooks
	@if ls notebooks/*.ipynb >/dev/null 2>&1; then \
	  $(BIN)/python -m pytest --nbmake --nbmake-timeout=600 --timeout=1800 notebooks; \
	else echo "no notebooks yet"; fi

gpu-check: setup  ## What can only be checked on a GPU; writes docs/gpu-report.md
	$(BIN)/python -m experiments.gpu.check --out docs/gpu-report.md

# By way of a temporary file, so that a failure leaves the old schema in place.
schema: setup  ## Renew docs/plan.schema.json
	@mkdir -p docs
	$(BIN)/muxtune plan --schema > docs/plan.schema.json.new
	mv docs/plan.schema.json.new docs/plan.schema.json

clean:  ## Remove .venv, caches and builds (not runs/)
	rm -rf $(VENV) build dist .benchmarks .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
