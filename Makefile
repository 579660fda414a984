# `make demo` and `make test` work on a fresh machine: they need only make and Python 3.11 or newer.
# Variables: PYTHON (interpreter that makes the environment), VENV (where it stands).

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV ?= .venv
BIN := $(VENV)/bin
# One BLAS thread: the kernels under test use none, and the test processes share the cores.
export OMP_NUM_THREADS ?= 1

.PHONY: help demo test bench bench-planner bench-learning bench-runtime check-c lint style types imports clean
.DEFAULT_GOAL := help

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 20

demo: $(VENV)/.board ## set up, plan the bundled model into out/, replay the plan, run its C on an emulated board
	$(BIN)/odt-plan examples/digits_cnn.onnx --ram 320KB --flash 1MB --emit c,svg,html -o out/
	$(BIN)/odt-plan verify out/plan.json
	$(BIN)/python examples/on_board.py out/ examples/digits.npz

test: $(VENV)/.test ## set up, then run the tests
	$(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

bench: $(VENV)/.test ## solve times, gaps, peaks and instruction counts into benchmarks/RESULTS.md
	$(BIN)/python -m benchmarks

bench-runtime: $(VENV)/.test ## a training step in NumPy and in C on this machine against PyTorch
	$(BIN)/python -m benchmarks.runtime

bench-planner: $(VENV)/.test ## addresses (ODT_PLAN_LAYOUT_INSTANCES, own plans), schedules against other planners, ten RAM budgets, curves
	$(BIN)/python -m benchmarks.layout
	$(BIN)/python -m benchmarks.peers
	$(BIN)/python -m benchmarks.rivals
	$(BIN)/python -m benchmarks.budgets
	$(BIN)/python -m benchmarks.sweeps
	$(BIN)/python -m benchmarks.activation_budget

bench-learning: $(VENV)/.test ## what plans learn on real data, by update set, budget and measure of importance
	$(BIN)/python -m benchmarks.learning
	$(BIN)/python -m benchmarks.lora

check-c: $(VENV)/.test ## the C of five models: gcc, clang, zig, C++, sanitizers, valgrind, cppcheck with MISRA, five cores, stack
	$(BIN)/python -m benchmarks.portable_c

lint: style types imports ## ruff, mypy strict, import contracts
style: $(VENV)/.lint
	$(BIN)/ruff check .
types: $(VENV)/.lint
	$(BIN)/mypy
imports: $(VENV)/.lint
	$(BIN)/lint-imports

clean: ## remove the environment and everything generated
	rm -rf $(VENV) build dist out .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer found; install one, or: make PYTHON=/path/to/python3" >&2; exit 1; }
	@# Debian ships venv without ensurepip: then virtualenv or uv do the same job.
	@$(PYTHON) -m venv $(VENV) 2>/dev/null || { rm -rf $(VENV); \
	  $(PYTHON) -m virtualenv -q $(VENV) 2>/dev/null || uv venv -q --seed -p $(PYTHON) $(VENV) 2>/dev/null || \
	  { echo "error: $(PYTHON) can't make an environment; install python3-venv (apt) or virtualenv (pip)" >&2; exit 1; }; }

# Half of an installation is compiling modules that the demo never imports.
$(VENV)/.board: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-compile -e .[board]
	@touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -e .[test]
	@touch $@ $(VENV)/.board

$(VENV)/.lint: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -e .[test,dev]
	@touch $@ $(VENV)/.test $(VENV)/.board
