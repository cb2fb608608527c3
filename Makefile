# Two commands do everything, set-up included: `make demo` and `make test`.
VENV := .venv
PYTHON ?= python3
PIP := $(VENV)/bin/python -m pip install --disable-pip-version-check --quiet

.PHONY: demo test lint install clean
demo: $(VENV)/.installed
	$(VENV)/bin/merit demo

test: $(VENV)/.installed-dev
	$(VENV)/bin/python -m pytest -n 2

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy

install: $(VENV)/.installed

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "MERIT needs Python 3.11 or newer; found $$($(PYTHON) --version). Use: make PYTHON=python3.12 ..."; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "Installing MERIT into $(VENV) (2 GB, a few minutes the first time) ..."
	$(PIP) -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -c constraints.txt -e ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) runs
