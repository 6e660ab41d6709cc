# make quickstart   install what training needs, then train a small model on the CPU (minutes)
# make corpus-demo  install what mining a corpus needs, then mine a synthetic web (minutes)
# make test         install, then all tests that need no GPU
# make lint         formatting, lint, types
# Each works as the first command on a machine with Python 3.11 or 3.12, a C++ compiler and make.

PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: quickstart corpus-demo test test-native test-interpreter lint clean

quickstart: $(VENV)/.train
	$(PY) -m dsm_train grpo --config recipes/quickstart.yaml

corpus-demo: $(VENV)/.corpus
	$(PY) -m dsm_train corpus demo

# Both at once: each is one process most of the time.
test: $(VENV)/.dev
	$(MAKE) --no-print-directory --jobs 2 --output-sync=target test-native test-interpreter

test-native: $(VENV)/.dev
	$(PY) -m pytest tests

test-interpreter: $(VENV)/.dev
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PY) -m pytest tests/ops -m "not no_interpret and not gpu"

lint: $(VENV)/.dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright

# torch first: the C++ ops are built against it, without build isolation, so that it is installed once.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch setuptools ninja wheel numpy
	@touch $@

BUILT_FROM := setup.py pyproject.toml $(shell find csrc -name '*.cpp' -o -name '*.h')

$(VENV)/.train: $(VENV)/.torch $(BUILT_FROM)
	$(PIP) --no-build-isolation -e '.[train]'
	@touch $@

$(VENV)/.corpus: $(VENV)/.torch $(BUILT_FROM)
	$(PIP) --no-build-isolation -e '.[train,corpus]'
	@touch $(VENV)/.train $@

$(VENV)/.dev: $(VENV)/.corpus
	$(PIP) pytest ruff pyright
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info triton_kernels/*.so
