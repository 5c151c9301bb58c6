# Each target does all its own set-up: a virtual environment with the pinned constraints.
PYTHON ?= python3
VENV := .venv
ZOO := .venv-zoo
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ZOO_READY := $(ZOO)/.ready
# One thread per test process: several thrash when the machine is busy.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-zoo test-gpu check format bench clean

help: ## show the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(READY) ## train, save, evaluate and use a model on the sample; needs no download of data
	$(BIN)/python tools/demo.py demo

test: $(READY) ## the test suite, about 3 minutes
	$(ONE_THREAD) $(BIN)/python -m pytest -q

test-slow: $(READY) ## what takes longer: corpora, browsers, whole trainings
	$(ONE_THREAD) $(BIN)/python -m pytest -q -m "slow and not gpu and not zoo"

test-zoo: $(ZOO_READY) ## equality with torchvision and its data sets, in an environment of its own
	$(ONE_THREAD) $(ZOO)/bin/python -m pytest -q -m "zoo and not gpu"

test-gpu: $(READY) ## what needs an accelerator
	$(BIN)/python -m pytest -q -m gpu

check: $(READY) ## format, lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY) ## put the code in its one format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(ZOO_READY) ## every benchmark but those that need a peer, one after the other (over three hours)
	for script in $$(ls benchmarks/[a-z]*.py | grep -v peer_); do echo "== $$script"; $(ZOO)/bin/python $$script || exit 1; done

clean: ## remove environments, caches and the demo's files
	rm -rf $(VENV) $(ZOO) demo .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache

$(READY): pyproject.toml constraints/default.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed; found " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints/default.txt -e '.[train,check,parquet,dev]'
	touch $@

$(ZOO_READY): pyproject.toml constraints/zoo.txt
	$(PYTHON) -m venv $(ZOO)
	$(ZOO)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints/zoo.txt -e '.[train,check,parquet,zoo,dev]'
	touch $@
