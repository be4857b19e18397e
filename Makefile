# Two commands on a fresh machine: `make demo` and `make test`. Each creates .venv and installs what it needs.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

SOURCES := pyproject.toml constraints.txt $(wildcard hf_ternary/csrc/*)
PLUGIN_TESTS := tests/test_*.py tests/ops

help:  ## Show this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## (.*)/  make \1\t\2/' | expand -t 24

# $(call install,FOLDER,EXTRAS AND PINS): an environment with this project and those extras
define install
	test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	$(1)/bin/pip install --quiet --upgrade pip
	$(1)/bin/pip install --quiet --constraint constraints.txt torch
	$(1)/bin/pip install --quiet --constraint constraints.txt $(2)
endef

$(VENV)/demo: $(SOURCES)
	$(call install,$(VENV),--editable '.[demo]')
	@touch $@

$(VENV)/dev: $(SOURCES)
	$(call install,$(VENV),--editable '.[dev]')
	$(BIN)/python -c 'import hf_ternary._native' # a developer's install must not fall back to the reference
	@touch $@ $(VENV)/demo

install: $(VENV)/dev  ## Create .venv with everything a developer needs

demo: $(VENV)/demo  ## Ternarize and briefly distil the real MiniLM, reload it, print size, fidelity and speed (5 minutes)
	$(BIN)/python recipes/demo.py

test: $(VENV)/dev  ## Run every test
	$(BIN)/pytest

lint: $(VENV)/dev  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/dev  ## Apply ruff's fixes and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

fuzz: $(VENV)/dev  ## Damage model folders until one is fatal; Ctrl-C ends it
	HYPOTHESIS_PROFILE=fuzz $(BIN)/pytest tests/fuzz --timeout=0

sanitize: $(VENV)/dev  ## Check the C++ code for errors of memory, undefined behaviour and data races (minutes)
	HF_TERNARY_SANITIZE=1 $(BIN)/pytest tests/ops/test_csrc.py

test-oldest:  ## Run the plugin's tests on the oldest supported transformers, and on 5.17 with sentence-transformers 6.0.1
	$(call install,.venv-5.0,--editable '.[hf]' transformers==5.0.0 sentence-transformers==5.4.0 pytest pytest-timeout)
	.venv-5.0/bin/python -c 'import hf_ternary._native'
	.venv-5.0/bin/pytest $(PLUGIN_TESTS)
	$(call install,.venv-5.17,--editable '.[hf]' transformers==5.17.0 sentence-transformers==6.0.1 pytest pytest-timeout)
	.venv-5.17/bin/python -c 'import hf_ternary._native'
	.venv-5.17/bin/pytest $(PLUGIN_TESTS)

neon-tools:  ## Install what the NEON kernel's tests need on x86 (Debian: a cross compiler and an emulator)
	apt-get install --yes --quiet --no-install-recommends g++-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user-static

clean:  ## Remove environments and build output
	rm -rf .venv .venv-5.0 .venv-5.17 build .mypy_cache .pytest_cache .ruff_cache

.PHONY: help install demo test lint format fuzz sanitize test-oldest neon-tools clean
