# `make demo` and `make test` work on a fresh clone: the first run makes .venv, later runs reuse it.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test quick lint bench bench-quick test-neuron trace-neuron record-neuron neuron-sources clean

.venv/stamp: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

demo: .venv/stamp
	$(BIN)/python generation_demo.py

# Two processes, each with whole test modules: fixtures are made once.
test: .venv/stamp
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# What most changes break: nothing that compiles, serves, trains or opens a browser.
quick: .venv/stamp
	$(BIN)/python -m pytest --quick --numprocesses 2 --dist loadfile

lint: .venv/stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The Neuron class on AWS's own Python, on a CPU. SOURCES holds checkouts of neuronx-distributed-inference,
# neuronx-distributed and nki-library; docs/neuron_proof.md names their commits.
NEURON_PATH = $(SOURCES)/neuronx-distributed-inference/src:$(SOURCES)/neuronx-distributed/src:$(SOURCES)/nki-library/src/nkilib_src

.venv-neuron/stamp: pyproject.toml
	$(PYTHON) -m venv .venv-neuron
	.venv-neuron/bin/python -m pip install --quiet --editable '.[neuron-test]'
	touch $@

test-neuron: neuron-sources .venv-neuron/stamp
	PYTHONPATH=$(NEURON_PATH) .venv-neuron/bin/python -m pytest tests/neuron

# The graphs themselves, by torch_xla. The CPU build of torch comes from PyTorch's CPU wheels (PIP_EXTRA_INDEX_URL); with
# XLA_TORCH=torch==2.9.1 the default one does, and brings 4 GB of CUDA.
XLA_TORCH ?= torch==2.9.1+cpu
.venv-xla/stamp: pyproject.toml
	$(PYTHON) -m venv .venv-xla
	.venv-xla/bin/python -m pip install --quiet $(XLA_TORCH) torch_xla==2.9.0 --editable '.[neuron-test]'
	touch $@

trace-neuron: neuron-sources .venv-xla/stamp
	PYTHONPATH=$(NEURON_PATH) .venv-xla/bin/python -m pytest tests/neuron/test_tracing.py tests/neuron/test_backend.py -k graphs

# Writes tests/data/neuron_traces.json anew; look at what changed in it.
record-neuron: neuron-sources .venv-xla/stamp
	PYTHONPATH=$(NEURON_PATH) .venv-xla/bin/python -m tests.neuron.tracing

neuron-sources:
	@for source in neuronx-distributed-inference neuronx-distributed nki-library; do \
	  test -d "$(SOURCES)/$$source/src" || { \
	    echo "SOURCES=$(SOURCES) holds no $$source/src; give a folder with checkouts of the three public" \
	      "repositories (docs/neuron_proof.md)" >&2; exit 2; }; done

# About 15 minutes once its checkpoints and compiled models are made (the first run makes them); needs 20 GB of memory.
bench: .venv/stamp
	$(BIN)/python -m benchmarks

# Fails when a ratio fell by more than a third against benchmarks/results/quick.json.
bench-quick: .venv/stamp
	$(BIN)/python -m benchmarks.quick

clean:
	rm -rf .venv .venv-neuron .venv-xla build *.egg-info
