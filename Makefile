# `make demo` and `make test` are all the set-up there is. Variables:
#   PYTHON       the interpreter that creates the environment
#   VENV         where the environment lives
#   CONSTRAINTS  file of the versions to install, empty for the newest
#   TORCH_INDEX  a package index to take torch from, e.g. https://download.pytorch.org/whl/cpu (default: pip's own)
#   PYTEST_ARGS  replaces the default arguments of `make test`
#   PYTHON_OLDEST, PYTHON_NEWEST  in place of PYTHON for `make test-oldest`, `make test-newest`
#   BENCH_ARGS   given to every benchmark of `make bench`, and to `make chaos`, e.g. --quick
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
PYTHON_OLDEST ?= $(PYTHON)
PYTHON_NEWEST ?= $(PYTHON)
TORCH_INDEX ?=
PYTEST_ARGS ?= -q -n 2 --dist loadfile
BENCH_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS))

.PHONY: help demo test test-oldest test-newest test-slow test-hosts test-browser test-gpu sanitize check aot bench chaos clean
.DELETE_ON_ERROR:

help:
	@echo "make demo | test | test-oldest | test-newest | test-slow | test-hosts | test-browser | test-gpu | sanitize | check | aot | bench | chaos | clean"

# torch goes first and alone: with a CPU build already there, nothing later asks for CUDA packages.
$(VENV)/.installed: setup.py $(CONSTRAINTS)
	@echo "Installing into $(VENV) (once; a few minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@$(PIP) -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@echo "Installing the test tools into $(VENV) (once)"
	@$(PIP) -e ".[test]"
	@touch $@

$(VENV)/.installed-hosts: $(VENV)/.installed-test
	@echo "Installing lm-eval into $(VENV) (once; 600 MB)"
	@$(PIP) -e ".[eval]"
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/llada2-fast generate "Add 847 and 96."
	$(BIN)/llada2-fast generate "Spell 4071, 22, 608."
	$(BIN)/llada2-fast generate "Reverse moon crow bread lamp seal."
	$(BIN)/llada2-fast generate "Tell a story about Max the goat near the lake."

test: $(VENV)/.installed-test
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

# The ends of setup.py's ranges, each in an environment of its own; the newest is what it was when that was made.
.venv-oldest/constraints.txt: setup.py
	@mkdir -p $(@D)
	@grep -oE '(torch|triton|transformers)>=[0-9.]+' $< | sed 's/>=/==/' > $@

test-oldest: .venv-oldest/constraints.txt
	@$(MAKE) test VENV=.venv-oldest CONSTRAINTS=$< PYTHON=$(PYTHON_OLDEST)

test-newest:
	@$(MAKE) test VENV=.venv-newest CONSTRAINTS= PYTHON=$(PYTHON_NEWEST)

test-slow: $(VENV)/.installed-test
	@$(BIN)/python -m pytest -q -m slow --timeout 3600

test-hosts: $(VENV)/.installed-hosts
	@$(BIN)/python -m pytest -q -m hosts --timeout 3600

# What drives the browser comes from npm; the browser itself is the system's, CHROMIUM=... if not chromium on PATH.
build/browser/.installed: Makefile
	@mkdir -p $(@D)
	@npm install --prefix $(@D) --no-save --no-audit --no-fund --loglevel=error playwright-core@1.65.1 axe-core@4.14.1
	@touch $@

test-browser: $(VENV)/.installed-test build/browser/.installed
	@$(BIN)/python -m pytest -q -m browser

test-gpu: $(VENV)/.installed-test
	@$(BIN)/python -m pytest -q -m gpu

sanitize: $(VENV)/.installed-test
	@command -v compute-sanitizer >/dev/null || { echo "sanitize: needs compute-sanitizer (CUDA toolkit), found none"; exit 2; }
	@$(BIN)/python -m benchmarks.gpu.day --only memcheck,racecheck --minutes 60 --out build/sanitize

check: $(VENV)/.installed-test
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/python -m pytest -q tests/test_layers.py

aot: $(VENV)/.installed-test
	@$(BIN)/python -m benchmarks.aot
	@$(BIN)/python -m benchmarks.counts --parts aot --check

# This machine's numbers: lines are added to benchmarks/results/, README's tables and plots are made from them.
bench: $(VENV)/.installed-test
	@for name in decode layer throughput "throughput --peers" latency host kernels quality refine; do \
		echo "llada2-fast bench $$name"; \
		$(BIN)/llada2-fast bench $$name --save $(BENCH_ARGS) || exit 1; \
	done
	@$(BIN)/python -m benchmarks.report

# The server under everything that clients do wrong: a table of gates, a quarter of an hour.
chaos: $(VENV)/.installed-test
	@$(BIN)/python -m benchmarks.chaos $(BENCH_ARGS)

clean:
	rm -rf .venv .venv-oldest .venv-newest build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .schemathesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
