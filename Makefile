# make demo: run the embedded example.   make test: run the checks.   Each installs what it needs into .venv.
# make peers: compare with sd-meh and sd-mecha, which it installs into .venv-peers.
# make transformers4: test the learnt scorers with transformers 4, which it installs into .venv-transformers4.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test peers transformers4 clean

demo: .venv/installed
	$(BIN)/bayesian-merger demo --run-dir runs/demo

test: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4

peers: .venv/installed-dev .venv-peers/installed
	BAYESIAN_MERGER_PEERS=.venv-peers/bin/python $(BIN)/python -m pytest -m peers

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

.venv/installed: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) --editable ".[diffusers,fast]"
	touch $@

.venv/installed-dev: .venv/installed
	$(INSTALL) --editable ".[diffusers,fast,dev]"
	touch $@

# sd-meh needs tensordict without saying so.
.venv-peers/installed: constraints.txt
	$(PYTHON) -m venv --clear .venv-peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt torch sd-meh 'sd-mecha~=1.1' tensordict
	touch $@

transformers4: .venv-transformers4/installed
	.venv-transformers4/bin/python -m pytest tests/test_towers.py tests/test_hub.py tests/test_scoring.py tests/scorers

.venv-transformers4/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear .venv-transformers4
	grep -v -E '^(transformers|huggingface-hub|tokenizers)==' constraints.txt > .venv-transformers4/constraints.txt
	.venv-transformers4/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint .venv-transformers4/constraints.txt --editable ".[scorers]" 'transformers<5' pytest hypothesis
	touch $@

clean:
	rm -rf .venv .venv-peers .venv-transformers4 runs
