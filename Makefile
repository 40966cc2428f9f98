PYTHON ?= python3
VENV ?= .venv
CPU_ARGS ?= --shape qwen3-0.6b --trials 40
SEARCH_ARGS ?= --shape qwen3-vl-2b
PYTEST_ARGS ?= -n 2
QUICK := tests/templates tests/test_architecture.py tests/test_docs.py tests/tuning_db tests/tuner/search \
	tests/kernels/plans
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup search lint types test quick format golden generated docs wheel clean

help: ## list these targets
	@sed -n 's/^\([a-z]*\):[^#]*## /  \1\t/p' $(MAKEFILE_LIST) | expand -t 12
	@echo 'Variables: PYTHON=$(PYTHON) VENV=$(VENV) CPU_ARGS="$(CPU_ARGS)" SEARCH_ARGS="$(SEARCH_ARGS)" PYTEST_ARGS="$(PYTEST_ARGS)"'

search: $(READY) ## tune for this machine's CPU, measured; then for a Jetson Orin Nano Super, predicted
	$(VENV)/bin/flashtune search --device cpu $(CPU_ARGS)
	$(VENV)/bin/python benchmarks/cpu_decode.py --shape qwen3-0.6b --rounds 10
	$(VENV)/bin/flashtune search --device orin $(SEARCH_ARGS)

lint: $(READY) ## check style and format
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check

types: $(READY) ## check types
	$(VENV)/bin/mypy

test: lint types ## lint, check types, and run the tests
	$(VENV)/bin/pytest $(PYTEST_ARGS)

quick: $(READY) ## the tests of generated source, architecture, docs, database, search and configs: under a minute
	$(VENV)/bin/pytest $(PYTEST_ARGS) $(QUICK)

format: $(READY) ## format, and fix what ruff can
	$(VENV)/bin/ruff format
	$(VENV)/bin/ruff check --fix

golden: $(READY) ## accept changes of generated source
	$(VENV)/bin/pytest tests/templates --accept-golden

generated: $(READY) ## draw the documents' pictures, and write the README's tables from committed results
	$(VENV)/bin/python docs/site/pictures.py
	$(VENV)/bin/python docs/site/readme.py

docs: $(READY) ## build the site in build/site; a broken link, or a page missing from mkdocs.yml, fails
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict
	@echo 'look at it: python3 -m http.server --directory build/site'

wheel: $(READY) ## build dist/, and try the wheel in an environment of its own
	rm -rf dist
	$(VENV)/bin/python -m build
	.ci/try-wheel $(PYTHON) dist/*.whl

setup: $(READY) ## make the virtual environment; the others do so when they need it

# pip learned dependency groups in 25.1
$(READY): pyproject.toml constraints-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo 'flashtune needs Python 3.10 or later, and $(PYTHON) is not: make $(MAKECMDGOALS) PYTHON=…' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet 'pip>=25.1'
	$(VENV)/bin/python -m pip install --quiet -c constraints-dev.txt --editable . --group dev --group docs
	@touch $@

clean: ## remove the virtual environment and the caches
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache
