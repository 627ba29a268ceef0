# `make train` and `make test` need only Python 3.11+: the first run makes .venv and installs the locked versions.
VENV   := .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
CONFIG ?= configs/pendulum.yaml
ARGS   ?=

.PHONY: setup train test slow lint types check lock lowest settings clean

setup: $(VENV)/.ready

$(VENV)/.ready: requirements.lock pyproject.toml trpo/native/mlp.c
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --requirement requirements.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

train: setup
	$(BIN)/python scripts/train.py --config $(CONFIG) $(ARGS)

test: setup  ## in as many processes as there are cores
	$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

slow: setup  ## learning checks over several seeds, minutes to hours
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

check: lint types test

settings: setup  ## docs/settings.md from the code
	$(BIN)/python scripts/settings_table.py

lock:  ## new versions into requirements.lock; torch stays pinned by hand (see CONTRIBUTING.md)
	$(PYTHON) -m venv build/lock
	build/lock/bin/pip install --quiet pip-tools
	echo "torch==2.13.0" > build/lock/constraints.txt
	build/lock/bin/pip-compile --quiet --no-header --no-annotate --strip-extras --allow-unsafe \
	  --no-emit-index-url --no-emit-find-links --no-emit-trusted-host \
	  --extra all --extra dev --constraint build/lock/constraints.txt --output-file build/lock/lock.txt pyproject.toml
	sed -e '/^trpo/d' -e '/^#/d' -e '/^$$/d' -e 's/^torch==.*/torch==2.13.0/' build/lock/lock.txt > requirements.lock

lowest:  ## the tests with the oldest versions that pyproject.toml allows; of torch, whatever build pip finds
	$(PYTHON) -m venv build/lowest
	sed -n -E '/^dependencies/,/^all = /{/^(envpool|peers)/!p;}' pyproject.toml | grep -o '"[A-Za-z0-9-]*>=[0-9.]*' \
	  | sed -e 's/"//' -e 's/>=/==/' | sort -u > build/lowest/versions.txt
	build/lowest/bin/pip install --quiet --requirement build/lowest/versions.txt
	build/lowest/bin/pip install --quiet --no-deps --no-build-isolation --editable .
	build/lowest/bin/python -m pytest -W default -n auto --dist worksteal $(ARGS)

clean:
	rm -rf $(VENV) build *.egg-info trpo/native/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
