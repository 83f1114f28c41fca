# Two commands from a fresh clone: `make demo` and `make test`. Each makes its own .venv.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile --constraint constraints.txt
TASK ?= single_double_quote
GPU_TESTS := tests/test_kernels.py tests/test_tiles.py tests/test_sparse_linear.py tests/test_slabs.py tests/test_triton_topk.py

# Packages come without byte code; Python writes it for what is imported, once, and not anew in each of many processes.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test bench gpu gpu-step lint clean

demo: .venv/installed
	$(BIN)/sparsetrain train configs/quickstart.yaml
	$(BIN)/sparsetrain tasks runs/quickstart
	$(BIN)/sparsetrain prune runs/quickstart configs/quickstart-prune.yaml --task $(TASK)
	@echo
	@echo "What to see: a circuit of at most 60 edges whose held-out task loss is at most 0.15 (a coin has 0.693)."
	@echo "Without it the model's loss is 0.5 or more; without random nodes it is about as before. The nonsense"
	@echo "control should not come as cheap. Open the page in a browser, and click a node."

test: .venv/installed-dev
	$(BIN)/python -m pytest

# Ten minutes on 2 free cores, by the sum of its cases. Rewrites docs/benchmarks.md and the cost model of backend="auto".
bench: .venv/installed
	$(BIN)/sparsetrain bench --publish

# On a machine with a CUDA device, under ten minutes, with that machine's own Python, torch, Triton, numpy, pytest and
# hypothesis. The benchmark checks each op before it times it, and the tests come last. Results go to OUT.
OUT ?= docs
gpu:
	mkdir -p $(OUT)
	PYTHONPATH=. $(PYTHON) -m sparsetrain.bench.designs $(OUT)/designs-cuda.json
	PYTHONPATH=. $(PYTHON) -m sparsetrain.bench.command --device cuda --out $(OUT)/kernels-cuda.json --publish $(OUT)
	PYTHONPATH=. $(PYTHON) -m pytest -q -o addopts= -W default $(GPU_TESTS)

# The same for whole training steps; that machine needs omegaconf and datasets too (their wheels can be carried there).
gpu-step:
	mkdir -p $(OUT)
	PYTHONPATH=. $(PYTHON) -m sparsetrain.bench.command step --device cuda --out $(OUT)/step-cuda.json --publish $(OUT)

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
