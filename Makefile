# make test    every test          make demo    build, check, ask and profile the embedded model
# make lint    style               make clean   remove what these made (not .venv)
# Each makes .venv when it is missing; afterwards nothing is installed again until pyproject.toml changes.

PYTHON ?= python3
EXTRAS ?= export,dev
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
READY := $(VENV)/.ready
UHD := $(BIN)/uhd-export
BUNDLE := demo/nano
IMAGE := examples/cards-1.png
QUESTION := What is the code on the red card?

.PHONY: help test demo lint clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# //p' Makefile | head -n 3

$(READY): pyproject.toml
	@echo "==> virtual environment in $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "==> PyTorch, CPU build where the index has one"
	@$(PIP) install torch==2.13.0
	@echo "==> uhd-export[$(EXTRAS)] and what it needs, a few minutes the first time"
	@$(PIP) install --editable '.[$(EXTRAS)]'
	@touch $@

test: $(READY)
	@echo "==> tests"
	@$(BIN)/python -m pytest -n 2 --dist loadfile -q --durations=15 --durations-min=1

lint: $(READY)
	@echo "==> ruff"
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .

demo: $(READY)
	@echo "==> build: nano, a small LLaVA-UHD v2 checkpoint in this package, into $(BUNDLE)"
	@rm -rf $(BUNDLE)
	@$(UHD) build nano -o $(BUNDLE)
	@echo "==> check: file hashes, and each part against PyTorch"
	@$(UHD) check $(BUNDLE)
	@echo "==> run: $(IMAGE), \"$(QUESTION)\""
	@$(UHD) run $(BUNDLE) $(IMAGE) "$(QUESTION)"
	@echo "==> profile: a 1008x672 image"
	@$(UHD) profile $(BUNDLE) --size 1008x672

clean:
	@rm -rf demo build dist .pytest_cache .hypothesis .ruff_cache
