# `make help` lists the targets. Everything is set up in .venv, and a second call of a target does only what is left to do.
PYTHON ?= python3
EPOCHS ?= 12
MILESTONES ?= 8 11
FOLDER ?= checkpoints/fmnist_f400_demo
PY := .venv/bin/python

.DEFAULT_GOAL := help
.PHONY: help setup data run run-full test bench clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: .venv/ready  ## make the virtual environment .venv with all dependencies

.venv/ready: requirements.txt requirements-dev.txt setup.sh
	@PYTHON="$(PYTHON)" ./setup.sh

data: .venv/ready  ## fetch the data sets that can be fetched into data/
	@$(PY) -m utils.fetch_data

run: data  ## train F400 on Fashion-MNIST for a few minutes, evaluate it, print its firing rates
	@$(PY) fmnist_mlp.py --epochs $(EPOCHS) --schedule $(MILESTONES) -c $(FOLDER)
	@$(PY) fmnist_mlp.py --resume $(FOLDER)/model_best.pth.tar --evaluate --firing-rate
	@echo "Plots of the training: $(FOLDER)/log.png and $(FOLDER)/log.pdf. All 100 epochs: make run-full"

run-full: data  ## the paper's recipe: F400 on Fashion-MNIST, 100 epochs
	@$(PY) fmnist_mlp.py -c checkpoints/fmnist_f400 --firing-rate

test: data  ## run all tests
	@$(PY) -m pytest -q tests

bench: data  ## time an epoch of F400 against a plain implementation and against the machine's limit
	@$(PY) -m benchmarks.epoch

clean:  ## remove the virtual environment and caches, but no data and no checkpoints
	rm -rf .venv .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
