# make demo [QUICK=1] [STAGE=images]   the main job on real data, with a report
# make test                            the fast tests (CPU, several processes over gloo)
# make test-all                        all tests: every mesh x method x precision x kind of data, long campaigns; hours
# make lint
# make docs                            the documentation as a site in site/; its search wants a server: python -m http.server --directory site

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH_VERSION ?= 2.13.0
TRITON_VERSION ?= 3.9.0
# On a CPU-only machine only a CPU build of torch is accepted. Where the configured package index has none, give its address:
#   make demo TORCH_INDEX=<address of the CPU wheels named on PyTorch's "Get Started" page>
TORCH_INDEX ?=
INDEX_OPTION := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
HAS_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU && echo 1)
comma := ,
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs

.PHONY: demo test test-all lint docs install clean
.DEFAULT_GOAL := install

install: $(STAMP)

$(STAMP): setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13) and "Python 3.11 or 3.12 is needed; give one with PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip setuptools wheel
ifeq ($(HAS_GPU),1)
	$(BIN)/pip install --quiet "torch==$(TORCH_VERSION)" $(INDEX_OPTION)
else ifeq ($(shell uname -s),Linux)
	$(BIN)/pip install --quiet "torch==$(TORCH_VERSION)+cpu" $(INDEX_OPTION) || { \
	  echo "No CPU build of torch $(TORCH_VERSION) in the configured package index (the default Linux build brings gigabytes of CUDA)."; \
	  echo "Run again with TORCH_INDEX=<address of the CPU wheels named on PyTorch's \"Get Started\" page>."; exit 1; }
else
	$(BIN)/pip install --quiet "torch==$(TORCH_VERSION)" $(INDEX_OPTION)
endif
	# A CUDA build of torch brings the Triton it was tested with; a CPU build brings none.
	$(BIN)/pip install --quiet -c constraints.txt $(if $(HAS_GPU),,"triton==$(TRITON_VERSION); platform_system == 'Linux'") -e ".[$(if $(HAS_GPU),dev$(comma)gpu,dev)]"
	touch $@

demo: $(STAMP)
	$(BIN)/megatron-apt demo $(if $(STAGE),--stage $(STAGE)) $(if $(QUICK),--quick --root runs/demo-quick)

# Two workers, one of which runs what needs several processes, one test after the other (tests/conftest.py).
# They start some hundred interpreters, so compiled modules are kept even where a machine is told not to.
PYTEST = OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder

test: $(STAMP)
	$(PYTEST) -m "not gpu and not slow" $(PYTEST_ARGS)

test-all: $(STAMP)
	$(PYTEST) -m "not gpu" $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tools/check_types.py

$(DOCS_STAMP): $(STAMP)
	$(BIN)/pip install --quiet -c constraints.txt -e ".[docs]"
	touch $@

# Offline, and every warning is an error. The variable silences an advertisement.
docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir site

clean:
	rm -rf $(VENV) build site *.egg-info runs
