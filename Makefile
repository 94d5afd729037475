# make demo · make quick · make test · make bench · make lint: each sets up .venv by itself and is
# quick the second time. PYTHON chooses the interpreter that .venv is made from.
PYTHON ?= python3
BIN := .venv/bin
# `make demo` writes here; an existing directory is never overwritten.
OUT ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)

# One thread for each of the test processes: more would fight over the cores. A worker takes whole
# stretches of neighbouring tests, so that most of what a file shares is made once.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -q -n auto --dist worksteal

.PHONY: demo quick test bench lint

demo: .venv/ready
	$(BIN)/sodfast train out=$(OUT)

# What to run after every change: all but the tests that take long or start processes.
quick: lint
	$(PYTEST) -m "not slow"

test: lint
	$(PYTEST)

bench: .venv/ready
	$(BIN)/pytest -q bench --benchmark-only

lint: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@
