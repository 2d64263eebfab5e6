# Two commands for a fresh machine: `make fit` (the main job on the demo model) and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Packages are pinned for CI and for these targets; `pip install .` alone takes the lower bounds of pyproject.toml.
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help fit demo-web docs test test-slow test-arm test-gpu lint format install install-dev benchmarks clean

help:
	@echo "make fit         install, then run the main job on the demo model for a Raspberry Pi 5"
	@echo "make demo-web    the same for the browser, served at http://127.0.0.1:8000 (needs npm)"
	@echo "make docs        the documentation, into build/site"
	@echo "make test        install with the dev extra, then run the tests"
	@echo "make test-slow   the tests that take minutes"
	@echo "make test-gpu    layers on a GPU, or on a software one: builds llama.cpp with Vulkan"
	@echo "make test-arm    files judged on an emulated ARM board; as root"
	@echo "make lint        ruff and mypy"
	@echo "make benchmarks  measure again what the README's tables show (EDGEPRUNE_DATA names the data folder)"

$(VENV)/.made:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade "pip>=24" "setuptools>=77" wheel
	@touch $@

# llama.cpp is compiled without its multimodal part, and without AMX where the compiler would use that: some optimise
# ggml's tile configuration away (GCC 12.2: seen; ggml-org/llama.cpp#26954), and every prompt of a quantised file then
# dies of an illegal instruction.
AMX := $(findstring __AMX_INT8__,$(shell $(CC) -march=native -dM -E -x c /dev/null 2>/dev/null))
LLAMA_CMAKE := -DMTMD_BUILD=OFF $(if $(AMX),-DCMAKE_C_FLAGS=-mno-amx-int8 -DCMAKE_CXX_FLAGS=-mno-amx-int8)

# torch first and by exact version: a range would pull gigabytes of CUDA where a CPU build is at hand. llama-cpp-python
# compiles here; pip keeps the wheel for the next time.
$(VENV)/.installed: $(VENV)/.made pyproject.toml constraints.txt
	@echo "installing; compiling llama-cpp-python takes 4 to 8 minutes the first time"
	$(PIP) install --quiet "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	CMAKE_ARGS="$(LLAMA_CMAKE) $$CMAKE_ARGS" $(PIP) install --quiet -c constraints.txt -e ".[all]"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install --quiet -c constraints.txt -e ".[dev]"
	@touch $@

install: $(VENV)/.installed

install-dev: $(VENV)/.installed-dev

# 150 tokens/s in 256 MiB: more than the dense model reaches there with any quantisation, so pruning must find the rest.
fit: install
	$(BIN)/edgeprune fit --device rpi5 --min-tps 150 --max-memory 256

# What the page needs of npm goes beside a copy: the shipped folder stays as it was proved. npm's install scripts would
# download what the packages hold already, for other devices.
WEB := build/demo-web
demo-web: install
	$(BIN)/edgeprune fit --quant int4 --no-tune --out runs/demo-web --to transformers.js:q4
	rm -rf $(WEB) && mkdir -p build && cp -r runs/demo-web/ship/transformers.js $(WEB)
	cd $(WEB) && npm install --ignore-scripts --no-audit --no-fund
	@echo "open http://127.0.0.1:8000"
	cd $(WEB) && $(CURDIR)/$(BIN)/python -m http.server --bind 127.0.0.1 8000

docs: install-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "open build/site/index.html"

# A worker a core, whole files each: fixtures of a file are made once.
test: install-dev
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

test-slow: install-dev
	$(BIN)/python -m pytest -m slow

# Builds an emulated board at first use (a quarter of an hour); needs root and Debian's packages, which it names.
test-arm: install-dev
	$(BIN)/python -m pytest -m arm -s tests/arm

# llama.cpp with Vulkan in an environment of its own; on Debian without a GPU: apt-get install mesa-vulkan-drivers
# libvulkan-dev glslc glslang-tools spirv-headers. llama.cpp wants headers of Vulkan 1.4; Debian 12 has older ones: unpack
# trixie's libvulkan-dev (dpkg -x) and add -DVulkan_INCLUDE_DIR=…/usr/include to GPU_CMAKE_ARGS. No cache: pip's has the
# wheel without a GPU under the same name.
GPU_CMAKE_ARGS ?= -DGGML_VULKAN=on $(LLAMA_CMAKE)
$(VENV)-gpu/.installed: constraints.txt
	$(PYTHON) -m venv $(VENV)-gpu
	CMAKE_ARGS="$(GPU_CMAKE_ARGS)" $(VENV)-gpu/bin/python -m pip install --quiet --no-cache-dir --no-binary=llama-cpp-python -c constraints.txt llama-cpp-python numpy
	$(VENV)-gpu/bin/python -m pip install --quiet --no-deps -e .
	@touch $@

test-gpu: install-dev $(VENV)-gpu/.installed
	EDGEPRUNE_GPU_PYTHON=$(VENV)-gpu/bin/python $(BIN)/python -m pytest -m gpu tests/gpu

# mypy follows no import hooks, so it gets the package laid out as an installed one, by links.
lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@rm -rf build/typed && mkdir -p build/typed/edgeprune
	@for f in edgeprune/*; do ln -s "$$PWD/$$f" build/typed/edgeprune/; done
	@for d in export runtimes profiles; do ln -s "$$PWD/$$d" build/typed/edgeprune/$$d; done
	cd build && ../$(BIN)/mypy --config-file ../pyproject.toml

format: install-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmarks: install-dev
	$(BIN)/python benchmarks/amp.py --out build/amp.json
	$(BIN)/python benchmarks/scoring.py --out build/scoring.json
	$(BIN)/python benchmarks/predictor.py --out build/predictor.json

clean:
	rm -rf build runs $(VENV) $(VENV)-gpu .pytest_cache .mypy_cache .ruff_cache .hypothesis
