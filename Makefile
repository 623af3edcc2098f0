# `make` or `make help` lists what there is. Nothing needs to be installed before.
SHELL := /bin/bash
PYTHON_VENV := .venv/bin/python
SHELL_SCRIPTS = $(shell git ls-files '*.sh' .ci/run)

.DEFAULT_GOAL := help
.PHONY: help setup test demo demo-full lint setup-espnet202511 check-hear check-xares \
	check-s3prl check-espnet evidence

help: ## this list
	@echo "espnet2-spear: SPEAR pre-training and its students in ESPnet2"
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-20s %s\n", $$1, $$2}' Makefile

setup: ## virtual environment .venv with everything (1 to 10 minutes, once)
	@tools/setup.sh

# A file's tests stay in one process, which shares what they train.
test: setup ## set up and run the tests on all cores
	@echo "test: running the tests on all cores, which takes tens of minutes on two"
	OMP_NUM_THREADS=1 $(PYTHON_VENV) -m pytest -n logical --maxprocesses 8 --dist loadfile

demo: setup ## set up and run the main job on the embedded data (30 to 60 minutes on 2 cores)
	bash egs2/spear/demo.sh

demo-full: setup ## the same with three times the steps and longer quantizer training (hours)
	bash egs2/spear/demo.sh --full true

evidence: setup ## the paper's claims on small students: tables with spreads (a night)
	bash egs2/spear/eval1/evidence.sh

lint: setup ## ruff, mypy and shellcheck
	$(PYTHON_VENV) -m ruff format --check .
	$(PYTHON_VENV) -m ruff check .
	$(PYTHON_VENV) -m mypy
	.venv/bin/shellcheck --external-sources --source-path=SCRIPTDIR $(SHELL_SCRIPTS)

setup-espnet202511: ## a second environment, .venv-espnet202511, with the older ESPnet
	@tools/setup.sh espnet202511

check-hear: setup-espnet202511 ## HEAR's public validator, in an environment of its own
	@tools/check_hear.sh

check-xares: setup ## XARES' own check, in an environment of its own
	@tools/check_xares.sh

check-s3prl: setup ## s3prl's runner on SUPERB's speaker task, in an environment of its own
	@tools/check_s3prl.sh

check-espnet: setup ## ESPnet's own asr.sh, cls.sh and ssl.sh, from its source package
	@tools/check_espnet.sh
