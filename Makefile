# SPDX-License-Identifier: Apache-2.0
# Each target does its own set-up, into .venv, and does it again only when the requirements change.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test lint peers bench clean

demo: $(STAMP)
	$(BIN)/pyro-latentde demo

# A file's tests share fixtures, so that each file goes to one process.
test: lint
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: $(STAMP)
	$(BIN)/ruff check .

# Peers of the benchmarks live in an environment of their own.
peers: .venv-peers/.installed

bench: $(STAMP) peers
	$(BIN)/python benchmarks/run.py

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache demo_output
	find pyro_latentde models tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $(STAMP)

.venv-peers/.installed: benchmarks/requirements-peers.txt
	test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/requirements-peers.txt
	touch $@
