# The README's two commands. Both make .venv first and install the pinned CPU packages into it.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
TRITON := .venv-triton/installed

.PHONY: demo test check triton clean

demo: $(INSTALLED)
	$(BIN)/wan-trt demo demo

test: $(INSTALLED) $(TRITON) check
	$(BIN)/python -m pytest -q

# Export at full size: throughput beside cp, memory. Needs some 30 GB of disk for a while, and minutes.
scale: $(INSTALLED)
	$(BIN)/python -m studies.full_size

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(INSTALLED): requirements-cpu.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --requirement requirements-cpu.txt
	$(BIN)/pip install --quiet --no-deps --editable .
	touch $@

# The environment of models inside tritonserver: the server's wheel, and numpy 1, which its stub needs.
triton: $(TRITON)

$(TRITON): requirements-triton.txt pyproject.toml
	$(PYTHON) -m venv .venv-triton
	.venv-triton/bin/pip install --quiet --no-deps --requirement requirements-triton.txt
	.venv-triton/bin/pip install --quiet --no-deps --editable .
	touch $@

clean:
	rm -rf .venv .venv-triton demo
