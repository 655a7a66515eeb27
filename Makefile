# `make help` lists the targets. Everything is set up in .venv, and a second call of a target does only what is left to do.
PYTHON ?= python3
EPOCHS ?= 12
MILESTONES ?= 8 11
FOLDER ?= checkpoints/fmnist_f400_demo
# The folders of the data sets that make data may be unable to fetch, for test-experiments.
CIFAR100 ?= ./data
NMNIST ?= ./data/NMNIST
PY := .venv/bin/python

.DEFAULT_GOAL := help
.PHONY: help setup data fashion-mnist run run-full checkpoints test test-faults test-experiments fuzz bench bench-gpu bench-bptt \
        bench-gradients clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

setup: .venv/ready  ## make the virtual environment .venv with all dependencies

.venv/ready: requirements.txt requirements-dev.txt setup.sh
	@PYTHON="$(PYTHON)" ./setup.sh

data: .venv/ready  ## fetch every data set that can be fetched into data/, and say where to get the others
	@$(PY) -m utils.fetch_data

fashion-mnist: .venv/ready  ## fetch Fashion-MNIST alone
	@$(PY) -m utils.fetch_data --only fashion-mnist

run: fashion-mnist  ## train F400 on Fashion-MNIST for a few minutes, evaluate it, print its firing rates
	@$(PY) fmnist_mlp.py --epochs $(EPOCHS) --schedule $(MILESTONES) -c $(FOLDER)
	@$(PY) fmnist_mlp.py --resume $(FOLDER)/model_best.pth.tar --evaluate --firing-rate -c $(FOLDER)
	@echo "Plots of the training: $(FOLDER)/log.png and $(FOLDER)/log.pdf. All 100 epochs: make run-full"

checkpoints: .venv/ready  ## train a small F400 and F64C5 to try evaluation, rates and export on (a few minutes)
	@$(PY) fmnist_mlp.py --epochs 4 --schedule 3 -c checkpoints/small_f400
	@$(PY) mnist_conv.py --epochs 3 --schedule 2 -t 15 --train-limit 5000 --test-limit 1000 -c checkpoints/small_f64c5

run-full: fashion-mnist  ## the paper's recipe: F400 on Fashion-MNIST, 100 epochs
	@$(PY) fmnist_mlp.py -c checkpoints/fmnist_f400 --firing-rate

test: fashion-mnist .venv/triton  ## run the tests
	@$(PY) -m pytest -q tests

# PyTorch's CUDA builds bring Triton. Beside a CPU build it lies apart, for the test of its kernel in its interpreter alone, as every
# program that finds it loads it.
.venv/triton: .venv/ready
	@mkdir -p $@
	@$(PY) -c 'import triton' 2>/dev/null || [ "$$(uname -sm)" != "Linux x86_64" ] \
	  || $(PY) -m pip install -q --disable-pip-version-check --no-deps --target $@ triton \
	  || echo "Triton could not be installed; the test of its kernel is left out."
	@touch $@

test-faults: .venv/ready  ## kill, interrupt and damage runs, fill their disk, and see that nothing is lost (a quarter of an hour)
	@$(PY) -m tests.faults

test-experiments: data  ## train every experiment on its real data with small limits, within 30 minutes
	@CIFAR100="$(CIFAR100)" NMNIST="$(NMNIST)" $(PY) -m pytest -v -rP tests/experiments

fuzz: .venv/ready  ## give 100,000 bad inputs to the readers of files, checkpoints and command lines, within ten minutes
	@$(PY) -m tests.fuzz

bench: data  ## time the project against a plain implementation and the machine's limit, on the CPU
	@$(PY) -m benchmarks.epoch
	@$(PY) -m benchmarks.steps

bench-gpu: data  ## the same on a GPU
	@$(PY) -m benchmarks.steps --device cuda --turns 10

bench-bptt: data  ## F64C5 here against BPTT in SpikingJelly and snnTorch (pip install -r requirements-bench.txt)
	@$(PY) -m benchmarks.bptt

bench-gradients: data  ## the implicit gradient against back-propagation through time: time, memory and accuracy over T
	@$(PY) -m benchmarks.gradients

clean:  ## remove the virtual environment and caches, but no data and no checkpoints
	rm -rf .venv .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
