# Targets make what they need: a fresh checkout and Python 3.11+ are enough.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check
# uv installs the same in a fifth of the time; pip where it cannot
FAST_INSTALL = $(BIN)/uv pip install --quiet --python .venv $(1) || $(INSTALL) $(1)
comma := ,
SOURCES := pyproject.toml constraints.txt

.PHONY: quickstart reference-models test test-fast test-slow test-gpu test-lowest conformance check format docs clean

.venv/bin/pip:
	$(PYTHON) -m venv .venv

# torch first and pinned: a range would let another package pull a build with gigabytes of CUDA
.venv/torch: .venv/bin/pip constraints.txt
	$(INSTALL) --constraint constraints.txt torch uv
	@touch $@

.venv/quickstart: .venv/torch $(SOURCES)
	$(call FAST_INSTALL,--constraint constraints.txt --editable '.[quickstart]')
	@touch $@

.venv/all: .venv/torch $(SOURCES)
	$(call FAST_INSTALL,--constraint constraints.txt --editable '.[quickstart$(comma)test$(comma)dev$(comma)docs]')
	@touch $@ .venv/quickstart

quickstart: .venv/quickstart
	$(BIN)/python recipes/quickstart.py --output_dir out/quickstart

# DATA=folder: local copies of the data sets; without it they come from the Hub
reference-models: .venv/quickstart
	$(BIN)/python recipes/reference_models.py $(if $(DATA),--data_dir $(DATA))

test: .venv/all
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist worksteal

test-fast: .venv/all
	$(BIN)/python -m pytest -m "not slow and not medium" -n 2 --dist worksteal

test-slow: .venv/all
	$(BIN)/python -m pytest -m slow

# On a machine with a GPU and a build of torch for it
test-gpu:
	HF_AL_TEST_GPU=1 $(PYTHON) -m pytest tests/gpu/checks.py

.venv/conformance: .venv/all
	$(INSTALL) --constraint constraints.txt --editable '.[conformance]'
	@touch $@

conformance: .venv/conformance
	$(BIN)/python tests/conformance/run.py

# The lowest versions that pyproject.toml allows, found by uv; all have wheels for Python 3.11. uv keeps what it finds
# installed: torch is to stay, but not to bring a new fsspec, which would keep out old versions of datasets.
.venv-lowest/all: $(SOURCES)
	$(PYTHON) -m venv --clear .venv-lowest
	.venv-lowest/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps torch uv
	.venv-lowest/bin/uv pip install --quiet --python .venv-lowest --resolution lowest-direct --editable '.[quickstart,test]'
	@touch $@

# Warnings are no errors here: those of old versions are not ours to mend.
test-lowest: .venv-lowest/all
	.venv-lowest/bin/python -m pytest -W default -m "not slow and not medium" -n 2 --dist worksteal

check: .venv/all
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell
	$(MAKE) test-fast

format: .venv/all
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/all
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf .venv .venv-lowest out build dist *.egg-info
