# make demo: trains a real network on real images five ways, prints the table and writes a page about it.
# make test: lint, types, tests.
# Both make the virtual environment first, from the package registry alone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready-run
READY_DEV := $(VENV)/.ready-dev

.PHONY: demo test test-slow test-faults lint docs results clean
demo: $(READY)
	$(BIN)/localgrad compare --data digits --methods bp,bp@recompute=all,dgl,dgl+man,dgl+deep-man --blocks 4 --seeds 0 --out runs/demo
	$(BIN)/localgrad probe runs/demo --against runs/demo/bp_k1_s0
	$(BIN)/localgrad report runs/demo --out runs/demo/report.html

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(READY_DEV)
	$(BIN)/python -m pytest -m slow

test-faults: $(READY_DEV)
	$(BIN)/python -m pytest -m 'not gpu' --figures results/reliability.csv tests/faults tests/run/test_resume.py \
		tests/run/test_step.py tests/run/test_bad_images.py tests/run/test_files.py tests/run/test_checkpoint.py

lint: $(READY_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# The documentation site, all of it anew, with warnings as errors: a link that leads nowhere is one.
docs: $(READY_DEV)
	$(BIN)/sphinx-build -E -W --keep-going -q -c docs . build/site
	@echo "the site is in build/site/index.html"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(READY): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install -q -c constraints.txt torch torchvision
	$(BIN)/pip install -q -c constraints.txt -e '.[plot]'
	touch $@

$(READY_DEV): pyproject.toml constraints.txt $(READY)
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

# The tables and pictures of README.md and docs/ from what lies in results/.
results: $(READY_DEV)
	$(BIN)/python benchmarks/fill_tables.py
	$(BIN)/python benchmarks/draw_pictures.py

clean:
	rm -rf $(VENV)
