# The only list of commands. Every target does its own set-up.
.DEFAULT_GOAL := help
SHELL := /bin/sh
PYTHON := .venv/bin/python
TESTS := $(PYTHON) -m pytest -q
FAST := tests/unit tests/golden
SLOW := tests/distributed tests/integration
# A cluster with a node takes network namespaces and mounts, so root.
ifeq ($(shell id -u),0)
SLOW += tests/e2e
endif

.PHONY: help setup demo test test-gpu check lint layers types verify quick generate bench bench-gpu bench-operator pins cluster cluster-down

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' Makefile

setup: ## make .venv (every other target does it by itself)
	@requirements/install.sh

demo: setup ## teach a real model who it is: train, verify, compare its answers before and after (5 minutes)
	@$(PYTHON) examples/demo.py

test: check ## everything: check, then the tests that start processes; those on a cluster with a node as root only
	@$(if $(findstring e2e,$(SLOW)),,echo "test: tests/e2e needs root and is left out; sudo make test runs it")
	$(TESTS) $(SLOW)

check: setup ## what to run before a commit (under a minute)
	@$(MAKE) --no-print-directory -j2 --output-sync=target quick types lint layers verify

quick: setup
	$(TESTS) -n 2 $(FAST)

types: setup
	$(PYTHON) -m mypy

test-gpu: ## tests/gpu with the interpreter given (make test-gpu PYTHON=python3); installs nothing. ARGS: more for pytest
	PYTHONPATH=trainer_image:operator$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) tests/gpu/side_by_side.py $(ARGS)

bench-gpu: ## our engine beside ms-swift on two GPUs (make bench-gpu WORK=lora-long-best,start PYTHON=python3); installs nothing. ARGS: more
	PYTHONPATH=trainer_image:operator$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) tests/bench/gpu.py "$(WORK)" $(ARGS)

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/hadolint --failure-threshold style Dockerfile trainer_image/Dockerfile

layers: setup
	.venv/bin/lint-imports

verify: setup ## are the generated files fresh?
	$(PYTHON) -m finetune_trainer.generate --check
	$(PYTHON) -m finetune_operator.generate --check

generate: setup ## write the generated files
	$(PYTHON) -m finetune_trainer.generate
	$(PYTHON) -m finetune_operator.generate

bench: setup ## measure the engine against transformers + PEFT; writes docs/benchmarks/
	$(PYTHON) tests/bench/engine.py

bench-operator: setup ## measure the operator in bursts of jobs on a real API server (6 minutes); writes docs/benchmarks/
	$(PYTHON) tests/bench/operator_burst.py

cluster: setup ## a real Kubernetes with one node on this machine to play with (needs root; the first time builds it: 15 minutes)
	@$(PYTHON) tests/kube/kube_playground.py up

cluster-down: setup ## end it; nothing is left of it
	@$(PYTHON) tests/kube/kube_playground.py down

pins: setup ## pin the newest versions that pyproject.toml allows, in requirements/
	requirements/pin.sh
