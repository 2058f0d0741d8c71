# `make help` lists the targets. Everything happens in .venv, which the first target that needs it creates.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.installed

# One thread a process: the tests and the suite run several processes side by side.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-processes test-hosts hosts lint types docs results bench bench-check clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(READY) ## Create .venv and install the package with all extras, versions pinned by constraints.txt

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "ace needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e '.[bench,docs,dev]'
	@touch $@

demo: $(READY) ## Main job: build the data, train, print one table, draw the trajectories (under 10 minutes on 2 cores)
	$(BIN)/ace suite configs/suites/demo.yaml --jobs 2 --out results/demo
	$(BIN)/ace table results/demo
	$(BIN)/ace plot results/demo
	@echo "Every run (configuration, history, checkpoint, summary) is in results/demo, the figures in results/demo/figures."

test: $(READY) ## Run the tests and the examples in the docstrings, except the slow ones
	$(BIN)/python -m pytest -n 2

test-slow: $(READY) ## Run the tests that take minutes
	$(BIN)/python -m pytest -m slow tests

PROCESSES := distributed parallel_runs ray frameworks
test-processes: $(READY) ## Run those of the slow tests that start several processes, or nodes
	$(BIN)/python -m pytest -n 2 -m slow $(PROCESSES:%=tests/test_%.py)

# Libraries that exclude one another have environments of their own: tests/hosts/environments/NAME.txt is installed into
# .venvs/NAME, then ace, then what must come without its own requirements; the file says why.
HOSTS := $(basename $(notdir $(wildcard tests/hosts/environments/*.txt)))
WITHOUT_REQUIREMENTS_escnn := escnn==1.0.11
WITHOUT_REQUIREMENTS_schnetpack := schnetpack==2.1.1

.venvs/%/.installed: tests/hosts/environments/%.txt pyproject.toml
	$(PYTHON) -m venv .venvs/$*
	.venvs/$*/bin/python -m pip install -r $<
	.venvs/$*/bin/python -m pip install -c $< -e '.[bench]'
	$(if $(WITHOUT_REQUIREMENTS_$*),.venvs/$*/bin/python -m pip install --no-deps $(WITHOUT_REQUIREMENTS_$*))
	@touch $@

# An environment of one library runs the tests and the page of that library; the shared one runs all it can import.
# $(1): options of pytest. The tests of a library that has an environment of its own run there, all others in "shared".
# The benchmark models made of a library's layers are tested with it, on each of their tasks by WITH_EACH.
WITH_EACH := tests/test_pairs.py
WITH_ESCNN := tests/test_rotmnist.py tests/test_smoke.py
WITH_SHARED := tests/test_modelnet.py
define each_host
@failed=; for name in $(HOSTS); do \
  echo "== $$name"; \
  what="tests/hosts $(WITH_EACH) $(WITH_SHARED)"; only=; \
  if test -e tests/hosts/test_$$name.py; then \
    what="tests/hosts/test_$$name.py tests/hosts/test_force_fields.py tests/hosts/test_pages.py $(WITH_EACH)"; only=$$name; \
  fi; \
  if test $$name = escnn; then what="$$what $(WITH_ESCNN)"; only="escnn or rotmnist or smoke"; fi; \
  PYTHONPATH=tests .venvs/$$name/bin/python -m pytest $(1) $$what -k "$$only" || failed="$$failed $$name"; \
done; \
test -z "$$failed" || { echo "failed in:$$failed"; exit 1; }
endef

test-hosts: $(HOSTS:%=.venvs/%/.installed) ## Test other libraries' models, each where it can be installed; compiling and DDP left out
	$(call each_host,-n 2 -q)

hosts: $(HOSTS:%=.venvs/%/.installed) ## Test them in full (half an hour), and write docs/hosts/results.csv
	$(call each_host,-p hosts.report --environment $$name -m "not slow")

lint: $(READY) ## Check style, formatting and the import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(READY) ## Check the types of the library (mypy --strict)
	$(BIN)/mypy

docs: $(READY) ## Build the documentation into docs/_build, warnings are errors
	$(BIN)/sphinx-build -W --keep-going -q docs docs/_build

results: $(READY) ## Run the benchmark suite of the results page (hours; the same command resumes)
	$(BIN)/ace suite configs/suites/results.yaml --jobs 2 --out results/results
	$(BIN)/ace table results/results

# Models of libraries that have an environment of their own are measured there, if it was made (make test-hosts).
IN_OTHERS := escnn:c4-cnn mace:mace shared:nequip

bench: $(READY) ## Measure what a step costs (10 minutes), and write its tables
	$(BIN)/python -m benchmarks.speed
	$(foreach pair,$(IN_OTHERS),$(call in_other,$(subst :, ,$(pair))))

define in_other
@if test -x .venvs/$(word 1,$(1))/bin/python; then .venvs/$(word 1,$(1))/bin/python -m benchmarks.speed steps $(word 2,$(1)); fi

endef

bench-check: $(READY) ## Measure anew, briefly, and fail if a ratio moved against the committed tables
	$(BIN)/python -m benchmarks.speed check egnn segnn schnet egno vn-dgcnn

clean: ## Remove .venv, caches and built documentation; results and data stay
	rm -rf .venv docs/_build build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
