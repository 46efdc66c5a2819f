# Two commands for a fresh machine: `make demo` answers a question, `make test` proves the rest.
# Both create .venv with a CPU build of torch; for a GPU machine see README.md.

PYTHON ?= python3
BIN := .venv/bin
QUESTION ?= What is a KV cache?
# As it was given, in the environment: neither make nor the shell reads anything into it.
override QUESTION := $(value QUESTION)
export QUESTION
CLIENTS := tests/server

.PHONY: demo test lint format lines clean

.venv/.demo: pyproject.toml constraints-cpu.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints-cpu.txt -e .
	touch $@

.venv/.test: .venv/.demo
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints-cpu.txt -e '.[dev]'
	touch $@

# Other people's clients of the server, each apart from what this project itself needs.
.venv/.clients: $(CLIENTS)/python_clients/requirements.txt | .venv/.demo
	$(PYTHON) -m venv .venv/clients
	.venv/clients/bin/python -m pip install -q --disable-pip-version-check --no-compile -r $<
	touch $@

.venv/.node: $(CLIENTS)/node_clients/package-lock.json | .venv/.demo
	if command -v npm >/dev/null; then npm ci --prefix $(dir $<) --no-audit --no-fund --silent; fi
	touch $@

demo: .venv/.demo
	$(BIN)/nanovllm generate -- "$$QUESTION"

test: lint .venv/.clients .venv/.node
	$(BIN)/python -m pytest

lint: .venv/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: .venv/.test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lines:
	$(PYTHON) tools/count_lines.py

clean:
	rm -rf .venv $(CLIENTS)/node_clients/node_modules build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
