# The two commands of a fresh machine that has python3 and make:   make demo   and   make test
# Everything is installed into .venv, from the package index that pip is set up with.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# Each stamp is the record of one finished installation; a changed setup.py makes it again.
RUNTIME_STAMP := $(VENV)/.installed-runtime
TEST_STAMP    := $(VENV)/.installed-test

# An image folder, a tar, parquet files, ... as tools/make_shards.py takes them; empty: synthetic images.
IMAGES ?=
# More options of tools/demo.py, as in  make demo DEMO_ARGS="--out /tmp/demo"
DEMO_ARGS ?=
# What pytest runs, as in  make test TESTS="tests/pipeline/sampling/test_order.py -x"
TESTS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test test-faults test-wheel lint format clean
.DELETE_ON_ERROR:

help:  ## this list
	@echo "make demo                  shards, pretraining, kNN, preview and plot on synthetic images -> demo/"
	@echo "make demo IMAGES=SOURCE    the same on your images: a folder, a tar, parquet files"
	@echo "make test                  every test but the long ones of make test-faults"
	@echo "make test-faults           runs killed at many points, restarted by torchrun, on bad data (half an hour)"
	@echo "make test-wheel            the wheel and the editable install in an empty environment (minutes)"
	@echo "make lint                  ruff, mypy and import-linter"
	@echo "make format                let ruff lay out the code"
	@echo "make clean                 remove .venv, demo/ and caches"
	@echo
	@echo "PYTHON=python3.12 chooses the Python (3.10 or newer) that .venv is made with."

demo: $(RUNTIME_STAMP)  ## the main job, from images to a trained encoder
	$(BIN)/python tools/demo.py $(if $(IMAGES),--images "$(IMAGES)") $(DEMO_ARGS)

test: $(TEST_STAMP)  ## every test but the long fault tests
	$(BIN)/python -m pytest $(TESTS)

test-faults: $(TEST_STAMP)  ## the long fault tests
	$(BIN)/python -m pytest -m faults $(TESTS)

test-wheel: $(TEST_STAMP)  ## the package as others install it
	$(BIN)/python -m pytest -m wheel $(TESTS)

lint: $(TEST_STAMP)  ## ruff, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(TEST_STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) demo build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "error: $(PYTHON) is missing or older than 3.10: install a newer Python and say  make PYTHON=python3.12 ..." >&2; \
	  exit 2; }
	@$(PYTHON) -m venv $(VENV) || { \
	  rm -rf $(VENV); \
	  echo "error: $(PYTHON) -m venv failed. On Debian and Ubuntu: apt install python3-venv (or python3.X-venv)." >&2; \
	  exit 2; }

# One call of pip: torch and torchvision are chosen together, or they may not fit each other.
$(RUNTIME_STAMP): setup.py | $(BIN)/python
	@echo "installing into $(VENV) (PyTorch and DALI are large: a few minutes)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

# The test tools come on top of the same packages, so this installation satisfies the demo too.
$(TEST_STAMP): setup.py | $(BIN)/python
	@echo "installing into $(VENV), with the test tools (PyTorch and DALI are large: a few minutes)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[test]"
	@touch $@ $(RUNTIME_STAMP)
