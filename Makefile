# `make demo` and `make test` set themselves up: a virtual environment with the versions of constraints.txt.
PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check
RUN = $(VENV)/bin/python -m

.PHONY: demo test test-slow lint bench clean

demo: $(VENV)/.ready  ## align a small model on arithmetic pairs with BNF, DPO and NLL+PLL; report under runs/demo
	$(VENV)/bin/rgpb demo --output runs/demo

test: lint  ## lint, types and the fast tests
	$(RUN) pytest

test-slow: lint  ## also the slow ones
	$(RUN) pytest --slow

lint: $(VENV)/.ready
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy

bench: $(VENV)/.ready  ## fused against naive PyTorch and the bare products on this machine
	$(VENV)/bin/rgpb bench --out benchmarks/results/local

# torch first, so that nothing else decides which build of it comes
$(VENV)/.ready: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q --progress-bar off -c constraints.txt setuptools wheel
	$(PIP) install --progress-bar off -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(PIP) install --progress-bar off -c constraints.txt --no-build-isolation -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info runs
