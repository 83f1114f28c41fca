# Two commands from a fresh clone: `make demo` and `make test`. Each makes its own .venv.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile --constraint constraints.txt
TASK ?= single_double_quote

.PHONY: demo test lint clean

demo: .venv/installed
	$(BIN)/sparsetrain train configs/quickstart.yaml
	$(BIN)/sparsetrain tasks runs/quickstart
	$(BIN)/sparsetrain prune runs/quickstart configs/quickstart-prune.yaml --task $(TASK)

test: .venv/installed-dev
	$(BIN)/python -m pytest

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv build *.egg-info

# torch first: where a CPU build is at hand pip takes it, and what follows keeps it.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) --editable .
	touch $@

.venv/installed-dev: .venv/installed
	$(PIP) --editable '.[dev]'
	touch $@
