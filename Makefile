PYTHON ?= python3
# Makes the virtual environment when it is missing or old, and runs a program in it.
RUN := $(PYTHON) -I tests/testbed/bootstrap.py
# Three at a time on two cores: most tests wait for a server or a child.
PYTEST_ARGS ?=
PYTEST := $(RUN) python -m tests.testbed.disk python -m pytest --durations=20
# What hangs is a failure that says where: the longest of these tests takes half a minute.
HANGS := --timeout 300
PARALLEL ?= --numprocesses 3 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help venv demo demo-page testbed test faults bench lint format docs clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

venv: ## make the virtual environment, .venv
	@$(RUN)

demo: ## back up and restore a small made-up CommCare HQ
	@$(RUN) python -m tests.testbed.provision users postgres18
	@$(RUN) python demo/run.py

demo-page: ## the same, then serve the history page until Ctrl-C
	@$(RUN) python -m tests.testbed.provision users postgres18
	@$(RUN) python demo/run.py --page

testbed: ## fetch the real services that the tests use
	@$(RUN) python -m tests.testbed.provision

test: testbed ## run the tests, all but the long sweeps
	@$(PYTEST) $(PARALLEL) $(HANGS) -m "not slow" $(PYTEST_ARGS)

faults: testbed ## run the tests that kill, fill disks and damage files, long sweeps included
	@$(PYTEST) -m faults $(PYTEST_ARGS)

bench: testbed ## measure speed and memory
	@$(RUN) python -m benchmarks

lint: ## check style, types and layers
	@$(RUN) ruff check
	@$(RUN) ruff format --check
	@$(RUN) python -m mypy
	@$(RUN) lint-imports

format: ## format the code
	@$(PYTHON) -I tests/testbed/bootstrap.py
	@.venv/bin/ruff check --fix-only --quiet
	@.venv/bin/ruff format

docs: ## write the page of settings anew
	@$(RUN) python tools/settings_reference.py > docs/settings.rst.new
	@mv docs/settings.rst.new docs/settings.rst

clean: ## remove what was built (the fetched services stay)
	@$(RUN) --clean
	@rm -rf build dist *.egg-info .coverage .coverage.* htmlcov .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis .tox
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
