.DEFAULT_GOAL := help
.PHONY: help install demo demodata test gpu-check lint format docs constraints hashes lowest audit
PYTHON ?= .venv/bin/python

help: ## show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: ## create .venv with all development dependencies
	python3 -m venv .venv
	.venv/bin/pip install -c constraints.txt -e '.[dev]'

demo: ## train and evaluate the embedded default
	$(PYTHON) run.py

demodata: ## write promcse_pl/data/demo_data with its generator
	PYTHONPATH=tools $(PYTHON) -m demo_data

test: ## run the tests
	$(PYTHON) -m pytest

gpu-check: ## test and measure training on a GPU, and write the results into experiments/speed
	$(PYTHON) experiments/speed/gpu_check.py

lint: ## run ruff, mypy and import-linter
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(dir $(PYTHON))lint-imports

format: ## format the code with ruff
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

docs: ## build the documentation site into site/
	$(dir $(PYTHON))mkdocs build --strict
	@echo "Show it with: $(PYTHON) -m http.server --directory site"

constraints: ## resolve all extras and write constraints.txt
	bash tools/write_constraints.sh

lowest: ## run tests with the lowest versions that pyproject.toml allows
	bash tools/test_lowest.sh

hashes: ## write requirements-release.txt: the same versions with the hash of every file
	bash tools/write_hashes.sh

audit: ## check the dependencies of a release for known vulnerabilities
	python3 -m venv .audit
	.audit/bin/pip install -q pip-audit
	.audit/bin/pip-audit --strict --no-deps --disable-pip -r requirements-release.txt
	rm -r .audit
