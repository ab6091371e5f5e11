# make demo, make test and make check each work as the first command on a fresh clone:
# Python >= 3.10, git and make are all that is needed.

# No rule of make's own applies: one would copy install.sh to install.
MAKEFLAGS += --no-builtin-rules

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := model wire backends calibration agent planning paper coordinator api testbed evaluation compression studies cli

# `make bundle` is for an agent on Raspberry Pi OS 12 or Debian 12, unless told otherwise.
MACHINE ?= aarch64
PYTHON_VERSION ?= 3.11
LOCK ?= agent

# Where make train-town keeps its checkpoint, model and dev set.
TOWN ?= build/town

# Where make test-install keeps its Debian trees.
PREPARED ?= $(HOME)/.cache/shoal/prepared

.DEFAULT_GOAL := help
.PHONY: $(shell sed -nE 's/^([a-z-]+):.*\#\# .*/\1/p' $(MAKEFILE_LIST))

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

demo: $(VENV)/run.stamp ## split the embedded model over three agents on this machine, and ask it something
	$(BIN)/shoal demo

# The tests start a thousand processes, and each would compile the project again.
test test-fast test-thorough test-system: export PYTHONDONTWRITEBYTECODE =

test: $(VENV)/dev.stamp ## run the tests in 5 processes (options in ARGS; durations go to build/tests.xml)
	$(BIN)/python -m pytest -n 5 --dist loadfile --no-loadscope-reorder -m 'not thorough' --durations 20 \
		--junitxml build/tests.xml $(ARGS)

test-thorough: $(VENV)/dev.stamp ## prove again with many seeds and sizes what make test proves with few
	$(BIN)/python -m pytest -n 4 --dist worksteal -m thorough $(ARGS)

test-fast: $(VENV)/dev.stamp ## run the tests that start no process and open no connection
	$(BIN)/python -m pytest -n 2 --dist worksteal --fast -m 'not thorough' $(ARGS)

fuzz: $(VENV)/dev.stamp ## send hostile bytes to codec, TLS, and the ports of a running shoal, for a minute (ARGS)
	$(BIN)/python -W ignore::UserWarning -m tests.fuzz $(ARGS)

test-matrix: ## test an installation on every supported Python that pyenv or PATH has
	tests/install/matrix.sh

test-install: $(VENV)/dev.stamp ## test services under a real systemd and on arm64 (root; takes minutes)
	tests/install/prepare.sh $(PREPARED)
	SHOAL_PREPARED=$(PREPARED) $(BIN)/python -m pytest tests/install -m slow $(ARGS)

dist: $(VENV)/run.stamp ## make a folder to install from: wheel, locks, install.sh
	rm -rf build dist
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation -w dist .
	cp install.sh requirements/agent.lock requirements/run.lock dist/

# pip would judge "python_full_version < '3.11'" by its own Python. So uv resolves the lock for the target.
audit: $(VENV)/run.stamp ## look for known holes in all locked packages (asks PyPI; fails where it knows nothing)
	$(BIN)/pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv tool run pip-audit --strict --disable-pip --require-hashes --progress-spinner off \
		$(foreach lock,agent run dev,-r requirements/$(lock).lock) \
	|| { echo 'make audit failed: a known hole is named above, or PyPI has told nothing about a package ("could not' \
		'be audited"). Then the locks were not checked.' >&2; exit 1; }

bundle: dist ## make dist with every wheel for MACHINE and PYTHON_VERSION, to install offline
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip compile --quiet --no-header --generate-hashes --python-version $(PYTHON_VERSION) \
		--python-platform $(MACHINE)-manylinux_2_31 requirements/$(LOCK).lock -o dist/wheels.lock
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --only-binary=:all: --no-deps --require-hashes \
		--python-version $(PYTHON_VERSION) --platform manylinux2014_$(MACHINE) \
		$(foreach level,2_17 2_26 2_27 2_28 2_31,--platform manylinux_$(level)_$(MACHINE)) \
		-r dist/wheels.lock -d dist/wheels
	rm dist/wheels.lock

