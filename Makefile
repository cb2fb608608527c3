# `make demo` and `make test` do everything, set-up included. `make check` is the fast loop while working.
VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet

.PHONY: demo test test-all check lint types docs install install-dev clean
demo: $(VENV)/.installed
	$(BIN)/merit demo

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-all: $(VENV)/.installed-dev
	$(PIP) -c constraints.txt -e ".[eval]"
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "" --hypothesis-profile=fresh

check: lint types
	$(BIN)/python -m pytest -n 2 --dist worksteal -q -m "not slow"

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

docs: $(VENV)/.installed-dev
	$(PIP) -c constraints.txt -e ".[docs]"
	$(BIN)/python scripts/build_docs.py

install: $(VENV)/.installed

install-dev: $(VENV)/.installed-dev

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "MERIT needs Python 3.11 or newer; found $$($(PYTHON) --version). Use: make PYTHON=python3.12 ..."; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python pyproject.toml constraints.txt
	@echo "Installing MERIT into $(VENV) (2 GB, a few minutes the first time) ..."
	$(PIP) -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -c constraints.txt -e ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) runs
