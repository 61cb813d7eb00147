# Two commands for a machine with Python 3.11 or newer and nothing else: `make reproduce` and `make test`.
# The interpreter that makes .venv can be named: make test PYTHON=python3.13

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup reproduce test lab lint clean lock

help: ## list the commands
	@sed -n 's/^\([a-z]*\):.*## /  make \1	/p' $(MAKEFILE_LIST) | expand -t 18

setup: $(STAMP) ## make .venv with the exact versions of requirements.lock

reproduce: $(STAMP) ## run every notebook live on the digits data; pages under build/, the verdict table on screen
	$(BIN)/prunelab run all -p DATASET digits --fresh

# One thread per worker: two workers on two cores beat two threads in one.
test: $(STAMP) ## run the unit tests, then the committed notebooks against their recorded outputs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n 2
	$(BIN)/python -m pytest notebooks --nbval --nbval-current-env --nbval-sanitize-with tests/nbval_sanitize.cfg

lab: $(STAMP) ## open the notebooks in JupyterLab
	$(BIN)/jupyter-lab notebooks

lint: $(STAMP) ## check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

clean: ## remove what the other commands made, except .venv
	rm -rf build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name .venv -prune -o -name __pycache__ -prune -exec rm -rf {} +

lock: ## write requirements.lock anew from the newest versions that pyproject.toml allows
	rm -rf build/lock
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --upgrade pip
	build/lock/bin/python -m pip install '.[dev]'
	{ sed '/^#/!d' requirements.lock; \
	  build/lock/bin/python -m pip freeze --all --exclude pip --exclude prunelab \
	  | sed -E '/^(cuda|nvidia|triton)/ s/$$/ ; platform_system == "Linux" and platform_machine == "x86_64"/'; } > build/requirements.lock
	mv build/requirements.lock requirements.lock
	rm -rf build/lock

$(STAMP): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "prunelab needs Python 3.11 or newer, as $(PYTHON); name another with: make PYTHON=python3.13" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --upgrade pip
	$(BIN)/python -m pip install -r requirements.lock
	$(BIN)/python -m pip install --no-deps -e .
	@touch $@
