# Everything is run through these verbs; continuous integration calls the same ones.
# `PYTHON=python3.12 make test` chooses another interpreter for the environment.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help study test large test-gpu check sanitize bench bench-models bench-gpu browser docs readme format clean

help: ## show the verbs
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

# The environment is made anew only when what it is made from has changed.
$(READY): pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/batchnorm/native/*)
	$(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[study,test,check,docs]'
	@touch $@

study: $(READY) ## train with and without batch normalization on real data, and report
	$(BIN)/batchnorm study

test: $(READY) ## run the tests
	$(BIN)/python -m pytest -n 2

large: $(READY) ## run the tests of batches over 2^31 elements, which take 20 GB of memory
	BATCHNORM_LARGE=1 $(BIN)/python -m pytest tests/kernels/test_native_large.py

test-gpu: $(READY) ## run the tests of what runs on a GPU, on one
	BATCHNORM_TEST_DEVICE=cuda $(BIN)/python -m pytest tests/gpu tests/kernels/test_triton.py tests/kernels/test_triton_plan.py tests/kernels/test_contract.py tests/kernels/test_steps.py

check: $(READY) ## check format, lint, types and the documentation
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) docs

# Leaks are not looked for: Python and torch keep what they have until the end. Nor is what torch
# compiles, which starts compilers of its own.
sanitize: $(READY) ## run the tests of the layer under AddressSanitizer and UBSan
	cmake -S . -B build/sanitize -DBATCHNORM_SANITIZE=ON -DPython_EXECUTABLE=$(abspath $(BIN)/python)
	cmake --build build/sanitize --parallel 2
	PYTHONPATH=build/sanitize BATCHNORM_NATIVE=_native ASAN_OPTIONS=detect_leaks=0 \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	$(BIN)/python -m pytest -n 2 tests/kernels tests/layers tests/functional --ignore tests/functional/test_operators.py

# What only the bench needs is installed when it is first run.
$(VENV)/.bench: $(READY)
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	@touch $@

bench: $(VENV)/.bench ## time the layer beside torch.nn, torch.compile and JAX, and write the table of README.md
	$(BIN)/python -m benchmarks.batch_norm

bench-models: $(VENV)/.bench ## run whole models as they are and with each tool, and write the table of README.md
	$(BIN)/python -m benchmarks.whole

bench-gpu: $(VENV)/.bench ## time the layers and a training step of ResNet-50 on a GPU, and write the table of README.md
	$(BIN)/python -m benchmarks.gpu

# The tests open the report's pages in a browser, if there is one.
browser: ## install Chromium, on Debian and Ubuntu, as root
	apt-get update --quiet && apt-get install --yes --quiet chromium

docs: $(READY) ## build the documentation as pages in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

readme: $(READY) ## study everything, and write what was found into README.md and docs/
	$(BIN)/batchnorm study --budget full
	$(BIN)/batchnorm study --paper --out study/paper
	$(BIN)/batchnorm study shifts
	$(BIN)/python docs/generate.py
	$(BIN)/python docs/pictures.py

format: $(READY) ## format the sources
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove what the verbs made, but no study results
	rm -rf $(VENV) build site .mypy_cache .pytest_cache .ruff_cache .hypothesis
