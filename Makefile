# make demo       train, evaluate and report on the built-in data set (CPU is enough)
# make test       the tests; make test-slow, the long ones; make test-gpu, those that need a CUDA GPU
#                 tests/cluster/install_slurm.sh installs what those of SLURM need
# make lint       style, formatting, types
# Each sets up .venv by itself and reuses it while pyproject.toml stays the same.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Tests run on one thread each, so two at a time; make test PYTEST="-n 8" where there are more cores.
QUICK := -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not gpu"

.PHONY: demo test test-slow test-gpu test-lowest lint format clean

demo: $(VENV)/.base
	$(BIN)/clipq-train experiment=demo
	$(BIN)/clipq-report runs/demo

test: $(VENV)/.test
	$(BIN)/python -m pytest $(QUICK) $(PYTEST)

test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -m "slow and not gpu" -rs $(PYTEST)

test-gpu: $(VENV)/.test
	$(BIN)/python -m pytest -m gpu $(PYTEST)

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

format: $(VENV)/.dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# The oldest versions that pyproject.toml allows, in an environment of their own.
test-lowest:
	$(PYTHON) scripts/lowest_versions.py > .lowest.txt
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install -q -c .lowest.txt -e '.[test]'
	.venv-lowest/bin/python -m pytest $(QUICK) $(PYTEST)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "clipq needs Python 3.11 or newer; name one: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch with its CUDA libraries is about 6 GB and takes a minute or two.
$(VENV)/.base: pyproject.toml | $(VENV)/bin/python
	@echo "installing clipq and what it needs into $(VENV) (about 6 GB with torch; once) ..."
	$(BIN)/python -m pip install -q --disable-pip-version-check -e .
	@touch $@

$(VENV)/.test: $(VENV)/.base
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[test]'
	@touch $@

$(VENV)/.dev: $(VENV)/.test
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) .venv-lowest .lowest.txt build dist .pytest_cache .ruff_cache .hypothesis
