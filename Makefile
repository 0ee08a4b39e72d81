# The README's two commands. Both make .venv first and install the pinned CPU packages into it.
PYTHON ?= python3
WORKERS ?= 3
BIN := .venv/bin
INSTALLED := .venv/installed
TRITON := .venv-triton/installed
OFFICIAL := .venv-official/installed
CUPY := .venv-cupy/installed
TOOLS := .venv-tools/installed
COMPILE = .venv-tools/bin/uv pip compile --quiet $(UPGRADE) --generate-hashes --no-annotate --no-header \
	--python-platform x86_64-manylinux_2_36 --python-version

# Hundreds of processes of the tests would compile our modules anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo picture test slow check triton official checkov vbench lock sbom scale clean

demo: $(INSTALLED)
	$(BIN)/wan-trt demo demo

# The picture of the README, from what make demo left. Needs Chromium.
picture: $(INSTALLED)
	$(BIN)/python -m studies.picture demo docs/demo.png

# More processes than cores share the test files, because many tests wait for a server or a build. A process that has
# PyTorch compute on one core takes a fifth less of the processors than one whose threads wait for each other.
test: $(INSTALLED) $(TRITON) $(OFFICIAL) $(CUPY) check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses $(WORKERS) --dist loadfile -m "not slow"
	PYTHONPATH=.venv-cupy $(BIN)/python -m pytest -q tests/runtime/test_engine_cuda.py tests/runtime/test_group_cuda.py -k cupy

# Commands killed at random moments, failing disks, fuzzed files, engine builds in full size, the commands of docs/.
slow: $(INSTALLED) $(TRITON) $(OFFICIAL)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses $(WORKERS) --dist worksteal -m slow

# Export at full size: throughput beside cp, memory. Needs some 30 GB of disk for a while, and minutes.
scale: $(INSTALLED)
	$(BIN)/python -m studies.full_size

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# torch comes first, with the packages that its build lists: for the CPU build all of them are in the lock.
$(INSTALLED): requirements-cpu.txt requirements-torch.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-deps --require-hashes --requirement requirements-cpu.txt --requirement requirements-torch.txt
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

# The environment of models inside tritonserver: the server's wheel, and numpy 1, which its stub needs.
triton: $(TRITON)

$(TRITON): requirements-triton.txt pyproject.toml
	$(PYTHON) -m venv .venv-triton
	.venv-triton/bin/pip install --quiet --no-deps --require-hashes --requirement requirements-triton.txt
	.venv-triton/bin/pip install --quiet --no-deps --editable .
	touch $@

# The official Wan2.2 code, which validate --official and its tests compare with.
official: $(OFFICIAL)

$(OFFICIAL): requirements-official.txt
	$(PYTHON) -m venv .venv-official
	.venv-official/bin/pip install --quiet --no-deps --require-hashes --requirement requirements-official.txt
	touch $@

# CuPy, whose names and signatures the tests compare with the runtime's calls. It cannot run without a GPU.
$(CUPY): requirements-cupy.txt $(INSTALLED)
	rm -rf .venv-cupy
	$(BIN)/pip install --quiet --no-deps --require-hashes --target .venv-cupy --requirement requirements-cupy.txt
	touch $@

# The linter of the Kubernetes manifests, whose many dependencies are nobody else's. Its test is skipped without it.
checkov: .venv-checkov/installed

.venv-checkov/installed: requirements-checkov.txt
	$(PYTHON) -m venv .venv-checkov
	.venv-checkov/bin/pip install --quiet --require-hashes --requirement requirements-checkov.txt
	touch $@

# VBench, for python -m studies.vbench. Needs some 7 GB with PyTorch's CUDA libraries; nothing else uses it.
vbench: .venv-vbench/installed

.venv-vbench/installed: requirements-vbench.txt
	$(PYTHON) -m venv .venv-vbench
	.venv-vbench/bin/pip install --quiet --no-deps --require-hashes --requirement requirements-vbench.txt
	touch $@

# Pins every version and hash again: the newest that pyproject.toml and the .in files allow, with UPGRADE=--upgrade.
lock: $(TOOLS)
	$(COMPILE) 3.11 --constraint requirements-torch.txt --no-emit-package torch --extra export --extra cpu \
		--extra validate --extra official --extra synth --extra mlperf --extra batch --extra sign --extra triton --extra gateway --extra dev pyproject.toml requirements-cpu.in -o requirements-cpu.txt
	$(COMPILE) 3.11 --no-deps requirements-triton.in -o requirements-triton.txt
	$(COMPILE) 3.11 --no-deps requirements-official.in -o requirements-official.txt
	$(COMPILE) 3.11 --no-deps requirements-cupy.in -o requirements-cupy.txt
	$(COMPILE) 3.11 requirements-tools.in -o requirements-tools.txt
	$(COMPILE) 3.11 requirements-checkov.in -o requirements-checkov.txt
	$(COMPILE) 3.11 requirements-wheel.in -o requirements-wheel.txt
	$(COMPILE) 3.11 --extra gateway --extra triton pyproject.toml -o requirements-gateway.txt
	$(COMPILE) 3.12 --extra gpu --extra triton pyproject.toml requirements-server.in -o requirements-server.txt
	$(COMPILE) 3.11 --no-config --allow-unsafe requirements-vbench.in -o requirements-vbench.txt

# What .venv holds, as CycloneDX JSON.
sbom: $(INSTALLED) $(TOOLS)
	.venv-tools/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible -o sbom.json $(BIN)/python

$(TOOLS): requirements-tools.txt
	$(PYTHON) -m venv .venv-tools
	.venv-tools/bin/pip install --quiet --require-hashes --requirement requirements-tools.txt
	touch $@

clean:
	rm -rf .venv .venv-triton .venv-official .venv-cupy .venv-tools .venv-checkov .venv-vbench demo
