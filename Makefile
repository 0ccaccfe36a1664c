# Two commands do all the set-up on a machine with Python 3.11, g++ and make: `make demo`, `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --no-input --disable-pip-version-check

# The folders are listed too: deleting a file changes their date.
SOURCES := $(shell find cmake csrc fusedopt kernels -name __pycache__ -prune -o -print) \
           CMakeLists.txt pyproject.toml setup.py
CXX_FILES = $(shell find csrc tests benchmarks -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

# $(call configure,FOLDER,OPTIONS)
configure = $(BIN)/cmake -S . -B $(1) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
            -DPython_EXECUTABLE=$(abspath $(BIN)/python) -DFUSEDOPT_TESTS=ON $(2)

.NOTPARALLEL:
.PHONY: help demo quick test lint test-cpp test-python test-triton test-oldest test-newest test-pythons \
        test-asan test-tsan fuzz format bench bench-gpu sweep-gpu report gpu-install gpu-check clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/requirements.stamp: requirements-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -r requirements-dev.txt
	touch $@

# Elsewhere than in this folder, whose fusedopt would be imported.
REPORT = cd $(VENV) && bin/python -m fusedopt

$(VENV)/installed.stamp: $(VENV)/requirements.stamp $(SOURCES)
	rm -f $(VENV)/quick.stamp
	$(PIP) install --no-build-isolation --no-deps .
	$(REPORT)
	touch $@

$(VENV)/quick.stamp: $(VENV)/requirements.stamp $(SOURCES)
	rm -f $(VENV)/installed.stamp
	FUSEDOPT_BUILD=cpu $(PIP) install --no-build-isolation --no-deps .
	touch $@

demo: $(VENV)/installed.stamp  ## train on real data with torch.optim and with fusedopt, and compare
	$(BIN)/python examples/demo.py

quick: $(VENV)/quick.stamp  ## ruff, mypy and a thin table of tests on the cpu and torch backends; no nvcc
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q --thin --backend=cpu --backend=torch

test: lint test-cpp test-python  ## everything that has to pass

lint: $(VENV)/installed.stamp  ## ruff, clang-format and mypy, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/mypy

# In the CMake folder that the installation used: the objects are compiled already.
test-cpp: $(VENV)/installed.stamp  ## the C++ tests, without torch
	$(call configure,build/cmake)
	$(BIN)/cmake --build build/cmake --target fusedopt_tests
	$(BIN)/ctest --test-dir build/cmake --output-on-failure --no-tests=error

test-python: $(VENV)/installed.stamp  ## the Python tests, against the installed package
	$(BIN)/python -m pytest -q

test-triton: $(VENV)/installed.stamp  ## every test of the Triton backend in its interpreter: half an hour
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --backend=triton
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/test_triton_*.py

# In environments of their own under build/; THIN=--thin leaves out most combinations.
test-oldest:  ## the suite on the oldest torch that we support
	$(PYTHON) tests/environments.py --torch 2.11.0 -- $(THIN)

test-newest:  ## the suite on the newest torch
	$(PYTHON) tests/environments.py --torch 2.15.0 -- $(THIN)

test-pythons:  ## a thin suite on each Python from 3.10 to 3.14 that is on this machine
	$(PYTHON) tests/environments.py --python 3.10 3.11 3.12 3.13 3.14 -- --thin

# CASES counts stories instead of seconds; BACKEND and SEED choose where, and the first of them.
fuzz: $(VENV)/installed.stamp  ## random training stories for SECONDS (an hour), until one fails
	cd tests && $(abspath $(BIN))/python -m fuzz --backend $(or $(BACKEND),cpu) --seed $(or $(SEED),0) \
	    $(if $(CASES),--cases $(CASES),--seconds $(or $(SECONDS),3600))

# The installed package again, in a folder of its own, with an instrumented extension. Python itself is not instrumented:
# the sanitizer's library comes first (and the one that throws, which it looks for at once), and leaks are not looked for.
ASAN = build/asan
ASAN_PRELOAD = $(foreach library,asan stdc++,$(shell c++ -print-file-name=lib$(library).so))
ASAN_RUN = PYTHONPATH=$(abspath $(ASAN)/site) LD_PRELOAD="$(ASAN_PRELOAD)" ASAN_OPTIONS=detect_leaks=0 \
           UBSAN_OPTIONS=print_stacktrace=1 $(abspath $(BIN))/python
ASAN_TESTS = numbers_test instruction_sets_test threads_test

test-asan: $(VENV)/installed.stamp  ## bad accesses and undefined behaviour: C++ tests, a thin table of tests, the fuzzer
	$(call configure,$(ASAN),-DFUSEDOPT_SANITIZE=address)
	$(BIN)/cmake --build $(ASAN) --target _C $(ASAN_TESTS)
	for name in $(ASAN_TESTS); do $(ASAN)/$$name || exit 1; done
	rm -rf $(ASAN)/site && mkdir $(ASAN)/site
	cp -r "$$(cd $(ASAN) && $(abspath $(BIN))/python -c 'import fusedopt; print(*fusedopt.__path__)')" $(ASAN)/site
	cp $(ASAN)/_C.*.so $(ASAN)/site/fusedopt
	cd tests && $(ASAN_RUN) -m pytest -q -p no:cacheprovider --thin --backend=cpu
	cd tests && $(ASAN_RUN) -m fuzz --seed 1000 --cases 100

test-tsan: $(VENV)/requirements.stamp  ## races between the threads of a step
	$(call configure,build/tsan,-DFUSEDOPT_SANITIZE=thread -DFUSEDOPT_PYTHON=OFF)
	$(BIN)/cmake --build build/tsan --target threads_test
	TSAN_OPTIONS=halt_on_error=1 build/tsan/threads_test

format: $(VENV)/requirements.stamp  ## ruff and clang-format, in place
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

bench: $(VENV)/installed.stamp  ## measure on this CPU
	$(BIN)/python benchmarks/run.py cpu

bench-gpu: gpu-install  ## measure on the GPU of $(PYTHON); no network, no virtual environment
	$(PYTHON) benchmarks/run.py gpu

sweep-gpu: gpu-install  ## time what the CUDA launcher chooses against other choices, on the GPU of $(PYTHON)
	$(PYTHON) benchmarks/sweep.py

report: $(VENV)/installed.stamp  ## tables and plots from the recorded results
	$(BIN)/python benchmarks/report.py

gpu-install:
	FUSEDOPT_BUILD=cuda $(PYTHON) -m pip install --quiet --no-index --no-build-isolation --no-deps .

gpu-check: gpu-install  ## check on the GPU of $(PYTHON); no network, no virtual environment
	$(PYTHON) tests/gpu_check.py

clean:  ## remove everything that was built
	rm -rf $(VENV) build dist *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
