# `make demo` and `make test` work from a fresh clone, in either order.

BIN := .venv/bin
PYTHON ?=
export PYTHON

# Threads that wait for others go to sleep soon. By default they spin for long, and where the
# machine is shared that keeps it from the very threads they wait for (examples/demo.py).
export GOMP_SPINCOUNT ?= 10000

# Where `make bench` and `make receipts` look for WikiText-2 and a language model of it
# (benchmarks/bench.py, tools/receipts.py).
SHARED ?= ../shared

# How long `make chaos` takes, and what it draws.
SECONDS ?= 600
SEED ?= 1

# Tests in two processes, each file in one of them.
TESTS := $(BIN)/python -m pytest --numprocesses 2 --dist loadgroup

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-unit check format faults chaos receipts bench bench-scale bench-cluster clean

help: ## show this list
	@echo "make TARGET [PYTHON=python3.12]"
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 15

setup: ## make .venv with everything in it (the other targets do so themselves)
	@tools/setup.sh

demo: setup ## train an LM on Python's own documentation and give it a memory (minutes)
	@$(BIN)/python examples/demo.py

test: setup ## run all tests (some 15 minutes)
	@$(TESTS)

test-unit: setup ## run the tests of single modules (under a minute)
	@$(TESTS) tests/unit -m "not slow"

check: setup ## what CI runs: lint, format, types and tests
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(TESTS)

format: setup ## put the code in the house format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

faults: setup ## plant a thousand faults and check what happens (minutes)
	@$(BIN)/python tools/faults.py

chaos: setup ## kill commands at their write steps, a thousand times (SECONDS=600 SEED=1)
	@$(BIN)/python tools/chaos.py --seconds $(SECONDS) --seed $(SEED)

receipts: setup ## make the receipts of README's figures (25 minutes)
	@$(BIN)/python tools/receipts.py --shared "$(SHARED)"

bench: setup ## measure speed, memory and disk against other searches and the stock scorer (40 minutes)
	@env -u GOMP_SPINCOUNT $(BIN)/python benchmarks/bench.py --shared "$(SHARED)"

bench-scale: setup ## measure how the index grows, to ten million keys (15 minutes)
	@env -u GOMP_SPINCOUNT $(BIN)/python benchmarks/scale.py

bench-cluster: setup ## measure search in shards on Ray against the whole index (15 minutes)
	@env -u GOMP_SPINCOUNT $(BIN)/python benchmarks/cluster.py --shared "$(SHARED)"

clean: ## remove what the demo and the tools wrote, but not .venv
	rm -rf demo build .mypy_cache .pytest_cache .ruff_cache
