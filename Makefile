# make demo | test | lint | bench | clean: each sets up what it needs in .venv, from a fresh clone, without root.
#
# Needed beforehand: Python 3.10 or newer with its venv module and headers, and a C compiler.
#   PYTHON=/path/to/python   choose the interpreter (read when .venv is made)
#   FILE=/path               make demo: move this file instead of one made on the spot
#   ARGS='...'               further arguments for demo, pytest or the benchmarks
# Works with GNU make 3.81, which is what macOS has.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
STAMP_2022 := .venv-2022/.installed
STAMP_OIDC := tests/hub/oidc_provider/node_modules/.installed
STAMP_ABLY_JS := tests/embedded/ably_js/node_modules/.installed
BENCH_STAMP := $(VENV)/.installed-bench
SOURCES := pyproject.toml setup.py $(wildcard src/kachery_fast/*.pyx src/kachery_fast/*.pxd \
             src/kachery_fast/*.c src/kachery_fast/*.h)
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input

export FILE ARGS PYTHON

.PHONY: help setup demo test run-tests lint bench clean
help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -7

setup: $(STAMP)

demo: $(STAMP)
	@if [ -n "$$FILE" ]; then exec $(BIN)/kachery-fast demo $$ARGS "$$FILE"; \
	else exec $(BIN)/kachery-fast demo $$ARGS; fi

test: lint run-tests

# Most tests wait for processes and sockets, so two run at once for each CPU, up to four; a file's in turn.
# Compiled once: where PYTHONDONTWRITEBYTECODE is set, each of the programs that tests start would do it anew.
run-tests: $(STAMP) $(STAMP_2022) $(STAMP_OIDC) $(STAMP_ABLY_JS)
	$(BIN)/python -m compileall -q src tests
	workers=$$($(BIN)/python -c 'import os; print(min(2 * (os.cpu_count() or 1), 4))') && \
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --numprocesses $$workers --dist loadfile --no-loadscope-reorder --benchmark-disable $$ARGS

# cython-lint looks for pycodestyle on the PATH.
lint: $(STAMP)
	$(BIN)/python -m ruff check src tests benchmarks docs setup.py .ci/compare_benchmarks.py
	$(BIN)/python -m mypy
	PATH="$(CURDIR)/$(BIN):$$PATH" cython-lint src/kachery_fast/*.pyx src/kachery_fast/*.pxd

bench: $(BENCH_STAMP)
	$(BIN)/python -m benchmarks $$ARGS

clean:
	rm -rf $(VENV) .venv-2022 tests/hub/oidc_provider/node_modules tests/embedded/ably_js/node_modules build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks .coverage src/*.egg-info
	rm -f src/kachery_fast/*.so
	find src tests benchmarks -type d -name __pycache__ -prune -exec rm -rf {} +

$(STAMP): $(SOURCES) .ci/find-python
	@if [ ! -x $(BIN)/python ]; then \
	  python=$$(.ci/find-python) || exit 1; \
	  echo "Making $(VENV) with $$("$$python" --version) ($$python)"; \
	  "$$python" -m venv $(VENV) || exit 1; \
	fi
	@echo "Installing kachery-fast and what it needs into $(VENV) (a minute or two)"
	@$(PIP) install --quiet --upgrade pip || true  # that of Python 3.11 takes twice as long
	@$(PIP) install --quiet --no-compile --editable '.[hub,test]'
	@$(BIN)/python -m compileall -qq -j 0 $(VENV) || true  # pip uses one CPU; what cannot be compiled is not run
	@touch $@

$(BENCH_STAMP): $(STAMP) $(STAMP_2022)
	@echo "Installing what the benchmarks need besides"
	@$(PIP) install --quiet --editable '.[hub,test,bench]'
	@touch $@

# The client of 2022, which the tests run against our node; in an environment of its own, as a user has it.
$(STAMP_2022): .ci/find-python
	@echo "Installing kachery-client 1.2.0 into .venv-2022"
	@python=$$(.ci/find-python) && "$$python" -m venv --clear .venv-2022
	@.venv-2022/bin/python -m pip --disable-pip-version-check --no-input install --quiet kachery-client==1.2.0 'numpy<2; python_version<"3.13"' \
	  'numpy; python_version>="3.13"'
	@touch $@

# The OpenID provider that sign-in is tested with. Without npm its tests are skipped, with the reason.
$(STAMP_OIDC): tests/hub/oidc_provider/package-lock.json
	@if ! command -v npm >/dev/null || ! command -v node >/dev/null; then echo "There is no npm: sign-in will not be tested"; \
	else echo "Installing oidc-provider into tests/hub/oidc_provider/node_modules" && \
	  npm ci --prefix tests/hub/oidc_provider --ignore-scripts --no-audit --no-fund --silent && touch $@; fi

# Ably's SDK for JavaScript, likewise.
$(STAMP_ABLY_JS): tests/embedded/ably_js/package-lock.json
	@if ! command -v npm >/dev/null || ! command -v node >/dev/null; then echo "There is no npm: Ably's SDK for JavaScript will not be tested"; \
	else echo "Installing ably into tests/embedded/ably_js/node_modules" && \
	  npm ci --prefix tests/embedded/ably_js --ignore-scripts --no-audit --no-fund --silent && touch $@; fi
