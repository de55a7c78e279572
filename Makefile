# make train | make test | make test-all | make lint: each does all of its own set-up (Python environment, interpreters).
VENV   ?= .venv
PYTHON ?= python3
PY      = $(VENV)/bin/python
SUDO    = $(shell [ "$$(id -u)" = 0 ] || command -v sudo)

# What the whole suite runs on, some 2 GB installed (racket 412 MB, ocaml 448 MB, r-base-core, clang, typescript 67 MB, mono 29 MB). A test whose interpreter is missing is skipped by name.
TEST_PACKAGES = swi-prolog-nox sbcl bc dc lua5.4 lua-unit guile-3.0 perl libtest-deep-perl ruby ruby-test-unit libjavatuples-java clang-14 llvm-14 g++ nodejs node-typescript mono-mcs libmonosgen-2.0-1 libmono-system-numerics4.0-cil r-base-core racket ocaml-nox

# Two workers, each with whole files (their runs are shared by a file's tests); one thread each, since two cores are what is planned for.
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile

.PHONY: train test test-all lint environment compiler prolog sbcl interpreters peers
train: environment compiler prolog
	$(PY) train.py --recipe recipes/tiny.toml --lang prolog

# For a newcomer: minutes, with what is installed and SWI-Prolog and SBCL.
test: environment compiler prolog sbcl
	$(PYTEST) -m "not slow" tests

# Everything, on every interpreter that Debian has, and against the libraries that load what is saved here.
test-all: environment compiler interpreters peers
	$(PYTEST) tests

lint: environment
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .

environment: $(VENV)/ready

# torch first and pinned: an open range would pull the newest build with gigabytes of CUDA packages, asked for by another package.
$(VENV)/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 train")'
	$(PYTHON) -m venv $(VENV)
	$(PY) -c 'import torch' 2>/dev/null || $(PY) -m pip install -q torch==2.13.0
	$(PY) -m pip install -q -r requirements.txt
	touch $@

# For kernels/native.c; without it the sampler is slower and says so.
compiler:
	@command -v cc >/dev/null || $(MAKE) apt PACKAGES="gcc libc6-dev" || true

prolog:
	@command -v swipl >/dev/null || $(MAKE) apt PACKAGES=swi-prolog-nox

sbcl:
	@command -v sbcl >/dev/null || $(MAKE) apt PACKAGES=sbcl

interpreters:
	@dpkg -s $(TEST_PACKAGES) >/dev/null 2>&1 || $(MAKE) apt PACKAGES="$(TEST_PACKAGES)"

# Only tests compare with them; without them those tests are skipped by name.
peers: environment
	@$(PY) -c 'import transformers, peft' 2>/dev/null || $(PY) -m pip install -q "transformers>=5" peft

.PHONY: apt
apt:
	@command -v apt-get >/dev/null || { echo "No apt-get here: install $(PACKAGES) with your package manager (macOS: brew install swi-prolog), then run make again."; exit 1; }
	$(SUDO) apt-get update -qq
	$(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(PACKAGES)
