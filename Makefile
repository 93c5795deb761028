# `make train` and `make test` are all a newcomer needs; each target sets up .venv by itself.
# More flags for the training: make train FLAGS='--random_seed 1'
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help train test test-all docs export save lab hooks record-gpu clean

help:
	@echo "make train     set up, fetch CIFAR-10, train the recipe 'speedrun', show the test accuracy"
	@echo "make test      run all notebooks, pytest and the repository rules: what a contributor waits for"
	@echo "make test-all  the long tests too: a hundred kills, full-size networks, all test images"
	@echo "make docs      build the site into _docs"
	@echo "make lab       open the notebooks in JupyterLab"
	@echo "make hooks     let git check the repository rules before each commit"
	@echo "make save NB=nbs/learn/02_blocks.ipynb  run notebooks, store what they print, then export"
	@echo "make export    notebooks -> resnet_cifar/*.py and README.md, notebooks cleaned"
	@echo "make record-gpu  train all five sizes on a GPU and record them, in pieces: call it until all are there"
	@echo "make clean     remove .venv and what was built (data and checkpoints stay)"

train: .venv/runtime.stamp
	$(BIN)/python -m resnet_cifar train --recipe speedrun --root data/datasets --resume auto $(FLAGS)

test: .venv/dev.stamp
	$(BIN)/python tests/run_notebooks.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-all: .venv/dev.stamp
	$(BIN)/python tests/run_notebooks.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m ""

export: .venv/dev.stamp
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/python tests/readme.py

save: .venv/dev.stamp
	$(BIN)/nbdev_export
	$(BIN)/python tests/run_notebooks.py --save $(NB)
	$(MAKE) export

docs: .venv/dev.stamp
	$(BIN)/python tests/build_site.py

record-gpu: .venv/runtime.stamp
	$(BIN)/python tests/record_gpu.py $(FLAGS)

lab: .venv/dev.stamp
	$(BIN)/jupyter lab --notebook-dir nbs nbs/index.ipynb

hooks: .venv/dev.stamp
	git config core.hooksPath .githooks

clean:
	rm -rf .venv build dist _docs _proc *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	$(PYTHON) -m venv .venv

# a stamp a kind of install: made again when the requirements change
.venv/runtime.stamp: settings.ini setup.py | .venv/bin/python
	$(BIN)/python -m pip install -q -e .
	@touch $@

.venv/dev.stamp: settings.ini setup.py | .venv/bin/python
	$(BIN)/python -m pip install -q -e '.[dev]'
	@touch $@ .venv/runtime.stamp
