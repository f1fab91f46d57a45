# Everything happens in .venv. `make` alone lists the targets.
PYTHON ?= $(shell for candidate in python3.11 python3.12 python3.13 python3; do \
	if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	command -v $$candidate; break; fi; done)
# cpu, gpu, none, or auto (gpu where nvidia-smi lists one)
ENGINE ?= auto
ARGS ?=
BIN := .venv/bin
STAMP := .venv/.set-up-$(ENGINE)
ALFWORLD_STAMP := .venv/.set-up-alfworld
DOCS_STAMP := .venv/.set-up-docs
# A file's tests stay together, in the order in which tests/conftest.py has put them.
TWO_FILES := -n 2 --dist loadfile --no-loadscope-reorder
# The folders, not the links to them in gflowvlm/.
SOURCES := gflowvlm/*.py shared envs actors learner run evaluation warm_starts cluster studies api cli tests scripts

.DEFAULT_GOAL := help
.PHONY: help setup alfworld train test test-fast lint audit format docs reference bench chaos compare-torchgfn

help: ## list the targets
	@echo "Targets (options for a command: make train ARGS='--preset numberline-tiny'):"
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1|\2/p' $(firstword $(MAKEFILE_LIST)) | \
	while IFS='|' read -r target what; do printf '%-24s %s\n' "$$target" "$$what"; done

setup: $(STAMP) ## make .venv with everything in it (ENGINE=cpu|gpu|none; chosen by itself)

$(STAMP): pyproject.toml constraints.txt scripts/set_up.py
	@if [ -z "$(PYTHON)" ]; then echo "set-up: no Python 3.11 or later found;" \
	"install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 2; fi
	@$(PYTHON) scripts/set_up.py --engine $(ENGINE)
	@touch $@

alfworld: $(ALFWORLD_STAMP) ## set up, with ALFWorld's packages as well (compiles a planner: some minutes)

$(ALFWORLD_STAMP): $(STAMP) constraints-alfworld.txt
	@$(BIN)/python scripts/set_up.py --engine $(ENGINE) --alfworld
	@touch $@

train: setup ## set up, then run the main job on its default preset
	$(BIN)/gflowvlm train $(ARGS)

# Half of the tests' time is waiting for processes to start, so two files run at a time.
test: setup ## set up, then run all tests
	$(BIN)/python -m pytest $(TWO_FILES) $(ARGS)

test-fast: setup ## the tests that take at most a few seconds each
	$(BIN)/python -m pytest $(TWO_FILES) -m 'not slow' $(ARGS)

lint: setup ## ruff (rules and format) and mypy
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

audit: setup ## look every pinned package up: withdrawn versions, known vulnerabilities
	@$(BIN)/python scripts/audit.py $(ARGS)

format: setup ## let ruff put the sources in order
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

docs: $(DOCS_STAMP) ## build the documentation as a site into build/docs, and check its links
	@PYTHONPATH=scripts $(BIN)/python -m docs_site

$(DOCS_STAMP): $(STAMP) constraints-docs.txt
	@$(BIN)/python scripts/set_up.py --docs
	@touch $@

reference: setup ## write docs/configuration.md and docs/commands.md anew, from the code
	@PYTHONPATH=scripts:. $(BIN)/python -m docs_site.references

bench: setup ## measure sampler, environments, learner, buffer and adapter hand-over
	$(BIN)/gflowvlm bench $(ARGS)

chaos: setup ## run a real job on a local cluster of several nodes, kill parts of it, prove that nothing is lost
	@PYTHONPATH=scripts:. $(BIN)/python -m chaos $(ARGS)

compare-torchgfn: ## check the losses against torchgfn's, and measure both's speed (makes .venv-torchgfn)
	@if [ -z "$(PYTHON)" ]; then echo "compare-torchgfn: no Python 3.11 or later found;" \
	"install one, or name it: make compare-torchgfn PYTHON=/path/to/python3.11" >&2; exit 2; fi
	@PYTHONPATH=scripts $(PYTHON) -m torchgfn_environment
	@OMP_NUM_THREADS=1 PYTHONPATH=. .venv-torchgfn/bin/python -m gflowvlm.studies.proving.torchgfn $(ARGS)
