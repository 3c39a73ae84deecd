# Every target sets up .venv by itself; `make help` lists them.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
JOBS   ?= 2
READY  := $(VENV)/.ready
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
FEDERATIONS := federations processes faults attacks

export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-long lint faults compose-test browser-test trackers-test cluster-test docs bench lock dist sbom clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 24

setup: $(READY) ## Make .venv with everything that constraints.txt pins

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[demo,dev]'
	@touch $@

demo: $(READY) ## Run a real federation: three sites, a real model, real data; ends with a report
	$(BIN)/fedspan demo
	$(BIN)/fedspan run deploy/demo/federation.yaml --name "demo-$$(date +%Y%m%d-%H%M%S)"

test: lint ## All that continuous integration runs: format, lint, types, units, federations; JOBS (2) tests at a time
	@echo "== units"
	$(PYTEST) -n $(JOBS) --dist loadscope --durations=15 $(addprefix --ignore tests/,$(FEDERATIONS))
	@echo "== federations, in one process and of processes"
	$(PYTEST) -n $(JOBS) --dist loadgroup --durations=15 $(addprefix tests/,$(FEDERATIONS))

lint: $(READY) ## Format check, lint and types only
	@echo "== format, lint, types"
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test-long: $(READY) ## Nightly: the tests that `make test` leaves out, but for faults, containers, trackers, clusters and browser
	$(PYTEST) tests -m long --durations=15 $(addprefix --ignore tests/,faults compose trackers clusters browser)

faults: $(READY) ## Nightly: inject faults into real federations (about an hour); ends with a table
	$(PYTEST) tests/faults tests/processes/test_across_machines.py -m "long or not long"

trackers-test: $(READY) ## Nightly: feed MLflow and W&B themselves (two minutes); installs both, 140 MB, into .venv
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[mlflow,wandb]'
	$(PYTEST) tests/trackers -m long --durations=5

cluster-test: $(READY) ## Nightly: experiments on Ray and Slurm themselves (half an hour); installs ray, submitit, 230 MB, into .venv
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[ray,slurm]'
	$(PYTEST) tests/clusters -m long --durations=5

browser-test: $(READY) ## Nightly: look at the pages in a real Chromium (apt-get install chromium); pictures in build/pages
	$(PYTEST) tests/browser -m long --durations=5

compose-test: $(READY) ## Nightly: build, run and attack the containers (about 25 minutes); needs a Docker engine
	$(BIN)/python -m pytest tests/compose -m long -s -v

docs: $(READY) ## Build the documents as pages in build/docs; stops at a link that leads nowhere
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(READY) ## Measure against the named peers; tables on screen, JSON in benchmarks/results/
	$(BIN)/python -m benchmarks

lock: $(READY) ## Write deploy/lock anew, what the images install, after a change of constraints.txt
	$(BIN)/python -m deploy.lock

dist: sbom ## Build the wheel and the source distribution in dist/, beside the lists of what the images hold
	$(BIN)/python -m build --no-isolation

sbom: $(READY) ## List what the images hold of other people's code, as CycloneDX JSON in dist/
	mkdir -p dist
	for torch in cpu cuda; do cat deploy/lock/build.txt deploy/lock/packages.txt deploy/lock/torch-$$torch.txt \
	  | $(BIN)/cyclonedx-py requirements --pyproject pyproject.toml --output-reproducible -o dist/fedspan-$$torch.cdx.json - \
	  || exit 1; done

clean: ## Remove .venv, caches and prepared demo data (not runs/)
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
