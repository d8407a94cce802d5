# Two commands for a new user: `make demo` and `make test`. Both set everything up first, in .venv/ of this folder.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: help setup demo test test-all torture bench test-browser test-space test-wheel test-datasets3 docs lint format types check golden clean

help:  ## this list
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

setup: $(STAMP)  ## make .venv/ and install hf_mel with what tests and demo need

$(STAMP): pyproject.toml constraints.txt
	@echo "Installing hf_mel into $(VENV)/. This takes a few minutes, once."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@$(BIN)/python -m pip install --quiet $(shell grep '^torch==' constraints.txt)
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,bench]'
	@touch $@
	@echo "Installed. To use it in this shell: source $(BIN)/activate"

demo: setup  ## the whole way on the embedded data set: build, train, evaluate, build a KB, link a mention, annotate a post
	@HF_HUB_OFFLINE=1 $(BIN)/hf-mel demo

PYTEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q
test: setup  ## the tests, offline: less than ten minutes on two free cores
	$(PYTEST) -n 2 --dist loadfile -m "not browser and not slow"

test-all: setup  ## the tests, and those that take minutes
	$(PYTEST) -n 2 --dist loadfile -m "not browser"

INPUTS ?= 100000
KILLS ?= 20
MINUTES ?= 30
torture: setup  ## hostile inputs (INPUTS=100000), kills of each command (KILLS=20), threads and the Space (MINUTES=30 each); repeat it to go on
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --inputs $(INPUTS)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m tests.crash --kills $(KILLS)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak --minutes $(MINUTES)

test-browser: setup  ## the Space in a real browser; screenshots in artifacts/space
	@for name in chromium chromium-browser google-chrome; do command -v $$name >/dev/null && exit 0; done; \
	{ apt-get update -qq && apt-get install -y -qq chromium; } >/dev/null 2>&1 || \
	echo "There is no Chromium, and it could not be installed (apt-get install chromium): these tests are skipped."
	MEL_SCREENSHOTS=artifacts/space $(PYTEST) -m browser tests/spaces

docs: setup  ## build the documentation into site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

ALONE := .venv-space
test-space: setup  ## the Space's folder alone, in an environment of its own: takes minutes
	$(PYTHON) -m venv --clear $(ALONE)
	$(ALONE)/bin/python -m pip install --quiet $(shell grep '^torch==' constraints.txt)
	$(ALONE)/bin/python -m pip install --quiet --constraint constraints.txt . -r spaces/entity_linking/requirements.txt
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.spaces.check_alone $(ALONE)/bin/python

WHEEL := .venv-wheel
test-wheel: setup  ## the demo from a wheel, in an empty environment and an empty folder
	rm -rf build artifacts/wheel $(WHEEL) && $(PYTHON) -m venv $(WHEEL)
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir artifacts/wheel .
	$(WHEEL)/bin/python -m pip install --quiet $(shell grep '^torch==' constraints.txt)
	$(WHEEL)/bin/python -m pip install --quiet --constraint constraints.txt artifacts/wheel/*.whl
	cd "$$(mktemp -d)" && HF_HUB_OFFLINE=1 $(CURDIR)/$(WHEEL)/bin/hf-mel demo && rm -r "$$PWD"

bench: setup  ## time the library beside plain references, alone on the machine; everything: make bench BENCH=--full
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks $(BENCH)

lint: setup  ## ruff: lint and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup  ## rewrite files in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: setup  ## mypy
	$(BIN)/mypy

check: lint types test-all docs test-browser test-wheel  ## what CI runs

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
	rm -rf $(VENV) $(OLD) $(ALONE) $(WHEEL) .mypy_cache .ruff_cache .pytest_cache .hypothesis build site *.egg-info
