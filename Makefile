# Every target makes .venv from requirements.lock when it is missing or the lock has changed.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

.PHONY: help enlarge demo demo-gan test test-deepspeed test-slurm lint types bench gpu gpu-data torture clean install

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*##  *\(.*\)/make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-22s %s\n", $$1, $$2 }'

enlarge: $(INSTALLED)  ## four times as large: make enlarge PICTURES="photo.jpg folder" [OUT=enlarged]
	@if [ -e "$$PICTURES" ]; then set -- "$$PICTURES"; else set -- $$PICTURES; fi; \
	if [ $$# = 0 ]; then echo 'name what to enlarge: make enlarge PICTURES=photo.jpg'; exit 2; fi; \
	$(RUN) -m hpcdistill.infer "$$@" --out "$${OUT:-enlarged}"

demo: $(INSTALLED)  ## a picture in a few minutes: pack, train, distil, evaluate, report
	$(RUN) -m hpcdistill.demo

demo-gan: $(INSTALLED)  ## another one: a GAN's teacher and student turn edges into photographs, side by side
	$(RUN) -m hpcdistill.demo_gan

test: $(INSTALLED)  ## all tests this machine can run, but for torture
	$(RUN) -m pytest

test-deepspeed: $(INSTALLED)  ## DeepSpeed, with what takes too long for every change: FESD on four ranks, more resuming
	$(RUN) -m pytest -n 0 -m "torture or not torture" tests/training/test_deepspeed.py

test-slurm: $(INSTALLED)  ## the tests on a real SLURM, from Debian's packages (installed when missing, as root)
	-tests/slurm/install.sh
	$(RUN) -m pytest -n 0 -m slurm

lint: $(INSTALLED)  ## ruff: style and format
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: $(INSTALLED)  ## mypy
	$(RUN) -m mypy

bench: $(INSTALLED)  ## throughput and memory on this machine, as tables and JSON
	$(RUN) bench/loader.py
	$(RUN) bench/step.py
	$(RUN) bench/gan.py
	$(RUN) bench/limits.py
	$(RUN) bench/packing.py
	$(RUN) bench/distributed.py
	$(RUN) bench/sweep.py
	$(RUN) bench/house.py
	$(RUN) bench/deploy.py

gpu: $(INSTALLED)  ## on one GPU, ten minutes: its tests, all steps, a short training of each method, one page
	$(RUN) bench/gpu.py $(GPU)

gpu-data: $(INSTALLED)  ## the packed sets for it, 40 MB at most: make gpu-data GPU_DATA="--sr DIR --a DIR --b DIR"
	$(RUN) bench/gpu_data.py $(GPU_DATA)

torture: $(INSTALLED)  ## the tests that take too long for every change, and fifty random kills of random ranks
	$(RUN) -m pytest -m torture
	$(RUN) tests/training/torture.py --kills 50 --json docs/results/torture.json

install: $(INSTALLED)  ## .venv from requirements.lock, and the package in it

$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "hpcdistill needs Python 3.11 or newer; name one: make PYTHON=python3.12"; exit 1; }
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

clean:  ## remove the environment and caches; data/ and runs/ stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
