# `make train` and `make test` do all the set-up; a second call installs nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SHELL := /bin/bash

.PHONY: train test fuzz lint clean

train: $(VENV)/.base
	$(BIN)/accelerate launch train.py --config config/smol.py

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

# About 15 minutes of one core; another SEED makes other inputs. What is found stays in finds/.
INPUTS ?= 100000
SEED ?= 0
fuzz: $(VENV)/.fuzz
	$(BIN)/python -m tests.fuzz --inputs $(INPUTS) --seed $(SEED) --keep finds

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
	  || { rm -rf $(VENV); echo "$(PYTHON) cannot make a virtual environment; on Debian: apt-get install python3-venv"; exit 1; }

$(VENV)/.base: requirements/base.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -r requirements/base.txt
	@touch $@

$(VENV)/.dev: requirements/dev.txt requirements/convert.txt $(VENV)/.base
	$(BIN)/python -m pip install --quiet -r requirements/dev.txt
	@touch $@

$(VENV)/.fuzz: requirements/fuzz.txt $(VENV)/.dev
	$(BIN)/python -m pip install --quiet -r requirements/fuzz.txt
	@touch $@

clean:
	rm -rf $(VENV)
