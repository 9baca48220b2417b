# `make demo` and `make test` work from a fresh clone, in either order.

BIN := .venv/bin
PYTHON ?=
export PYTHON

# Threads that wait for others go to sleep soon. By default they spin for long, and where the
# machine is shared that keeps it from the very threads they wait for (examples/demo.py).
export GOMP_SPINCOUNT ?= 10000

.DEFAULT_GOAL := help
.PHONY: help setup demo test check format clean

help: ## show this list
	@echo "make TARGET [PYTHON=python3.12]"
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 12

setup: ## make .venv with everything in it (the other targets do so themselves)
	@tools/setup.sh

demo: setup ## train an LM on Python's own documentation and give it a memory (minutes)
	@$(BIN)/python examples/demo.py

test: setup ## run the tests
	@$(BIN)/python -m pytest

check: setup ## what CI runs: lint, format, types and tests
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest

format: setup ## put the code in the house format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean: ## remove what the demo and the tools wrote, but not .venv
	rm -rf demo build .mypy_cache .pytest_cache .ruff_cache
