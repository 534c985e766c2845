# `make demo` and `make test` work on a fresh clone: the first run makes .venv, later runs reuse it.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint bench clean

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

bench: .venv/stamp
	$(BIN)/python -m benchmarks.conversion
	$(BIN)/python -m benchmarks.inspection
	$(BIN)/python -m benchmarks.cache --transformers
	$(BIN)/python -m benchmarks.decoding
	$(BIN)/python -m benchmarks.serving
	$(BIN)/python -m benchmarks.kernel_model

clean:
	rm -rf .venv build *.egg-info
