# Every target sets up what it needs by itself, from nothing but Python 3.10+ and a C++ compiler, and is quick the second time.
# Where there is an nvcc too, the CUDA library is built (RESNET_FUSED_CUDA=0|1|auto, TORCH_CUDA_ARCH_LIST; see setup.py).
#
#   TORCH        what pip installs for torch, such as TORCH='torch==2.13.0 torchvision==0.28.0'
#   OTHER_TORCH  the version under which test-other-torch runs the wheel
#   ELSEWHERE    the torch and torchvision of rehearse-gpu-check-elsewhere
#   EMULATOR     the runner of the emulator of CUDA, for emulated tests; where it is absent they are skipped
#   ARGS         further arguments of demo, bench and pytest, such as ARGS='--channels-last'
# pip's own variables (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, ...) choose where packages come from.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
TORCH ?= torch==2.14.1 torchvision==0.29.1
OTHER_TORCH ?= 2.13.0
ELSEWHERE ?= torch==2.11.0 torchvision==0.26.0
EMULATOR ?= ../shared/cuda_on_cpu/cuda-on-cpu
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
DEPENDENCIES := $(VENV)/.dependencies
BUILT := $(VENV)/.built
ELSEWHERE_VENV := build/venv-elsewhere
OTHER_VENV := build/venv-torch-$(OTHER_TORCH)
WHEEL_VENV := build/venv-wheel
EMULATED := build/emulated/_cuda.abi3.so
CXX_SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
# What runs under another torch: all but the tests that need the checkout, or torchvision, which fits one torch alone.
OPERATOR_TESTS ?= $(filter-out tests/test_cli.py tests/test_packaging.py tests/test_cuda_build.py tests/test_static.py tests/test_model_table.py \
  tests/test_example_inputs.py tests/test_verification.py tests/test_fus% \
  tests/test_compile.py $(addprefix tests/test_conversion,.py _contracts.py _families.py _graphs.py _survives.py),$(wildcard tests/*.py))

# What runs on the emulated library: the tests of operators, autograd and modules, and those that need the emulator.
EMULATED_TESTS ?= $(addprefix tests/test_,$(addsuffix .py,adversarial backend backward determinism emulated errors forward \
  functorch gradcheck launches layout modules opcheck torch_samples traffic))
EMULATED_SAMPLE ?= 1/1
# And again with blocks and warps in another order.
ORDERS ?= 1 2 3
ORDERED_TESTS ?= $(addprefix tests/test_,$(addsuffix .py,forward backward determinism))

# What runs on the Triton kernels: in Triton's interpreter, and from the PTX that Triton makes under the emulator. Samples, for
# time; a prime number of tests from one to the next meets every dtype, layout and form. All of them: ARGS='--sample 1/1'.
TRITON_TESTS ?= $(addprefix tests/test_,$(addsuffix .py,adversarial backward determinism errors forward functorch layout modules \
  opcheck torch_samples))
TRITON_SAMPLE ?= 5/23
PTX_TESTS ?= $(TRITON_TESTS) tests/test_gradcheck.py
PTX_SAMPLE ?= 3/13
# A script that prints Inductor's source without a GPU, for the comparison.
INDUCTOR ?= ../shared/inductor_source.py

HAVE_EMULATOR := $(wildcard $(EMULATOR))
WITH_EMULATOR = OMP_NUM_THREADS=1 PYTHONPATH=$(abspath $(dir $(EMULATOR)))
# 64 registers a thread are what the kernels' launch bounds allow on most devices.
EMULATE = $(if $(HAVE_EMULATOR),CUDA_ON_CPU_THREADS=1 CUDA_ON_CPU_REGISTERS=64 OMP_NUM_THREADS=1 RESNET_FUSED_EMULATED=$(EMULATED) $(EMULATOR))

.PHONY: help setup demo test lint pytest bench wheel test-other-torch test-wheel audit clean emulated test-emulated traffic static gpu-check rehearse-gpu-check \
  test-triton triton-traffic triton-checks comparison model-table rehearse-gpu-check-elsewhere

help:
	@echo "make setup   install the dependencies into $(VENV) and build the libraries"
	@echo "make demo    train a ResNet eager and fused, in turn, and compare the two"
	@echo "make test    lint and tests"
	@echo "make lint    ruff, clang-format and the include guard of the stable ABI"
	@echo "make bench   the benchmarks' short profile (ARGS=--full for all of it)"
	@echo "make wheel   the cp310-abi3 wheel, in dist"
	@echo "make test-other-torch  the operators' tests with the wheel under torch $(OTHER_TORCH)"
	@echo "make test-wheel        the same with the wheel under this torch"
	@echo "make audit   torch-abi-audit on the libraries"
	@echo "make emulated       the CUDA library for CPU tensors under the emulator, in build/emulated"
	@echo "make test-emulated  the operators' tests on it, with its checks of memory, races and initialisation"
	@echo "make traffic        bytes that each CUDA operator moves, counted by the emulator, as JSON"
	@echo "make static         registers, spills, shared memory and widest access of each CUDA kernel"
	@echo "make test-triton    the operators' tests on the Triton kernels, interpreted and from their PTX under the emulator"
	@echo "make triton-traffic bytes that each operator's Triton kernels move, as JSON"
	@echo "make triton-checks  the Triton kernels compiled for four NVIDIA GPUs and one of AMD: registers, spills, accesses"
	@echo "make comparison     counts docs/comparison.md again: our kernels and those of torch.compile"
	@echo "make model-table    docs/models.md again: what fuse makes of the models of other packages, and how exact it is"
	@echo "make gpu-check      on a machine with a GPU: proves and times everything, in seven minutes"
	@echo "make rehearse-gpu-check  its steps at tiny sizes on the CPU"

setup: $(BUILT)
	@echo 'resnet_fused is built; $(BIN)/python has it.'

demo: $(BUILT)
	@$(BIN)/python -m resnet_fused demo $(ARGS)

test: lint pytest

lint: $(DEPENDENCIES)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)
	$(BIN)/python tools/check_includes.py
	$(BIN)/python tools/check_imports.py resnet_fused benchmarks tools tests

pytest: $(BUILT)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests $(ARGS)

bench: $(BUILT)
	$(BIN)/python -m pytest benchmarks $(ARGS)

wheel: $(BUILT)
	rm -rf dist build/lib* build/bdist*
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .
	$(BIN)/python tools/check_wheel.py dist/*.whl

# Outside the source tree, so that the package that is tested is the one that was installed.
define run_operator_tests
	directory=$$(mktemp -d); trap 'rm -rf "$$directory"' EXIT; cp $(OPERATOR_TESTS) "$$directory"; cd "$$directory"; \
	unset PYTHONPATH; python=$(CURDIR)/$(1)/bin/python; \
	$$python -c 'import resnet_fused, sys, torch; path = resnet_fused.__file__; assert path.startswith(sys.prefix), path; \
	from resnet_fused.ops import library; \
	print("resnet_fused from", path, "under torch", torch.__version__, "- CUDA library:", library.why_no_cuda() or "loaded")'; \
	OMP_NUM_THREADS=1 $$python -m pytest $(2) .
endef

# The interpreter of the Triton that came with torch 2.10 and 2.11 does not know NumPy 2.4.
test-other-torch: wheel
	$(PYTHON) -m venv $(OTHER_VENV)
	$(OTHER_VENV)/bin/python -m pip install --quiet torch==$(OTHER_TORCH) pytest pytest-xdist hypothesis expecttest 'numpy<2.4'
	$(OTHER_VENV)/bin/python -m pip install --quiet --force-reinstall --no-deps dist/*.whl
	$(call run_operator_tests,$(OTHER_VENV),-n 2 $(ARGS))

# An environment of its own for the wheel; torch, of several GB, is that of $(VENV).
test-wheel: wheel
	$(BIN)/python -m venv --clear $(WHEEL_VENV)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
	  $$($(WHEEL_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch.pth
	$(WHEEL_VENV)/bin/python -m pip install --quiet --force-reinstall --no-deps dist/*.whl
	$(call run_operator_tests,$(WHEEL_VENV),-n 2 $(ARGS))

audit: $(BUILT)
	$(BIN)/python -m pip install --quiet torch-abi-audit==0.3.0
	for library in resnet_fused/*.so; do $(BIN)/torch-abi-audit --check torch "$$library"; done

emulated: $(BUILT)
	$(BIN)/python tools/cuda_build.py --emulated $(EMULATED)

# One thread a process, two processes: launches of the tests are too small to share. The last runs are samples, for time.
test-emulated: $(BUILT)
	$(if $(HAVE_EMULATOR),$(BIN)/python tools/cuda_build.py --emulated $(EMULATED))
	$(EMULATE) $(BIN)/python -m pytest -n 2 --backend emulated --sample $(EMULATED_SAMPLE) $(EMULATED_TESTS) $(ARGS)
	$(if $(HAVE_EMULATOR),for order in $(ORDERS); do CUDA_ON_CPU_SEED=$$order \
	  $(EMULATE) $(BIN)/python -m pytest -n 2 -q -r f --backend emulated --sample $$order/5 $(ORDERED_TESTS) $(ARGS); done)

traffic: emulated
	$(subst THREADS=1,THREADS=$(shell nproc),$(EMULATE)) $(BIN)/python tools/traffic.py $(ARGS)

static: $(BUILT)
	$(BIN)/python tools/static_checks.py $(ARGS)

test-triton: $(BUILT)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --backend triton tests/test_triton.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --backend triton --sample $(TRITON_SAMPLE) $(TRITON_TESTS) $(ARGS)
	$(if $(HAVE_EMULATOR),$(WITH_EMULATOR) $(BIN)/python -m pytest -n 2 --backend ptx tests/test_triton.py)
	$(if $(HAVE_EMULATOR),$(WITH_EMULATOR) $(BIN)/python -m pytest -n 2 --backend ptx --sample $(PTX_SAMPLE) $(PTX_TESTS) $(ARGS))

triton-traffic: $(BUILT)
	$(WITH_EMULATOR) $(BIN)/python tools/triton_traffic.py $(ARGS)

triton-checks: $(BUILT)
	$(BIN)/python tools/triton_checks.py $(ARGS)

comparison: emulated
	$(WITH_EMULATOR) $(BIN)/python tools/comparison.py --emulator $(EMULATOR) --inductor $(INDUCTOR) $(ARGS)

model-table: $(BUILT)
	OMP_NUM_THREADS=1 $(BIN)/python tools/model_table.py $(ARGS)

gpu-check: $(BUILT)
	$(BIN)/python tools/gpu_check.py $(ARGS)

rehearse-gpu-check: $(BUILT)
	EMULATOR=$(abspath $(EMULATOR)) $(BIN)/python tools/gpu_check.py --rehearse $(ARGS)

# As on a machine that has this torch and little more: a copy that knows nothing of git, .venv and build.
rehearse-gpu-check-elsewhere: $(if $(HAVE_EMULATOR),emulated,$(BUILT))
	$(PYTHON) -m venv $(ELSEWHERE_VENV)
	$(ELSEWHERE_VENV)/bin/python -m pip install --quiet $(ELSEWHERE) pytest pytest-xdist numpy tabulate tqdm
	directory=$$(mktemp -d); trap 'rm -rf "$$directory"' EXIT; \
	cp -r benchmarks csrc resnet_fused tests tools setup.py pyproject.toml "$$directory"; \
	$(if $(HAVE_EMULATOR),mkdir -p "$$directory/$(dir $(EMULATED))"; cp $(EMULATED) "$$directory/$(EMULATED)";) \
	cd "$$directory"; unset PYTHONPATH; EMULATOR=$(if $(HAVE_EMULATOR),$(abspath $(EMULATOR))) $(CURDIR)/$(ELSEWHERE_VENV)/bin/python tools/gpu_check.py --rehearse $(ARGS)

clean:
	rm -rf build dist $(BUILT) *.egg-info resnet_fused/*.so

$(BIN)/python:
	@for python in $(PYTHON) python3.14 python3.13 python3.12 python3.11 python3.10; do \
	  if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$${found:-}" ]; then \
	  echo 'resnet_fused needs Python 3.10 or newer: install one, or name it with make PYTHON=...' >&2; exit 1; \
	fi; \
	if ! "$$found" -m venv $(VENV) >$(VENV).log 2>&1; then \
	  rm -rf $(VENV) $(VENV).log; \
	  echo "resnet_fused needs Python's venv module, which $$found lacks (Debian, Ubuntu: apt install python3-venv)." >&2; exit 1; \
	fi; rm -f $(VENV).log

$(DEPENDENCIES): pyproject.toml tools/requirements.py | $(BIN)/python
	@echo 'Installing the dependencies into $(VENV); the first time takes some minutes.'
	@$(BIN)/python tools/requirements.py demo test lint > $@.txt
	@$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --quiet $(TORCH) -r $@.txt
	@touch $@

# In place, and on the environment's path: setuptools' editable install would compile everything again each time.
$(BUILT): $(DEPENDENCIES) setup.py tools/cuda_build.py tools/cuda_toolkit.py $(CXX_SOURCES)
	@echo 'Building the libraries; the first time takes some minutes.'
	@mkdir -p build; $(BIN)/python setup.py build_ext --inplace >build/build.log 2>&1 || { cat build/build.log >&2; exit 1; }
	@grep '^resnet_fused:' build/build.log || true
	@$(BIN)/python -c 'import pathlib, sysconfig; \
	pathlib.Path(sysconfig.get_path("purelib"), "resnet_fused.pth").write_text("$(CURDIR)\n")'
	@touch $@
