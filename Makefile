# `make demo` and `make test` do all set-up themselves. `make help` lists the rest.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NATIVE := $(wildcard src/hotstart/native/*.c src/hotstart/native/*.h)
ENGINE ?= vllm

.PHONY: help setup engine demo test test-long check lint format bench clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/.set-up $(VENV)/.criu ## packages, virtual environment, native programs, CRIU

$(VENV)/.packages: scripts/install-packages
	scripts/install-packages
	@mkdir -p $(VENV) && touch $@

$(VENV)/.set-up: $(VENV)/.packages pyproject.toml build_native.py $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev,plots]'
	@touch $@

$(VENV)/.criu: $(VENV)/.packages scripts/install-criu scripts/criu-selftest
	scripts/install-criu $(VENV)
	@touch $@

# The interpreter would compile every module at every start where it may not write next to the sources.
compiled: setup
	@$(BIN)/python -m compileall -q src/hotstart

engine: setup
	scripts/install-engine $(ENGINE)

demo: compiled engine ## a real language model: cold start, snapshot, plain CRIU, four replicas
	scripts/demo $(ENGINE)

test: compiled ## all tests but the long ones
	scripts/install-engine transformers
	$(BIN)/pytest -m "not long"

test-long: compiled ## soaks, fuzzing, big matrices
	scripts/install-engine transformers
	$(BIN)/pytest -m long

check: lint ## format, lint, types, layers, fast tests
	$(BIN)/pytest -q -m "not long and not criu"

lint: compiled ## format, lint, types, import layers
	$(BIN)/ruff format --check src tests bench build_native.py
	$(BIN)/ruff check src tests bench build_native.py
	$(BIN)/mypy
	$(BIN)/lint-imports

format: compiled ## rewrite the code as the formatter wants it
	$(BIN)/ruff format src tests bench build_native.py
	$(BIN)/ruff check --fix src tests bench build_native.py

bench: compiled ## cold start, plain CRIU and Hotstart for several sizes; out/bench
	scripts/install-engine torch
	$(BIN)/python bench/sizes.py

clean: ## remove what the other targets made
	rm -rf $(VENV) .engines out src/hotstart/native/bin .mypy_cache .pytest_cache .ruff_cache
