# The two commands of the README: `make demo` and `make test`. Each sets up everything it needs.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DOCS := .venv-docs
DOCS_READY := $(DOCS)/.ready
# `mlflow run` starts `python`: the one of the environment.
RUN := PATH="$(CURDIR)/$(BIN):$$PATH"

.PHONY: demo test test-slow test-all lint docs format lock smoke ui clean

demo: $(READY)
	$(RUN) MLFLOW_EXPERIMENT_NAME=$${MLFLOW_EXPERIMENT_NAME:-sparse_ft} $(BIN)/mlflow run . --env-manager local

test: $(READY)
	$(BIN)/python -m pytest -n 2 -m "not slow"

# Real models, servers, killed processes: minutes.
test-slow: $(READY)
	$(BIN)/python -m pytest -n 2 -m slow

test-all: $(READY)
	$(BIN)/python -m pytest -n 2

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

# The site, in site/index.html. Its tools read the sources without importing them: an environment of its own, without torch.
docs: $(DOCS_READY)
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict

$(DOCS_READY): requirements/docs.txt
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --requirement requirements/docs.txt
	touch $@

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

smoke: $(READY)
	$(RUN) $(BIN)/mlflow run . -e sweep --env-manager local -P config=configs/smoke.yaml

ui: $(READY)
	$(BIN)/mlflow ui --backend-store-uri "$${MLFLOW_TRACKING_URI:-sqlite:///mlflow.db}"

# torch goes in first and pinned: left to the resolver it may be replaced by a larger build.
$(READY): requirements/lock.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' requirements/lock.txt)"
	$(BIN)/python -m pip install --quiet --requirement requirements/lock.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

# After a change of dependencies in pyproject.toml: install them, try everything, then write down what was tried.
lock:
	$(BIN)/python -m pip install --quiet --upgrade --editable ".[test]"
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' > requirements/lock.txt

clean:
	rm -rf $(VENV) $(DOCS) site build dist *.egg-info .pytest_cache .ruff_cache

-include cerebras.mk