test-system: $(VENV)/dev.stamp ## run the tests on emulated hosts (root)
	$(BIN)/python -m pytest -m netns $(ARGS)

check: $(VENV)/dev.stamp ## check style, types and the import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

state-diagram: $(VENV)/run.stamp ## draw a model's states into docs/design.md, from their table
	$(BIN)/python -m coordinator.loading.diagram docs/design.md

bench: $(VENV)/run.stamp ## measure the cost of splitting on this machine
	$(BIN)/python benchmarks/split.py $(ARGS)

bench-hop: $(VENV)/run.stamp ## measure the cost of a hop beside raw TCP (with root also on a LAN)
	$(BIN)/python benchmarks/hop.py $(ARGS)

bench-pipeline: $(VENV)/run.stamp ## measure the cost of splitting over 1 to 4 emulated devices (root)
	$(BIN)/python -m benchmarks.pipeline $(ARGS)

bench-rest: $(VENV)/run.stamp ## measure what an idle agent and coordinator take (root)
	unshare --net $(BIN)/python benchmarks/at_rest.py $(ARGS)

bench-planner: $(VENV)/run.stamp ## measure the planner's solve times and proved gaps
	$(BIN)/python benchmarks/planner.py $(ARGS)

bench-joint: $(VENV)/run.stamp ## plan models together and one after the other, on described labs
	$(BIN)/python -m benchmarks.joint $(ARGS)

bench-fidelity-joint: $(VENV)/run.stamp ## compare predicted and measured times of two models at once on emulated hosts (root)
	$(BIN)/python -m benchmarks.fidelity_joint $(ARGS)

bench-team-simulation: $(VENV)/run.stamp ## compute what teams of 2 to 8 Pis would give, from the parts in a lab
	$(BIN)/python -m benchmarks.team_simulation $(ARGS)

bench-fidelity: $(VENV)/run.stamp ## compare predicted and measured times of many plans on emulated hosts (root)
	$(BIN)/python -m benchmarks.fidelity $(ARGS)

bench-together: $(VENV)/run.stamp ## measure devices that share layers over emulated hosts, also against others (root)
	$(BIN)/python -m benchmarks.together $(ARGS)

bench-throughput: $(VENV)/run.stamp ## measure several generations at once over 1 to 4 emulated hosts (root)
	$(BIN)/python -m benchmarks.throughput $(ARGS)

bench-serve: $(VENV)/run.stamp ## measure chats, repeated text and a long prompt beside streams, on emulated hosts (root)
	$(BIN)/python -m benchmarks.serve $(ARGS)

bench-classes: $(VENV)/run.stamp ## measure a light model beside a heavy one, and what classes of requests do
	$(BIN)/python -m benchmarks.classes $(ARGS)

bench-draft: $(VENV)/run.stamp ## measure a draft model that is right more or less often, on emulated hosts (root)
	$(BIN)/python -m benchmarks.draft $(ARGS)

bench-peer-loading: $(VENV)/run.stamp ## measure loading blocks from other devices instead of the coordinator (root)
	$(BIN)/python -m benchmarks.peer_loading $(ARGS)

bench-recovery: $(VENV)/run.stamp ## measure how much later an answer ends when a device is lost (root)
	$(BIN)/python -m benchmarks.recovery $(ARGS)

bench-moving: $(VENV)/run.stamp ## draw the time of a token while devices and links change, with moves and without (root)
	$(BIN)/python -m benchmarks.moving $(ARGS)

fault-matrix: $(VENV)/run.stamp ## try each fault in each phase of an answer, on emulated hosts (root)
	$(BIN)/python -m benchmarks.fault_matrix $(ARGS)

chaos: $(VENV)/run.stamp ## inject random faults for 10 minutes while clients ask, and check every answer (root)
	$(BIN)/python -m benchmarks.chaos $(ARGS)

bench-integrity: $(VENV)/run.stamp ## measure the cost of checking files until the first answer
	$(BIN)/python -m benchmarks.integrity $(ARGS)

bench-sampling: $(VENV)/run.stamp ## measure the cost of drawing a token, over HTTP
	$(BIN)/python -m benchmarks.sampling $(ARGS)

bench-quantizers: $(VENV)/run.stamp ## measure quantizers on a model, and with --layer on a layer of a 1B shape
	$(BIN)/python -m benchmarks.quantizers $(ARGS)

bench-pages: $(VENV)/run.stamp ## measure decoding speed of fresh processes, by the memory of their weights
	$(BIN)/python -m benchmarks.pages $(ARGS)

bench-encoders: $(VENV)/run.stamp ## measure texts per second of encoders, also by transformers
	$(BIN)/python -m benchmarks.encoders --agents 1,3 $(ARGS)

bench-telemetry: $(VENV)/run.stamp ## measure what counting and remembering passes costs a token
	$(BIN)/python -m benchmarks.telemetry $(ARGS)

# The extra torch is not in the lock, because services on CPUs do without it.
train-town: $(VENV)/run.stamp ## train examples/town again into build/town, and measure it (the same command goes on)
	mkdir -p $(TOWN)
	$(BIN)/python -c 'import torch' 2>/dev/null || \
		$(BIN)/python -m pip install --disable-pip-version-check --no-build-isolation -e '.[torch]'
	$(BIN)/python examples/town/generate.py --out $(TOWN)/dev.jsonl
	$(BIN)/python examples/town/train.py --work $(TOWN) --model-dir $(TOWN)/model $(ARGS)
	$(BIN)/python examples/town/evaluate.py --model-dir $(TOWN)/model --dev $(TOWN)/dev.jsonl $(MEASURE)

soak-models: $(VENV)/run.stamp ## load and unload three models at random for half an hour, while clients ask them
	$(BIN)/python -m benchmarks.soak_models $(ARGS)

soak: $(VENV)/run.stamp ## let random clients and failing devices loose for an hour, and watch for what is left
	$(BIN)/python -m benchmarks.soak $(ARGS)

lock: $(VENV)/run.stamp ## resolve requirements/*.lock again for all supported Pythons
	$(BIN)/pip install --quiet uv
	for name in run dev; do \
		extras="--extra agent --extra coordinator"; \
		if [ $$name = dev ]; then extras="$$extras --extra dev"; fi; \
		$(BIN)/uv pip compile --quiet --universal --python-version 3.10 --generate-hashes \
			--no-header --upgrade $$extras pyproject.toml requirements/build.in -o requirements/$$name.lock || exit 1; \
	done
	$(BIN)/uv pip compile --quiet --universal --python-version 3.10 --generate-hashes --no-header \
		--constraint requirements/run.lock --extra agent pyproject.toml -o requirements/agent.lock

clean: ## remove what make made
	rm -rf $(VENV) build dist *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("shoal needs Python 3.10 or newer") if sys.version_info < (3, 10) else None'
	@echo "making an environment of its own in $(VENV)"
	$(PYTHON) -m venv $(VENV)

$(VENV)/run.stamp: requirements/run.lock pyproject.toml | $(VENV)/bin/python
	@echo "installing up to $$(grep -c == requirements/run.lock) packages into $(VENV), once: about a minute on a fast line"
	$(BIN)/python -m pip install --disable-pip-version-check --require-hashes -r requirements/run.lock
	@echo "installing shoal itself into $(VENV)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

$(VENV)/dev.stamp: requirements/dev.lock $(VENV)/run.stamp
	@echo "installing up to $$(grep -c == requirements/dev.lock) packages for tests and checks into $(VENV), once"
	$(BIN)/python -m pip install --disable-pip-version-check --require-hashes -r requirements/dev.lock
	touch $@
