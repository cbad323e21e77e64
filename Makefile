# Two commands: `make serve` shows the site, `make test` proves it. Both make their environment.
# The lock holds the CPU build of torch for Python 3.11 on Linux, so that one comes first.
PYTHON ?= $(firstword $(shell command -v python3.11) python3)
VENV   ?= .venv
BIN    := $(VENV)/bin
JOBS   ?= auto
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export NO_MKDOCS_2_WARNING = 1
export OMP_NUM_THREADS = 1

.PHONY: help serve test check unit pages browser prove site zensical bench lock clean

help:
	@echo "make serve    read the site in a browser (runs no article code)"
	@echo "make test     prove everything: lint, unit tests, every page, strict build, browser"
	@echo "make check    lint and types, of the sources and of the pages' blocks"
	@echo "make prove    run the pages whose proof is stale and record what they show"
	@echo "make site     strict build into site/;  make zensical: the same with Zensical"
	@echo "make bench    measure the engine against plain Python"

# The environment, from the locks: docs alone for reading, everything for proving.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "Zhizhi needs Python 3.11 or newer; name one with: make PYTHON=python3.11 ..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "This Python cannot make a virtual environment; install its venv package (Debian: python3-venv)."; exit 1; }
	@echo "==> making $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/docs.stamp: requirements/docs.lock pyproject.toml | $(BIN)/python
	@echo "==> installing what the site needs (requirements/docs.lock)"
	@$(BIN)/python -m pip install --quiet --no-deps --require-hashes -r requirements/docs.lock
	@$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/dev.stamp: requirements/dev.lock pyproject.toml | $(BIN)/python
	@echo "==> installing everything that proving needs (requirements/dev.lock; some minutes the first time)"
	@$(BIN)/python -m pip install --quiet --no-deps --require-hashes -r requirements/dev.lock || \
	  { echo "The locked set does not install here. On Linux the lock means the CPU build of torch 2.13.0 for Python 3.11: point pip at an index that has it (PIP_EXTRA_INDEX_URL), and name that Python (make PYTHON=python3.11)."; exit 1; }
	@$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@ $(VENV)/docs.stamp

serve: $(VENV)/docs.stamp
	@echo "==> http://127.0.0.1:8000/ (the first build takes some seconds)"
	@$(BIN)/python -m mkdocs serve

test: check unit pages browser
	@echo "==> all proven"

check: $(VENV)/dev.stamp
	@echo "==> lint and types"
	@$(BIN)/ruff format --check --quiet . || { echo "run: $(BIN)/ruff format ."; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/pyrefly check --summary=none
	@$(BIN)/python -m mdproof lint

unit: $(VENV)/dev.stamp
	@echo "==> unit tests, parity with peer libraries, docstring examples"
	@$(BIN)/python -m pytest tests src/zhizhi --doctest-modules -m "not site" -n $(JOBS) --dist loadgroup -q --durations=12

pages: $(VENV)/dev.stamp
	@echo "==> every block and every runnable copy of every page"
	@$(BIN)/python -m pytest docs -n $(JOBS) --dist loadgroup -q --durations=5

browser: $(VENV)/dev.stamp
	@echo "==> strict build and the site in a real browser"
	@$(BIN)/python -m pytest tests/site -n $(JOBS) --dist loadgroup -q

prove: $(VENV)/dev.stamp
	@$(BIN)/python -m mdproof prove

site: $(VENV)/docs.stamp
	@$(BIN)/python -m mkdocs build --strict

zensical: $(VENV)/docs.stamp
	@MDPROOF_STRICT=1 $(BIN)/zensical build --clean

bench: $(VENV)/dev.stamp
	@$(BIN)/python tests/mdproof/bench_engine.py

lock: $(VENV)/dev.stamp
	@$(BIN)/python requirements/lock.py

clean:
	rm -rf site .cache .pytest_cache .ruff_cache .hypothesis
