# The only list of commands. Every target does its own set-up.
.DEFAULT_GOAL := help
SHELL := /bin/sh
PYTHON := .venv/bin/python
TESTS := $(PYTHON) -m pytest -q
SLOW := tests/distributed $(wildcard tests/integration)
FAST := tests/unit $(wildcard tests/golden)

.PHONY: help setup demo test check lint layers types verify quick generate bench pins

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

setup: ## make .venv (every other target does it by itself)
	@requirements/install.sh

demo: setup ## teach a real model who it is: train, verify, compare its answers before and after (5 minutes)
	@$(PYTHON) examples/demo.py

test: check ## everything: check, then the tests that start processes
	$(TESTS) $(SLOW)

check: setup ## what to run before a commit (under a minute)
	@$(MAKE) --no-print-directory -j2 --output-sync=target quick types lint layers verify

quick: setup
	$(TESTS) $(FAST)

types: setup
	$(PYTHON) -m mypy

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

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

pins: setup ## pin the newest versions that pyproject.toml allows, in requirements/
	requirements/pin.sh
