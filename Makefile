# The two commands of the README. Everything is installed into .venv from a hashed lock file.
PYTHON ?= python3.11
LOCK ?= deploy/locks/cpu.txt
RECIPE ?= shapes
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
# uv reads its own variable for extra wheel folders; pip's is the one that machines have set.
UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
export UV_FIND_LINKS

.PHONY: train test bench lint env packages dashboard lock clean

train: env  ## Train the recipe; ARGS="steps=2 run_name=try" overrides any field.
	$(BIN)/unigrpo train $(RECIPE) $(ARGS)

test: env  ## The whole suite with real engines.
	$(BIN)/python -m pytest -n 2

bench: env  ## Speed and memory against this machine's own limits.
	$(BIN)/python -m deploy.bench

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

env: $(VENV)/.installed

$(VENV)/.installed: $(VENV)/.packages pyproject.toml
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --no-build-isolation --no-index -e .
	touch $@

packages: $(VENV)/.packages  ## What the code needs, without the code: a container's layer that rarely changes.

$(VENV)/.packages: $(LOCK) deploy/locks/tools.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --require-hashes --no-deps -r deploy/locks/tools.txt
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --require-hashes --compile-bytecode -r $(LOCK)
	touch $@

dashboard: env  ## Rewrites the Grafana dashboard from the table of metrics.
	$(BIN)/python -m deploy.dashboard

lock:  ## Rewrites the lock files from pyproject.toml. xgrammar asks for triton, which breaks imports beside a CPU torch.
	printf 'uv==0.13.8\n' | $(BIN)/uv pip compile - $(LOCK_FLAGS) -o deploy/locks/tools.txt
	$(BIN)/uv pip compile pyproject.toml --extra cpu --extra dev $(LOCK_FLAGS) --no-emit-package triton -o deploy/locks/cpu.txt
	$(BIN)/uv pip compile pyproject.toml --extra gpu --extra dev $(LOCK_FLAGS) -o deploy/locks/gpu.txt

LOCK_FLAGS := --generate-hashes --no-emit-index-url --no-emit-find-links --no-annotate --no-header --python-version 3.11

clean:
	rm -rf $(VENV) build *.egg-info
