# `make repro` runs the whole pipeline, `make test` the tests. Both create .venv from requirements.lock if it is
# missing, outdated or broken. PYTHON is the interpreter to create it with: 3.11, 3.12 or 3.13; VENV is its folder.
VARIABLES := $(foreach name,$(.VARIABLES),$(if $(filter command line,$(origin $(name))),$(name)))
ifneq ($(filter-out PYTHON VENV,$(VARIABLES)),)
    $(error make knows no $(filter-out PYTHON VENV,$(VARIABLES)), only PYTHON and VENV. Settings go to convoy: \
        make install, and .venv/bin/convoy run KEY=VALUE)
endif
ASKED := $(PYTHON)
PYTHON ?= python3
VENV ?= .venv
READY := $(VENV)/ready
# The scripts of an environment contain its path, and its packages belong to one interpreter. It is therefore created
# again if it was moved or copied, or if its interpreter is gone or is not the one that PYTHON names.
VERSION := -c 'import sys; print(*sys.version_info[:2])'
BROKEN := $(shell test ! -e $(READY) || { \
    test "$$(cat $(READY))" = "$(abspath $(VENV))" \
    && $(VENV)/bin/python -c 'import sys, importlib.util as found; sys.exit(not found.find_spec("dvc"))' \
    && { test -z "$(ASKED)" || test "$$($(ASKED) $(VERSION))" = "$$($(VENV)/bin/python $(VERSION))"; }; \
    } 2>/dev/null || echo yes)
export PATH := $(abspath $(VENV))/bin:$(PATH)

.PHONY: help install install-cluster repro test test-slow lint docs screenshots lock audit retrain push again

help: ## list the targets
	@sed -nE 's/^([a-z-]+):.*## /make \1|/p' Makefile | awk -F'|' '{ printf "%-26s%s\n", $$1, $$2 }'

install: $(READY) ## create the environment from requirements.lock

install-cluster: $(READY) ## add Ray, from cluster.lock, for trainer=ray and `convoy tune --ray`
	uv pip install --python $(VENV) --quiet --compile-bytecode --no-deps --require-hashes --requirements cluster.lock

repro: $(READY) ## run the whole pipeline, as `convoy run --jobs auto` does
	convoy run --jobs auto

test: $(READY) ## run the tests
	python -m pytest -q --numprocesses auto --dist loadfile

test-slow: $(READY) ## run the slow tests: several processes, fresh clones, kills at every write
	python -m pytest -q -m slow --numprocesses auto --dist loadfile

lint: $(READY) ## run the linters and the type checker
	ruff check .
	ruff format --check .
	mypy
	PYTHONPATH=src lint-imports --no-cache

screenshots: $(READY) ## take the pictures of the documentation, of the results of the last run
	PYTHONPATH=.:src python docs/screenshots.py

docs: $(READY) ## build the documentation as a site, in docs/_build/
	sphinx-build --quiet --fail-on-warning --keep-going -c docs . docs/_build
	@echo "docs/_build/docs/index.html"

COMPILE := uv pip compile --universal --python-version 3.11 --upgrade --generate-hashes --no-annotate --no-header \
	--no-emit-index-url --no-emit-find-links --quiet pyproject.toml --extra dev --extra timm
# cluster.lock holds only what requirements.lock does not.
lock: $(READY) ## update requirements.lock and cluster.lock from pyproject.toml: the newest versions, with hashes
	$(COMPILE) --output-file requirements.lock
	$(COMPILE) --extra cluster --constraints requirements.lock --output-file cluster.lock \
		$$(sed -nE 's/^([a-z0-9._-]+)==.*/--no-emit-package \1/p' requirements.lock)

# diskcache (a dependency of DVC) has no version without CVE-2025-69872: who can write to DVC's folder for temporary
# files can run code, and that folder is the user's own.
audit: $(READY) ## look for known vulnerabilities of the packages in requirements.lock
	uvx pip-audit --strict --require-hashes --disable-pip --requirement requirements.lock --ignore-vuln CVE-2025-69872

retrain: $(READY) ## retrain on the newest data, as `convoy retrain` does
	convoy retrain

push: $(READY) ## push the results and the run cache to the DVC remote
	dvc push --run-cache

# Without --compile-bytecode, uv writes no bytecode, and each stage would start seconds later.
$(READY): requirements.lock pyproject.toml $(if $(BROKEN),again)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo "convoy needs Python 3.11 to 3.13, and $(PYTHON) is another version: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@test -z "$(BROKEN)" || \
		{ echo "$(VENV) was created elsewhere, or its Python is gone or another version: making it again" && rm -rf $(VENV); }
	$(VENV)/bin/uv --version >/dev/null 2>&1 || \
		{ $(PYTHON) -m venv $(VENV) && $(VENV)/bin/python -m pip install --quiet uv; }
	uv pip sync --python $(VENV) --quiet --compile-bytecode requirements.lock
	uv pip install --python $(VENV) --quiet --no-deps --no-build-isolation --editable .
	@echo "$(abspath $(VENV))" > $(READY)

again:
