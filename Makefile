# Everything a fresh machine needs: Python >= 3.11, make, and the package index.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OLDEST := build/oldest
INSTALLED := $(VENV)/.installed

.PHONY: help install demo docs test test-slow test-peft test-sanitized test-oldest lint release-check clean
help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(INSTALLED)  ## make the virtual environment and install spp with its development tools

$(INSTALLED): pyproject.toml setup.py constraints.txt $(wildcard src/spp/ops/native/*.cpp src/spp/ops/native/*.h)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: $(INSTALLED)  ## run the main job on the bundled model: prune, SPP fine-tune, merge, verify, evaluate, report
	$(BIN)/spp run --out runs/demo

# The theme's banner about its end of life is answered in docs/dependencies.md.
docs: $(INSTALLED)  ## build the documentation into build/site; a broken link or anchor stops it
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir build/site

test: $(INSTALLED)  ## run the test-suite, two tests at a time
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

test-slow: $(INSTALLED)  ## run the slow tests as well, with the extras that some need
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev,deepspeed,quant]"
	$(BIN)/python -m pytest -m "not gpu"

test-peft: $(INSTALLED)  ## run PEFT's own test-suite with SPP added to it
	$(BIN)/python scripts/test_peft.py

test-sanitized: $(INSTALLED)  ## run the native kernels' tests under AddressSanitizer and UBSan (needs g++)
	$(BIN)/python scripts/test_sanitized.py

test-oldest:  ## run scripts/smoke_test.py with the oldest versions of the dependencies, in build/oldest
	rm -rf $(OLDEST) build/lib* build/temp*
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet --disable-pip-version-check --constraint constraints-oldest.txt .
	$(OLDEST)/bin/python scripts/smoke_test.py

lint: $(INSTALLED)  ## style, types, and the direction of imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports

release-check:  ## build what would be released, check it, install it where nothing else is, and run the demo
	$(PYTHON) scripts/release_check.py

clean:  ## remove what the targets above made, except results in runs/
	rm -rf $(VENV) build dist
