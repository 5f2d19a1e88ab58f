# Every target works first and alone on a fresh clone.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.installed
UV := $(BIN)/uv pip
PHOTOS ?=

.DEFAULT_GOAL := help
.PHONY: help install run up down test test-all pytest mutants packages lint format bench audit lock clean

help: ## Show this list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(READY) ## Make .venv from the locked requirements.

# uv comes from the same lock file, hash and all; it installs the rest, compiled,
# so that the first command does not wait for Python to do it.
$(READY): requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	sed -n '/^uv==/,/[^\\]$$/p' requirements.lock > .venv/uv.lock
	$(BIN)/python -m pip install --quiet --require-hashes --requirement .venv/uv.lock
	VIRTUAL_ENV=.venv $(UV) sync --quiet --compile-bytecode --require-hashes requirements.lock
	VIRTUAL_ENV=.venv $(UV) install --quiet --no-deps --no-build-isolation --editable .
	touch $@

run: $(READY) ## Retrain on the data of this checkout and say where to look.
	$(BIN)/handsigns retrain

up: $(READY) ## Start the whole service on loopback: S3, MLflow, Prefect, a worker, the schedule.
	$(BIN)/handsigns up

down: $(READY) ## Stop it; its data stays.
	$(BIN)/handsigns down

# Hundreds of processes import this package, so Python may keep what it compiled.
test test-all: export PYTHONDONTWRITEBYTECODE :=
test test-all: packages

test: $(READY) ## Lint, types, and the tests for each change, side by side.
	$(MAKE) --jobs 2 --keep-going --no-print-directory lint pytest

test-all: $(READY) ## The same with the slow tests: every crash point, full disks, PostgreSQL.
	$(MAKE) --jobs 2 --keep-going --no-print-directory lint pytest TESTS="slow or not slow"

TESTS := not slow
pytest: $(READY)
	$(BIN)/python -m pytest -m "$(TESTS)" --numprocesses 4 --dist loadfile \
	  --no-loadscope-reorder --durations 25 --durations-min 5

mutants: $(READY) packages ## Change what decides in 220 ways, and list the changes that no test notices.
	$(BIN)/python -m tests.mutants

packages: ## Install the browser and PostgreSQL that some tests drive (Debian).
	tests/packages.sh

lint: $(READY) ## Style and types only.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## Fix style where a tool can.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY) ## Measure this workflow against plain Keras; PHOTOS=folder of class folders.
	$(BIN)/python -m benchmarks.training $(if $(PHOTOS),--photos "$(PHOTOS)")

audit: $(READY) ## Look up the locked packages in the database of known weaknesses.
	$(BIN)/pip-audit --strict --disable-pip --require-hashes --progress-spinner off \
	  --requirement requirements.lock

lock: $(READY) ## Resolve requirements.lock again from pyproject.toml, and the images' share of it.
	$(UV) compile --quiet --universal --fork-strategy fewest --python-version 3.11 \
	  --generate-hashes --no-emit-index-url --no-header --extra dev --upgrade \
	  --output-file requirements.lock pyproject.toml
	$(UV) compile --quiet --universal --fork-strategy fewest --python-version 3.11 \
	  --generate-hashes --no-emit-index-url --no-header --constraint requirements.lock \
	  --output-file docker/requirements.lock pyproject.toml

clean: ## Remove what runs leave behind; data/, .local/ and the DVC cache stay.
	rm -rf artifacts build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find flows tasks tests benchmarks -name __pycache__ -type d -exec rm -rf {} +
