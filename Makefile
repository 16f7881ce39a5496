# Every target sets up its own virtual environment, so that `make demo` and `make test` work in a fresh clone.
#
#   make demo        install, then train two workers against two servers on real data
#   make test        the tests that take a few minutes, two files at a time (ARGS="-n 0 --pdb" for one)
#   make test-full   all tests, but those that need a GPU
#   make test-cuda   those that need a GPU; says "not run" where there is none
#   make check       formatting, lint, types, layers
#   make bench       push_pull beside gloo all_reduce
#   make clean       remove what the targets above have made
#
# VENV=path     where the environment lives (it may be shared between clones of one version)
# PYTHON=path   the interpreter it is made from, 3.11 or newer
# ARGS="..."    handed on to pytest, the demo or the bench
# pip's own PIP_* variables hold as usual, for a mirror or for another build of torch.

VENV ?= .venv
PYTHON ?= python3
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INPUTS := pyproject.toml setup.py constraints.txt ps_accordion/__init__.py

.PHONY: demo test test-full test-cuda check bench clean install install-dev
.DELETE_ON_ERROR:

demo: install
	$(BIN)/ps-accordion demo $(ARGS)

# Most tests run on one core or wait for processes, so two files at a time take little more than half the time of one. In the
# order of their names: files of few long tests would come last otherwise, and the last one runs alone.
test: install-dev
	$(BIN)/python -m pytest -m "not full and not cuda" -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# The longer suites kill and stop processes by the dozen: one at a time.
test-full: test
	$(BIN)/python -m pytest -m "full and not cuda" $(ARGS)

# Without a GPU there is nothing to collect, which pytest would call an error: say what it means.
test-cuda: install-dev
	@status=0; $(BIN)/python -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else 77)' || status=$$?; \
	case $$status in \
	  0) $(BIN)/python -m pytest -m cuda $(ARGS) ;; \
	  77) echo "test-cuda: not run: no CUDA device" ;; \
	  *) exit $$status ;; \
	esac

check: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: install
	$(BIN)/ps-accordion bench pushpull $(ARGS)

install: $(VENV)/.installed

install-dev: $(VENV)/.installed-dev

# pip comes first: dependency groups need 25.1 or newer, and Debian's own is older.
# The warning that is hidden says that a folder here has the name of the package: it is what we install.
$(VENV)/.installed: $(INPUTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "ps-accordion needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) cannot make virtual environments. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt pip setuptools
	PYTHONWARNINGS='ignore:Editable installation' \
	  $(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable '.[demo]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install --quiet --constraint constraints.txt --group dev
	@touch $@

# Only what git ignores and we have made; run directories stay, they are results.
clean:
	rm -rf .venv build dist ps_accordion.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find ps_accordion server worker launcher tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +
