# `make demo` and `make test` work on a fresh clone: the first run makes .venv, later runs reuse it.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint bench bench-quick clean

.venv/stamp: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

demo: .venv/stamp
	$(BIN)/python generation_demo.py

test: .venv/stamp
	$(BIN)/python -m pytest

lint: .venv/stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# About 15 minutes once its checkpoints and compiled models are made (the first run makes them); needs 20 GB of memory.
bench: .venv/stamp
	$(BIN)/python -m benchmarks

# Fails when a ratio fell by more than a third against benchmarks/results/quick.json.
bench-quick: .venv/stamp
	$(BIN)/python -m benchmarks.quick

clean:
	rm -rf .venv build *.egg-info
