# Each target sets up what it needs; nothing has to be run first.
VENV ?= .venv
BASE_PYTHON ?= python3
BIN := $(VENV)/bin
UV_VERSION := 0.13.8
# Trust what the machine trusts (a company's proxy, say), where it keeps a list of certificates.
export UV_SYSTEM_CERTS := $(if $(wildcard /etc/ssl/certs/*),true,false)
# JupyterLab asks root to say so.
ALLOW_ROOT := $(shell [ "$$(id -u)" != 0 ] || echo --allow-root)
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)

.PHONY: help install run test lab export lint lock clean
help:  ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(VENV)/.installed  ## create .venv with the locked dependencies

$(BIN)/uv:
	@$(BASE_PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	  || { echo "mlkit needs Python 3.11 to 3.13; name one: make BASE_PYTHON=python3.11 install"; exit 1; }
	@$(BASE_PYTHON) -c 'import ensurepip' 2>/dev/null \
	  || { $(SUDO) apt-get update -q && $(SUDO) apt-get install -q -y python3-venv; }
	$(BASE_PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)

$(VENV)/.installed: requirements.lock pyproject.toml jupyter/kernels/mlkit/kernel.json | $(BIN)/uv
	@# compiled once here, not by each process that starts
	$(BIN)/uv pip sync --quiet --compile-bytecode --python $(BIN)/python requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	@$(BIN)/jupyter kernelspec install --sys-prefix --name mlkit --log-level ERROR jupyter/kernels/mlkit
	@touch $@

run: install  ## train on the built-in digits and archive the run
	$(BIN)/mlkit run train

# A Debian package, where $(1) shows that it is missing: each by itself, since what a machine has may bar what it lacks.
package = $(1) >/dev/null 2>&1 || ! command -v apt-get >/dev/null || { $(SUDO) apt-get update -q \
	&& $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -q -y $(2); }

# The tests start a PostgreSQL and a Prometheus of their own; where they are not to be had, those tests are skipped.
.PHONY: services
services:
	@$(call package,ls /usr/lib/postgresql/*/bin/postgres,postgresql)
	@$(call package,command -v prometheus,prometheus)

# What pages are tested with: Chromium, and LiteRT.js from npm. Where they are not to be had, those tests are skipped.
.PHONY: browser
browser:
	@$(call package,command -v chromium,chromium)
	@$(call package,command -v npm,npm)
	@[ -d node_modules/@litertjs/core ] || ! command -v npm >/dev/null \
	  || npm install --silent --no-save --no-package-lock --no-audit --no-fund @litertjs/core@2.5.3

test: install lint services browser  ## everything CI checks
	@# each notebook in a process of its own: some settle what TensorFlow can settle only once
	find nbs -name '*.ipynb' -not -path '*/.*' | sort | MLKIT_RUNS_ROOT=$$(mktemp -d) xargs -P 2 -n 1 $(BIN)/nbdev-test
	@# two at a time: most tests wait for processes of their own; those of a file share what it has set up
	$(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 20

lab: install  ## open JupyterLab on the notebooks
	$(BIN)/jupyter lab $(ALLOW_ROOT) --LabApp.default_url=/lab/tree/nbs/index.ipynb

export: install  ## write mlkit/ from the notebooks
	$(BIN)/nbdev-export
	$(BIN)/nbdev-clean

lint: install  ## lint and format, as CI does
	$(BIN)/ruff check .
	$(BIN)/ruff format --check nbs tests

lock: $(BIN)/uv  ## resolve the dependencies anew
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-emit-index-url --generate-hashes \
	  --group dev --extra edge --extra lab --extra mlflow --extra profile --extra ray --extra remote --extra serve --extra signing --extra sql --upgrade --custom-compile-command "make lock" pyproject.toml -o requirements.lock

clean:  ## remove what can be made again; runs stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache node_modules
	find . -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf
