# The two commands of the README: `make demo` and `make test`. Each sets up everything it needs.

# Python 3.11, else 3.12 or 3.13, in .venv; make test PYTHON=python3.12 takes that one, in .venv-python3.12.
VENV := $(if $(filter command,$(origin PYTHON)),.venv-$(notdir $(PYTHON)),.venv)
PYTHON := $(or $(PYTHON),$(shell for p in python3.11 python3.12 python3.13; do $$p -c "" 2> /dev/null && echo $$p && break; done),python3.11)
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TESTS_READY := $(VENV)/.ready-tests
DOCS := .venv-docs
DOCS_READY := $(DOCS)/.ready
# `mlflow run` starts `python`: the one of the environment.
RUN := PATH="$(CURDIR)/$(BIN):$$PATH"

.PHONY: demo test test-slow test-all lint docs image study-page format lock smoke ui clean

demo: $(READY)
	$(RUN) MLFLOW_EXPERIMENT_NAME=$${MLFLOW_EXPERIMENT_NAME:-sparse_ft} $(BIN)/mlflow run . --env-manager local

# Neighbours stay together, so that what a module's tests share is made once and not by both processes.
test: $(TESTS_READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

# What takes more than 2.5 seconds a test: real models, studies, servers, killed processes.
test-slow: $(TESTS_READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow

test-all: $(TESTS_READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(TESTS_READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

# The site, in site/index.html. Its tools read the sources without importing them: an environment of its own, without torch.
docs: $(DOCS_READY)
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict

# The image sparse_ft, where a container engine answers; TORCH=cu130 makes the one for GPUs. Its Dockerfile is linted anywhere.
image: $(TESTS_READY)
	$(BIN)/python -m pip install --quiet --requirement requirements/hadolint.txt
	$(BIN)/hadolint Dockerfile
	if docker info > /dev/null 2>&1; then docker build --build-arg TORCH=$(or $(TORCH),cpu) --tag sparse_ft . && docker run --rm sparse_ft sparse-ft --version; \
	else echo "not built: no container engine answers to docker info"; fi

# docs/answer.md and its figure, from the numbers in docs/study/ (docs/answer.py says how these are made).
study-page: $(READY)
	PYTHONPATH="$(CURDIR)" $(BIN)/python docs/answer.py

$(DOCS_READY): requirements/docs.txt
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --requirement requirements/docs.txt
	touch $@

format: $(TESTS_READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

smoke: $(READY)
	$(RUN) $(BIN)/mlflow run . -e sweep --env-manager local -P config=configs/smoke.yaml

ui: $(READY)
	$(BIN)/mlflow ui --backend-store-uri "$${MLFLOW_TRACKING_URI:-sqlite:///mlflow.db}"

# torch goes in first and pinned: left to the resolver it may be replaced by a larger build. Beside an NVIDIA GPU it comes
# from the index whose CUDA the driver runs.
$(READY): requirements/base.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' requirements/base.txt)" $$($(BIN)/python -m requirements.torch_index)
	$(BIN)/python -m pip install --quiet --requirement requirements/base.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

# What the tests need beside it: Ray, PostgreSQL's driver, h5py, ruff, ...
$(TESTS_READY): $(READY) requirements/lock.txt
	$(BIN)/python -m pip install --quiet --requirement requirements/lock.txt
	touch $@

# After a change of dependencies in pyproject.toml: install them, try everything, then write down what was tried. A fresh
# environment tells what of it the tests alone need.
lock:
	$(BIN)/python -m pip install --quiet --upgrade --editable ".[test]"
	$(BIN)/python -m pip freeze --exclude-editable | sed -e 's/+cpu$$//' -e '/^triton==/s/$$/ ; sys_platform == "linux"/' > requirements/lock.txt
	$(PYTHON) -m venv --clear .venv-lock
	.venv-lock/bin/python -m pip install --quiet "$$(grep '^torch==' requirements/lock.txt)"
	.venv-lock/bin/python -m pip install --quiet --constraint requirements/lock.txt --editable .
	.venv-lock/bin/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' > requirements/base.txt

clean:
	rm -rf .venv .venv-python* $(DOCS) .venv-lock site build dist *.egg-info .pytest_cache .ruff_cache

-include cerebras.mk
