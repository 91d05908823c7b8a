# make test    lint, then every test that is not marked slow
# make test-versions  the same with the oldest and with the newest packages: see CONTRIBUTING.md
# make fuzz    mutate inputs of every kind, some thousands of each
# make demo    quantize, evaluate and export a small model from end to end
# make evidence  train what docs/results.md needs and is missing, and write that page (hours)
# The virtual environment sets itself up, and again when pyproject.toml or constraints.txt change.

PYTHON      ?= python3
VENV        ?= .venv
PIP_ARGS    ?=
# An index of PyTorch wheels to take torch from, e.g. the CPU one: see CONTRIBUTING.md.
TORCH_INDEX ?=
PYTEST_ARGS ?=
# Each worker loads torch, so that more than a few cost memory and save no time.
WORKERS     ?= auto
DEMO_ARGS   ?=
FUZZ_ARGS   ?= --count 2000
NOX_ARGS    ?=

BIN   := $(VENV)/bin
PIP   := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed
# One thread a worker: the workers are the parallelism, and sums come out the same on every machine.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 $(PYTEST_ARGS)
SOURCES := $(wildcard gracec tests examples benchmarks docs noxfile.py)

.PHONY: fuzz test test-all test-versions lint format demo evidence install constraints clean

test: lint
	$(PYTEST) -m "not slow" --timeout 600

test-all: lint
	$(PYTEST)

# Environments of their own, with whatever Python of the sessions is there. It writes a results file.
test-versions: $(STAMP)
	PIP_ARGS="$(PIP_ARGS)" WORKERS=$(WORKERS) $(BIN)/nox $(NOX_ARGS)

# Thousands of mutated inputs of each kind: one line, or the same answer. See tests/fuzz/run.py.
fuzz: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz.run $(FUZZ_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(STAMP)
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

demo: $(STAMP)
	$(BIN)/gracec demo $(DEMO_ARGS)

evidence: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/evidence/run.py
	$(BIN)/python benchmarks/evidence/page.py

install: $(STAMP)

# torch first and on its own: only torch comes from TORCH_INDEX, everything else from the default.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install $(PIP_ARGS) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -c constraints.txt torch
	$(PIP) install $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	touch $@

# Newest versions that pyproject.toml allows, from a fresh environment with the CPU build of torch.
constraints:
	rm -rf build/constraints
	$(PYTHON) -m venv build/constraints
	build/constraints/bin/python -m pip install $(PIP_ARGS) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) 'torch>=2.11,<2.16'
	build/constraints/bin/python -m pip install $(PIP_ARGS) '.[dev]'
	{ grep '^#' constraints.txt; \
	  build/constraints/bin/python -m pip freeze --all --exclude gracec --exclude pip \
	  | sed 's/+cpu$$//' | sort -f; } > build/constraints.txt
	mv build/constraints.txt constraints.txt

clean:
	rm -rf $(VENV) .nox build dist out examples/*/node_modules *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
