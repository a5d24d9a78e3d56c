# `make repro` runs the whole pipeline, `make test` the tests. Both make .venv from requirements.lock when it is
# missing, stale or broken. PYTHON is the interpreter to make it from: 3.11, 3.12 or 3.13.
ASKED := $(PYTHON)
PYTHON ?= python3
VENV ?= .venv
READY := $(VENV)/ready
# Every script in an environment holds the path that it was made in, and its packages are of one interpreter. Where it
# was moved or copied, or its interpreter is gone or not the one that PYTHON asks for, it is made again.
VERSION := -c 'import sys; print(*sys.version_info[:2])'
BROKEN := $(shell test ! -e $(READY) || { \
    test "$$(cat $(READY))" = "$(abspath $(VENV))" \
    && $(VENV)/bin/python -c 'import sys, importlib.util as found; sys.exit(not found.find_spec("dvc"))' \
    && { test -z "$(ASKED)" || test "$$($(ASKED) $(VERSION))" = "$$($(VENV)/bin/python $(VERSION))"; }; \
    } 2>/dev/null || echo yes)
export PATH := $(abspath $(VENV))/bin:$(PATH)

.PHONY: help install repro test test-slow lint sync ui lock retrain push push-retrain-branch rollback again

help: ## show what can be made
	@sed -nE 's/^([a-z-]+):.*## /make \1|/p' Makefile | awk -F'|' '{ printf "%-22s%s\n", $$1, $$2 }'

install: $(READY) ## the environment that requirements.lock describes

repro: $(READY) ## the whole pipeline: compose conf/, run what is not up to date, show the leaderboard
	python -m pipeline

test: $(READY) ## the tests
	python -m pytest -q --numprocesses auto --dist loadfile

test-slow: $(READY) ## the tests that take longer: several processes, fresh clones, what pays
	python -m pytest -q -m slow --numprocesses auto --dist loadfile

lint: $(READY) ## style and types
	ruff check .
	ruff format --check .
	mypy
	PYTHONPATH=src lint-imports --no-cache

sync: $(READY) ## the runs of the current results brought to MLflow, where they are not there or not whole
	python -m pipeline.sync_mlflow

ui: $(READY) ## MLflow's pages on this machine, for comparing runs
	@python -m pipeline --show
	@test -n "$$MLFLOW_TRACKING_URI" || \
		mlflow server --backend-store-uri sqlite:///mlflow.db --host 127.0.0.1 --port 5000 --workers 1

rollback: $(READY) ## the champion before this one again: make rollback REASON="why"
	@python -m pipeline.rollback --reason "$$REASON"

lock: $(READY) ## requirements.lock anew from pyproject.toml: the newest versions, with hashes
	uv pip compile --universal --python-version 3.11 --upgrade --generate-hashes --no-annotate --no-header \
		--no-emit-index-url --no-emit-find-links --extra dev --output-file requirements.lock pyproject.toml --quiet

retrain: $(READY) ## the newest data, then the pipeline, taking results that the DVC remote has already
	python -m pipeline --update --pull

push: $(READY) ## results and run cache to the DVC remote
	dvc push --run-cache

push-retrain-branch: ## what a retraining changed, as a commit on a branch of its own, pushed to origin
	git diff --quiet -- data.dvc data.lock dvc.lock params.yaml || { \
		git switch --create retrain-$$(date -u +%Y-%m-%d-%H%M) && \
		git commit --message "Retrain on the newest data" -- data.dvc data.lock dvc.lock params.yaml && \
		git push --set-upstream origin HEAD; }

# uv writes no bytecode unless told, and without it each stage would start seconds later
$(READY): requirements.lock pyproject.toml $(if $(BROKEN),again)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo "convoy needs Python 3.11 to 3.13, and $(PYTHON) is another: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@test -z "$(BROKEN)" || \
		{ echo "$(VENV) was made elsewhere, or its Python is gone or not the one asked for: making it again" && rm -rf $(VENV); }
	$(VENV)/bin/uv --version >/dev/null 2>&1 || \
		{ $(PYTHON) -m venv $(VENV) && $(VENV)/bin/python -m pip install --quiet uv; }
	uv pip sync --python $(VENV) --quiet --compile-bytecode requirements.lock
	uv pip install --python $(VENV) --quiet --no-deps --no-build-isolation --editable .
	@echo "$(abspath $(VENV))" > $(READY)

again:
