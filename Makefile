# Two commands: `make demo` and `make test`. Both create .venv on first use and reuse it afterwards.
# Variables: PYTHON (3.11 to 3.13), PIP_FLAGS (for example --extra-index-url of PyTorch's CPU wheels).

PYTHON ?= $(firstword $(foreach python,python3 python3.13 python3.12 python3.11,\
    $(shell $(python) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $(python))))
PIP_FLAGS ?=
BIN := .venv/bin
INSTALLED := .venv/.installed
SOURCES := megalodon_deploy tests examples benchmarks plugins cpp

.PHONY: demo test lint types plugins cpp resources sanitize mutants aarch64 package clean help

help:
	@echo "make demo     train, export, verify, build and stream a small model (about 6 minutes after set-up)"
	@echo "make test     lint, types, C++ build, all tests"
	@echo "make plugins  the compiled libraries: CUDA kernels and TensorRT plugins, operators for ONNX Runtime"
	@echo "make cpp      the C++ runtime, its examples and tests, in build/cpp"
	@echo "make sanitize the emulated kernels and the plugins under AddressSanitizer and UBSan (part of make test)"
	@echo "make mutants  takes each barrier, mask and bound check out of the kernels and sees that a test fails"
	@echo "make aarch64  the whole library for Jetson and Grace, compiled here"
	@echo "make resources  registers, stack and shared memory of every kernel on every GPU"
	@echo "make package  wheel and source distribution, in dist"

demo: $(INSTALLED) plugins
	$(BIN)/python examples/demo.py

test: lint types plugins resources
	$(BIN)/pytest -n auto --dist loadfile --no-loadscope-reorder

lint: $(INSTALLED)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	git ls-files '*.cu' '*.cuh' '*.cpp' '*.h' '*.hpp' | xargs -r $(BIN)/clang-format --dry-run --Werror

types: $(INSTALLED)
	$(BIN)/mypy

plugins: $(INSTALLED)
	$(BIN)/python -m megalodon_deploy.engine.toolchain build-cpu
	$(BIN)/python -m megalodon_deploy.engine.toolchain build-plugins

cpp: $(INSTALLED)
	$(BIN)/python cpp/build.py

resources: plugins
	$(BIN)/python plugins/tests/kernel_resources.py

sanitize: $(INSTALLED)
	$(BIN)/pytest tests/plugins/test_sanitizers.py

aarch64: $(INSTALLED)
	MEGALODON_WHOLE_AARCH64=1 $(BIN)/pytest tests/plugins/test_cross_compile.py

mutants: $(INSTALLED)
	$(BIN)/python plugins/tests/mutate.py --report build/mutants.md

package: $(INSTALLED)
	$(BIN)/python -m build

# torch first and by name: an index that has a CPU build then serves that one, without gigabytes of CUDA packages.
$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed: install it, or name it: make PYTHON=/path/to/python"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv || \
	    { rm -rf .venv; echo "the venv module is missing: apt-get install python3-venv"; exit 2; }
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -c constraints.txt torch
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv build dist demo
