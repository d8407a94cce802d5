# Two commands for a new user: `make demo` and `make test`. Both set everything up first, in .venv/ of this folder.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: help setup demo test test-datasets3 lint format types check golden clean

help:  ## this list
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

setup: $(STAMP)  ## make .venv/ and install hf_mel with what tests and demo need

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(shell grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,bench]'
	touch $@

demo: setup  ## the whole way on the embedded data set: build, train, evaluate, build a KB, link a mention
	HF_HUB_OFFLINE=1 $(BIN)/hf-mel demo

test: setup  ## all tests, offline
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

lint: setup  ## ruff: lint and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup  ## rewrite files in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: setup  ## mypy
	$(BIN)/mypy

check: lint types test  ## what CI runs

OLD := .venv-datasets3
test-datasets3: $(OLD)/.installed  ## every builder as a script of datasets 3.x, in an environment of its own
	HF_HUB_OFFLINE=1 $(OLD)/bin/python -m tests.dataset_scripts.old_datasets

$(OLD)/.installed: pyproject.toml
	$(PYTHON) -m venv $(OLD)
	$(OLD)/bin/python -m pip install --quiet 'datasets>=3,<4' pillow
	$(OLD)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

golden: setup  ## compare with golden values of the published network: make golden GOLDEN=FOLDER
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.modeling.check_golden $(GOLDEN)

clean:  ## remove the environment and caches, not your data or runs
	rm -rf $(VENV) $(OLD) .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
