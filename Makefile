# `make train` and `make test` set up whatever they need; `make` alone lists what there is.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
CORPUS ?=
WANTED := Python 3.11 to 3.13 is needed: name yours with make PYTHON=python3.12, or let uv bring one with pip install uv, uv python install 3.11, make PYTHON=~/.local/bin/python3.11

.DEFAULT_GOAL := help
.PHONY: help setup train test lint clean

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: $(VENV)/.ready ## make .venv with everything (torch, torch_xla, test tools); about 5 minutes

$(VENV)/.ready: requirements.txt requirements-xla_tpu.txt requirements-dev.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is not there; $(WANTED)" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo "error: $$($(PYTHON) --version) does not fit; $(WANTED)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-xla_tpu.txt -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

train: setup ## prepare text, train a small model through XLA on the CPU, evaluate it, write a sample; CORPUS=path for your own text
	PJRT_DEVICE=CPU $(BIN)/python -m pretrain_xla quickstart $(if $(CORPUS),--corpus "$(CORPUS)")

test: setup lint ## lint, types and all tests
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: setup ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean: ## remove .venv and every cache; data/ and runs/ stay
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
