# Every target sets up what it needs. Needs git, make and Python >= 3.11 with venv; nothing else.
VENV ?= .venv
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13; do \
	if command -v $$p >/dev/null 2>&1 && $$p -c 'import ensurepip, venv' >/dev/null 2>&1; then command -v $$p; break; fi; done)
BIN := $(VENV)/bin
# Two workers suit two cores; the accountants and masks are single-threaded numpy.
WORKERS ?= 2
PYTEST = OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: demo test test-long test-torch test-postgres test-s3 check bench clean python
.DEFAULT_GOAL := help

help:
	@echo "make demo       train one model over twenty private clients (installs what it needs)"
	@echo "make test       run the tests"
	@echo "make test-long  run the long sweeps too"
	@echo "make test-torch run the tests that need torch and Opacus"
	@echo "make test-postgres  run the tests that need PostgreSQL"
	@echo "make test-s3    run the tests that need an S3 server (it is installed)"
	@echo "make check      lint, types, floors, house rules"
	@echo "make bench      measure speed and memory"
	@echo "make clean      remove the virtual environment and caches"

python:
	@if [ -z "$(PYTHON)" ]; then \
	  echo "make: no python3.11, python3.12 or python3.13 with the venv module was found." >&2; \
	  echo "Install one, e.g. 'apt-get install python3.11 python3.11-venv', or say PYTHON=/path/to/python." >&2; \
	  exit 1; fi

$(BIN)/python: | python
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

# One stamp a set of extras, so that `make demo` does not install the test tools.
$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --editable '.[demo]' --constraint constraints.txt --config-settings editable_mode=compat
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --editable '.[dev]' --constraint constraints.txt --config-settings editable_mode=compat
	@touch $@ $(VENV)/.demo

demo: $(VENV)/.demo
	$(BIN)/privfed run examples/quickstart --seed 1

test: $(VENV)/.dev
	$(PYTEST) -n $(WORKERS) -m "not long and not torch and not postgres and not s3"

test-long: $(VENV)/.dev
	$(PYTEST) -n $(WORKERS) -m "not torch and not postgres and not s3"

# torch first and by pip, so that what needs it resolves to the wheel that constraints.txt names.
$(VENV)/.torch: $(VENV)/.dev
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet torch --constraint constraints.txt
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --editable '.[dev,torch]' --constraint constraints.txt --config-settings editable_mode=compat
	@touch $@

test-torch: $(VENV)/.torch
	$(PYTEST) -m "torch and not long"

test-postgres: $(VENV)/.dev
	@ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || command -v initdb >/dev/null || { \
	  echo "make: PostgreSQL is not installed. Install it, e.g. 'apt-get install postgresql'." >&2; exit 1; }
	$(PYTEST) -m "postgres and not long"

$(VENV)/.s3: $(VENV)/.dev
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --editable '.[dev,test-s3]' --constraint constraints.txt --config-settings editable_mode=compat
	@touch $@

test-s3: $(VENV)/.s3
	$(PYTEST) -m "s3 and not long" proofs_tests/deployment/test_bucket.py

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(PYTEST) -q -k house_rules proofs_tests/test_floors.py

bench: $(VENV)/.dev
	for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
