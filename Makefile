# Two commands do everything: `make demo` and `make test`. Both set up what they need, once.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: setup demo scaling test check format pins clean

setup: $(READY)

# Rebuilt only when the pins or the package's own metadata change.
$(READY): requirements.txt pyproject.toml
	@command -v uv >/dev/null 2>&1 || $(PYTHON) -m uv --version >/dev/null 2>&1 || $(PYTHON) -m pip install --quiet uv
	@PYTHON=$(PYTHON) ./cluster/setup.sh $(VENV)
	@touch $@

demo: $(READY)
	$(BIN)/factory demo --out runs/demo

# One plan on 1, 2 and 4 local nodes, then with a node killed; into the report of runs/scaling.
scaling: $(READY)
	$(BIN)/python jobs/scaling.py --run runs/scaling

# What starts Ray runs here, one after the other; the rest runs beside it and is told at the end.
test: $(READY)
	@rest=$$(mktemp); $(BIN)/python -m pytest -q -m "not ray" >$$rest 2>&1 & pid=$$!; \
	$(BIN)/python -m pytest -q -m ray --durations 15; first=$$?; \
	wait $$pid; second=$$?; cat $$rest; rm -f $$rest; exit $$((first | second))

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_floors.py

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# New pins from pyproject.toml: hashes, and no address of any index.
pins:
	uv pip compile pyproject.toml --extra test --extra s3 --extra export --constraint constraints.txt --python-version 3.11 \
	  --generate-hashes --no-emit-index-url --no-annotate --no-header --quiet --output-file requirements.txt

clean:
	rm -rf $(VENV)
