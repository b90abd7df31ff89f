# `make demo` reads a book, `make test` checks everything; both set up their own environment first.
# No environment tool is needed beyond python3 with venv.
#
#   make test PYTHON=python3.12                # another interpreter for the environment
#   make test TORCH="torch==2.9.1"             # another build of torch, anything `pip install` takes
#   make test VENV=~/envs/mine TORCH=torch     # an environment of yours; a torch already there stays

PYTHON ?= python3
VENV ?= .venv
VENV_OLDEST ?= .venv-oldest
# Installed first and exactly, so that no later requirement brings another build of it.
TORCH ?= torch==2.13.0
OLDEST_TRANSFORMERS ?= 5.15.0
# pytest processes; the tests keep torch to one thread in each
JOBS ?= 2
PYTEST_ARGS ?=

PIP_INSTALL = -m pip install --quiet --disable-pip-version-check
DEMO_READY = $(VENV)/.demo-ready
DEV_READY = $(VENV)/.dev-ready
OLDEST_READY = $(VENV_OLDEST)/.ready
# transformers' own model tests, of the version that is installed, for modeling_tests/common_mixins
FETCH_MIXINS = modeling_tests/common_mixins/fetch_transformers_tests.py .cache/transformers-tests

.PHONY: cards help demo test lint types format smoke-oldest suite gpu-test bench clean

help:
	@echo "make demo          read a whole book with the small checkpoint and ask it a question"
	@echo "make test          lint, types, smoke tests on transformers $(OLDEST_TRANSFORMERS), the whole suite on the newest"
	@echo "make lint|types|smoke-oldest|suite    the parts of it"
	@echo "make format        rewrite the sources in the project's format"
	@echo "make gpu-test      the tests that need a CUDA device"
	@echo "make cards         copy today's code into the checkpoints of model_cards/"
	@echo "make bench         CPU prefill against transformers' Mamba"
	@echo "make clean         remove the environments and caches"

demo: $(DEMO_READY)
	$(VENV)/bin/python examples/read_a_book.py

# The whole suite comes last, so that pytest's summary closes the output.
test: lint types smoke-oldest
	@$(MAKE) --no-print-directory suite

lint: $(DEV_READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(DEV_READY)
	$(VENV)/bin/mypy

smoke-oldest: $(OLDEST_READY)
	$(VENV_OLDEST)/bin/python -m pytest -q -n $(JOBS) -m smoke $(PYTEST_ARGS)

suite: $(DEV_READY)
	$(VENV)/bin/python -m pytest -q -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

gpu-test: $(DEV_READY)
	$(VENV)/bin/python -m pytest -q -n 8 modeling_tests/gpu $(PYTEST_ARGS)

# The checkpoints carry the code as it is today; a test compares them.
cards: $(DEV_READY)
	$(VENV)/bin/python model_cards/copy_code.py

format: $(DEV_READY)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(DEV_READY)
	$(VENV)/bin/python benchmarks/cpu_prefill.py
	$(VENV)/bin/python benchmarks/cpu_prefill.py --family remamba2

clean:
	rm -rf .venv .venv-oldest .cache .pytest_cache .mypy_cache .ruff_cache build *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV_OLDEST)/bin/python:
	$(PYTHON) -m venv $(VENV_OLDEST)

$(DEMO_READY): pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python $(PIP_INSTALL) "$(TORCH)"
	$(VENV)/bin/python $(PIP_INSTALL) --editable ".[eval]"
	@touch $@

$(DEV_READY): pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python $(PIP_INSTALL) "$(TORCH)"
	$(VENV)/bin/python $(PIP_INSTALL) --editable ".[dev,browser]"
	$(VENV)/bin/python $(FETCH_MIXINS)
	@touch $@ $(DEMO_READY)

$(OLDEST_READY): pyproject.toml Makefile | $(VENV_OLDEST)/bin/python
	$(VENV_OLDEST)/bin/python $(PIP_INSTALL) "$(TORCH)"
	$(VENV_OLDEST)/bin/python $(PIP_INSTALL) "transformers==$(OLDEST_TRANSFORMERS)" --editable ".[dev]"
	$(VENV_OLDEST)/bin/python $(FETCH_MIXINS)
	@touch $@
