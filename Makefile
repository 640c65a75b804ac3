# All that a fresh machine needs is Python 3.11 or newer with venv: each command below makes .venv
# and installs into it where that has not been done.
PYTHON ?= python3
RECIPE ?= recipes/simplecnn.py
SETTINGS ?=                 # as in: make train SETTINGS="epochs=2 data.root=FOLDER"
CIFAR10 ?= $(if $(wildcard data/cifar-10-batches-py),data)
ENVIRONMENT := .venv/installed
BIN := .venv/bin

.PHONY: help train test check smoke bench

help:
	@echo 'make train   train recipes/simplecnn.py (RECIPE=FILE, SETTINGS="epochs=2 ...")'
	@echo 'make test    the tests'
	@echo 'make check   lint, format and types, as before a commit'
	@echo 'make smoke   a few batches of embedded pictures: does it learn?'
	@echo 'make bench   an epoch of the launcher and of two plain scripts (CIFAR10=FOLDER)'

train: $(ENVIRONMENT)
	$(BIN)/accelerate launch -m launcher $(RECIPE) $(SETTINGS)

test: $(ENVIRONMENT)
	$(BIN)/pytest

check: $(ENVIRONMENT)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

smoke: $(ENVIRONMENT)
	$(BIN)/python -m launcher $(RECIPE) --smoke

bench: $(ENVIRONMENT)
	mkdir -p build
	$(BIN)/python benchmarks/epoch.py --root "$(CIFAR10)" --output build/epoch.json

$(ENVIRONMENT): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -e ".[dev]"
	touch $@
