# Every target sets up .venv by itself; `make help` lists them.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
JOBS   ?= 2
READY  := $(VENV)/.ready

export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-long lint faults compose-test docs bench clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 24

setup: $(READY) ## Make .venv with everything that constraints.txt pins

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,dev]'
	@touch $@

demo: $(READY) ## Run a real federation: three sites, a real model, real data; ends with a report
	$(BIN)/fedspan demo
	$(BIN)/fedspan run deploy/demo/federation.yaml --name "demo-$$(date +%Y%m%d-%H%M%S)"

test: lint ## Format check, lint and types; then units, JOBS (2) at a time; then federations of processes, one by one
	@echo "== units and federations in one process, $(JOBS) at a time"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadscope --durations=10 --ignore tests/processes --ignore tests/faults
	@echo "== federations of processes, one by one"
	$(BIN)/python -m pytest --durations=10 tests/processes tests/faults

lint: $(READY) ## Format check, lint and types only
	@echo "== format, lint, types"
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test-long: $(READY) ## The tests that `make test` leaves out, but for faults and containers
	$(BIN)/python -m pytest tests -m long --ignore tests/faults --ignore tests/compose

faults: $(READY) ## Inject faults into real federations (one to two hours); ends with a table
	$(BIN)/python -m pytest tests/faults tests/processes/test_across_machines.py -m "long or not long"

compose-test: $(READY) ## Build, run and attack the containers (about 25 minutes); needs a Docker engine
	$(BIN)/python -m pytest tests/compose -m long -s -v

docs: $(READY) ## Build the documents as pages in build/docs; stops at a link that leads nowhere
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(READY) ## Measure against the named peers; tables on screen, JSON in benchmarks/results/
	$(BIN)/python -m benchmarks

clean: ## Remove .venv, caches and prepared demo data (not runs/)
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
