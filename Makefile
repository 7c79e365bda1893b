# Two commands on a fresh Linux machine with Python ≥ 3.11:
#   make demo   sets everything up and runs the main job on the digits data
#   make test   sets everything up and checks everything
# `make check` is the fast part for a developer; `make slow`, `make faults` and `make bench` take
# long.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# One thread per process: the same numbers on every run, and tests that run side by side.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test check slow faults bench clean
.DEFAULT_GOAL := test

demo: $(STAMP)
	$(BIN)/python -m rightbatch.demo

test: check
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not faults"

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

faults: $(STAMP)
	$(BIN)/python -m pytest -m faults -s

bench: $(STAMP)
	$(BIN)/python benchmarks/regret.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# Made anew when what is installed changes; an unfinished environment has no stamp.
$(STAMP): pyproject.toml constraints.txt oracles.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rightbatch needs Python 3.11 or newer; call: make PYTHON=python3.11")'
	rm -f $@
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps --requirement oracles.txt
	touch $@
