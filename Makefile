# make demo · make quick · make test · make bench · make lint: each sets up .venv by itself and is
# quick the second time. PYTHON chooses the interpreter that .venv is made from.
# make exhaustive: the tests that `make test` leaves to .ci/run: the same over more cases and moments.
# make test-oldest: the tests under the oldest supported versions, in .venv-oldest.
# make test-peers: the tests that compare with Liger, fla and torchao, which it puts into build/peers.
# make docs: the documentation, a site that opens from disk, in build/docs.
# make dist: what a release uploads, in dist/, installed and tried outside of the checkout.
PYTHON ?= python3
BIN := .venv/bin
# `make demo` writes here; an existing directory is never overwritten.
OUT ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)

# One thread for each of the test processes: more would fight over the cores. A worker takes whole
# stretches of neighbouring tests, so that most of what a file shares is made once. pytest compiles
# the tests anew for every worker where PYTHONDONTWRITEBYTECODE is set, as it is in many containers.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/pytest -q -n auto --dist worksteal

# What `make test-oldest` tests, and the interpreter its venv is made from: python3.12 on PATH,
# which pyenv provides once it is told the version.
OLDEST ?= tests
PYTHON_OLDEST ?= PYENV_VERSION=3.12 python3.12
HAS_OLDEST = $(shell $(PYTHON_OLDEST) --version 2>/dev/null)

# Both distributions: sodfast needs the kernels of the same version, which no index has yet.
SOURCES := setup.py pyproject.toml kernels/pyproject.toml kernels/VERSION
INSTALL := -m pip install --quiet --disable-pip-version-check

.PHONY: demo quick test exhaustive test-oldest test-peers bench fuzz lint docs dist

demo: .venv/ready
	$(BIN)/sodfast train out=$(OUT)

# What to run after every change: all but the slow tests. It names the ones that should be slow.
quick: lint
	$(PYTEST) -m "not slow" --durations=10 --durations-min=1

test: lint
	$(PYTEST) -m "not exhaustive"

exhaustive: .venv/ready
	$(PYTEST) -m exhaustive

test-oldest:
	$(if $(HAS_OLDEST),$(MAKE) --no-print-directory .venv-oldest/ready)
	$(if $(HAS_OLDEST),OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -q -n auto \
		-m "not exhaustive" $(OLDEST),\
		@echo "python3.12 is not here: the oldest versions are not tested")

# In a folder of their own, not in .venv: transformers imports torchao wherever it is installed, Liger
# and torchao write lines of warnings into every command, and plans are smaller with Liger.
test-peers: build/peers/ready
	PYTHONPATH=build/peers $(PYTEST) tests/kernels/test_modules.py tests/bench/test_suite_peers.py \
		tests/integrations/test_pages.py tests/memory/test_trace.py \
		tests/model/test_liger.py

build/peers/ready: pyproject.toml constraints.txt .venv/ready
	rm -rf build/peers
	$(BIN)/python $(INSTALL) -c constraints.txt --no-deps --target build/peers \
		liger-kernel flash-linear-attention fla-core einops torchao
	touch $@

bench: .venv/ready
	$(BIN)/pytest -q bench --benchmark-only

# Every command killed at every point, runs of every kind killed KILLS times at random moments, then
# damaged files for MINUTES; tables of what was tried.
MINUTES ?= 60
KILLS ?= 332
FUZZ := cd tests && OMP_NUM_THREADS=1 PYTHONPATH=. ../$(BIN)/python -m
fuzz: .venv/ready
	$(FUZZ) crash_points
	$(FUZZ) random_kills --kills $(KILLS)
	$(FUZZ) fuzz.campaign --minutes $(MINUTES)

lint: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# A warning, a dead link or a page that is in no menu fails the build.
docs: .venv/ready
	rm -rf build/docs
	$(BIN)/python -m sphinx -W --keep-going -q -c docs . build/docs
	@echo "open build/docs/index.html"

# Each wheel is built from its sdist, so both are known to be whole.
dist: .venv-dist/ready
	rm -rf dist
	.venv-dist/bin/python -m build --outdir dist kernels
	.venv-dist/bin/python -m build --outdir dist .
	.venv-dist/bin/python -m twine check --strict dist/*
	.venv-dist/bin/python .ci/try_wheels.py dist constraints.txt

.venv/ready: $(SOURCES) constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python $(INSTALL) -c constraints.txt -e kernels -e ".[dev]"
	touch $@

# Called as modules, which a moved venv can do too.
.venv-oldest/ready: $(SOURCES) constraints-oldest.txt
	test -x .venv-oldest/bin/python || $(PYTHON_OLDEST) -m venv .venv-oldest
	.venv-oldest/bin/python $(INSTALL) -c constraints-oldest.txt -e kernels -e ".[test]"
	touch $@

# Nothing but a release needs build and twine, and no test depends on their versions: they are
# neither in the extra `dev` nor in constraints.txt.
.venv-dist/ready:
	test -x .venv-dist/bin/python || $(PYTHON) -m venv .venv-dist
	.venv-dist/bin/python $(INSTALL) "build>=1.2" "twine>=6.1"
	touch $@
