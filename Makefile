# make demo, make test and make check each work as the first command on a fresh clone:
# Python >= 3.10, git and make are all that is needed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := model wire backends calibration agent coordinator testbed cli

.DEFAULT_GOAL := help
.PHONY: help demo test test-system check bench bench-planner bench-fidelity lock clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/run.stamp ## split the embedded model over three agents on this machine and ask it
	$(BIN)/shoal demo

test: $(VENV)/dev.stamp ## run the tests (pass options in ARGS)
	$(BIN)/python -m pytest $(ARGS)

test-system: $(VENV)/dev.stamp ## run the tests on emulated hosts (needs root)
	$(BIN)/python -m pytest -m netns $(ARGS)

check: $(VENV)/dev.stamp ## style, types and the import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench: $(VENV)/run.stamp ## measure what splitting costs on this machine
	$(BIN)/python benchmarks/split.py $(ARGS)

bench-planner: $(VENV)/run.stamp ## solve times and proved gaps of the planner
	$(BIN)/python benchmarks/planner.py $(ARGS)

bench-fidelity: $(VENV)/run.stamp ## predicted and measured times of many plans on emulated hosts (needs root)
	$(BIN)/python benchmarks/fidelity.py $(ARGS)

lock: $(VENV)/run.stamp ## resolve requirements/*.lock anew for all supported Pythons
	$(BIN)/pip install --quiet uv
	for name in run dev; do \
		extras="--extra agent --extra coordinator"; \
		if [ $$name = dev ]; then extras="$$extras --extra dev"; fi; \
		$(BIN)/uv pip compile --quiet --universal --python-version 3.10 --generate-hashes \
			--no-header --upgrade $$extras pyproject.toml requirements/build.in -o requirements/$$name.lock || exit 1; \
	done

clean: ## remove what make made
	rm -rf $(VENV) build *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("shoal needs Python 3.10 or newer") if sys.version_info < (3, 10) else None'
	$(PYTHON) -m venv $(VENV)

$(VENV)/run.stamp: requirements/run.lock pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/run.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

$(VENV)/dev.stamp: requirements/dev.lock $(VENV)/run.stamp
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/dev.lock
	touch $@
