# `make demo` and `make test` each work alone on a fresh clone with Python 3.11 or newer and pip.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest
JOBS   ?= 2
SITE   := docs/_build

.DEFAULT_GOAL := help
.PHONY: help demo test check lint types doctest slow bench gpu notebooks docs wheel smollm clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  \1|/' \
	    | awk -F'|' '{printf "%-12s %s\n", $$1, $$2}'

# -- set-up: one stamp per extra, renewed when the requirements change ------------------------

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "probkit needs Python 3.11 or newer; call make with PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.stamp-%: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing probkit[$*] into $(VENV) (the first time takes minutes)"
	@$(PIP) install --quiet --no-compile --constraint constraints.txt --editable ".[$*]"
	@touch $@

# -- the two commands -------------------------------------------------------------------------

demo: $(VENV)/.stamp-demo  ## run every family on real data, write demo/report.html
	$(BIN)/python -m probkit demo --out demo

test: $(VENV)/.stamp-test  ## the fast tests
	$(PYTEST) -n $(JOBS)

# -- the slower checks ------------------------------------------------------------------------

check: lint types doctest  ## lint, types and doctests

lint: $(VENV)/.stamp-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.stamp-test
	$(BIN)/mypy -p probkit

doctest: $(VENV)/.stamp-test
	$(PYTEST) -n $(JOBS) --doctest-modules probkit

slow: $(VENV)/.stamp-test  ## the slow tests, notebooks and wheel apart
	$(PYTEST) -n $(JOBS) -m "slow and not gpu" --ignore=tests/notebooks --ignore=tests/packaging

wheel: $(VENV)/.stamp-test  ## build wheel and sdist, install the wheel elsewhere, use it
	$(PYTEST) -m slow tests/packaging

# PYTHON= names an interpreter whose packages include a CUDA build of torch; they are kept, and the
# constraints of the CPU build are left out.
gpu:  ## tests and benchmarks on a CUDA device: make gpu PYTHON=/path/to/python
	$(PYTHON) -m venv --system-site-packages .venv-gpu
	.venv-gpu/bin/python -m pip install --quiet --editable ".[test]"
	.venv-gpu/bin/python -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "no CUDA device: PYTHON= must name a Python with a CUDA build of torch")'
	.venv-gpu/bin/python -m pytest -m gpu
	.venv-gpu/bin/python -m benchmarks run --gpu
	.venv-gpu/bin/python -m benchmarks report

smollm: $(VENV)/.stamp-llm  ## the small language model that the slow tests run for real
	$(BIN)/probkit fetch smollm2 --yes

bench: $(VENV)/.stamp-test  ## the benchmarks, side by side with peers, and their tables
	$(BIN)/python -m benchmarks run
	$(BIN)/python -m benchmarks report

notebooks: $(VENV)/.stamp-test  ## execute the notebooks and check their named values
	OMP_NUM_THREADS=1 $(BIN)/python notebooks/run.py --out docs/tutorials

docs: $(VENV)/.stamp-docs  ## build the site; warnings are errors
	@ls docs/tutorials/*.ipynb >/dev/null 2>&1 || $(BIN)/python notebooks/run.py --out docs/tutorials
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs $(SITE)/html
	@echo "$(SITE)/html/index.html"

clean:  ## remove what the other targets made
	rm -rf $(VENV) $(SITE) docs/api docs/tutorials demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
