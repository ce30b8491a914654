SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help reproduce compare test test-all test-lmms-eval test-export lint ui micro micro-dinov2 micro-probe micro-selectors

# DVC runs stages as `python -m atr.stages.x`, which must be the python of .venv.
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export MLFLOW_DISABLE_TELEMETRY := true

# The stamp's name has a checksum of the requirements and of this folder's path: if either changes, .venv is made anew.
CHECKSUM := $(shell { echo '$(CURDIR)'; cat pyproject.toml constraints.txt; } | cksum | cut -d ' ' -f 1)
STAMP := .venv/.installed-$(CHECKSUM)

# The base interpreter of the first python that is new enough; never that of .venv, which is cleared below.
PYTHON ?= $(shell for python in python3.11 python3 python3.12 python3.13 python3.14; do \
	$$python -c 'import sys; print(sys._base_executable) if sys.version_info >= (3, 11) else sys.exit(1)' \
	2>/dev/null && break; done)

help:
	@echo 'make reproduce   the whole pipeline, up to experiments/report/report.html'
	@echo 'make compare     the same with every peer of the selector, as an experiment of DVC'
	@echo 'make test        the tests'
	@echo 'make test-all    the same, with every model family, layout and precision'
	@echo 'make test-lmms-eval   those of the model for lmms-eval, with lmms-eval in an environment of its own'
	@echo 'make test-export   those of the exported graphs, with their engines in an environment of its own'
	@echo 'make lint        ruff and mypy'
	@echo 'make ui          the MLflow page of all executions, http://127.0.0.1:5000'
	@echo 'make micro       trains data/micro/llava again, from nothing; make micro-dinov2 the second model'
	@echo 'make micro-selectors   ships the selectors of make reproduce in data/micro/selectors'

# Independent stages run two at a time, each on half of the cores: models as small as these use one core better than
# two. On a GPU they would share its memory, so there they run one after another, as `dvc repro` alone runs them.
CORES := $(shell getconf _NPROCESSORS_ONLN)
JOBS ?= $(if $(shell command -v nvidia-smi),1,2)
reproduce: $(STAMP)
	export OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$$(( ($(CORES) + $(JOBS) - 1) / $(JOBS) ))} ATR_PIPELINE=$$(date +%s); \
	$(MAKE) --no-print-directory --jobs=$(JOBS) reproduce-report

# -s runs the named stages alone: DVC locks the outputs of all that it checks, also where nothing changed. Times are
# measured in the end, with nothing beside them.
REPRO := dvc --wait-for-lock repro
.PHONY: reproduce-features reproduce-selector reproduce-distilled reproduce-answers reproduce-stability reproduce-report
reproduce-features:
	$(REPRO) extract
reproduce-selector: reproduce-features
	$(REPRO) -s pretrain reconstructor
reproduce-distilled: reproduce-features
	$(REPRO) -s distill
reproduce-answers: reproduce-selector reproduce-distilled
	$(REPRO) -s evaluate evaluate-selector
reproduce-stability: reproduce-selector reproduce-distilled
	$(REPRO) -s evaluate-distilled intrinsic intrinsic-selector intrinsic-distilled \
		robustness robustness-selector robustness-distilled
reproduce-report: reproduce-answers reproduce-stability
	$(REPRO)

# All reducers in atr.core.catalog that can serve the model, so that a new peer needs no change here. They are assigned
# to variables because the shell stops if an assignment fails, but not if a substitution within a command does.
NAMES = $$(python -c 'from atr import config; from atr.core import catalog; \
	print(*config.serving(catalog.$(1), config.load_or_exit("evaluate").vlm), sep=",")')
compare: $(STAMP)
	reducers=$(call NAMES,untrained()); selectors=$(call NAMES,trained("pretrain")); distilled=$(call NAMES,trained("distill")); \
	dvc exp run -S "evaluate.reducers=[$$reducers]" -S "evaluate.selectors=[$$selectors]" \
		-S "evaluate.distilled=[$$distilled]"

# One thread per process, because there is one process per core. Files in their own order: by default those of many
# tests come first, and the longest, which have few, would keep one process busy at the end.
test: $(STAMP)
	OMP_NUM_THREADS=1 python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder -m 'not exhaustive'

# With every family, layout and precision of the checks of which `make test` runs a part.
test-all: $(STAMP)
	OMP_NUM_THREADS=1 python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

# lmms-eval needs an environment of its own; the tests compare its command and its scores with ours. Its model llava_hf,
# which benchmarks/throughput.py times, imports decord.
test-lmms-eval: $(STAMP)
	'$(PYTHON)' -m venv --clear .venv-lmms-eval
	.venv-lmms-eval/bin/pip install --quiet '.[lmms-eval]' decord
	ATR_LMMS_EVAL=$(CURDIR)/.venv-lmms-eval/bin/lmms-eval python -m pytest tests/integrations/lmms_eval

# Engines that the tests skip where they are not installed.
test-export: $(STAMP)
	'$(PYTHON)' -m venv --clear .venv-export
	.venv-export/bin/pip install --quiet --constraint constraints.txt '.[dev,export]'
	OMP_NUM_THREADS=1 .venv-export/bin/python -m pytest tests/vlm/test_export.py tests/cli/test_export.py

lint: $(STAMP)
	ruff check
	ruff format --check
	mypy

# First creates the log, or repairs it after the project was moved, under the lock that stages use as well, and sends
# what is saved for it.
ui: $(STAMP)
	-env -u MLFLOW_TRACKING_URI python -m atr.core.tracking
	mlflow server --host 127.0.0.1 --port 5000 --backend-store-uri sqlite:///$(CURDIR)/experiments/mlflow.db

# The micro models are not DVC stages: their intermediate outputs are missing from every clone, so that DVC would
# complain at every command, and every change of code would cost hours of training. An interrupted training resumes
# after its last epoch.
TRAINING := data/micro/training
micro: $(STAMP)
	python -m atr.micro.stages.train
	rm -rf data/micro/llava && cp -r $(TRAINING)/llava data/micro/llava

micro-dinov2: $(STAMP) $(TRAINING)/features/manifest.json
	python -m atr.micro.stages.train_dinov2
	rm -rf data/micro/llava-dinov2 && cp -r $(TRAINING)/llava-dinov2 data/micro/llava-dinov2

# The training refuses features of other parameters: remove them, and they are made again.
$(TRAINING)/features/manifest.json: | $(STAMP)
	python -m atr.micro.stages.features

# Measures which layer of the preset dinov2-small (atr/config/presets) is best read; writes data/micro/probe.json.
micro-probe: $(STAMP)
	python -m atr.micro.stages.probe

# Ships the selectors of `make reproduce` beside the micro model: rounded to bfloat16, scored, with their cards.
micro-selectors: $(STAMP)
	python -m atr.micro.stages.selectors

# --compile writes .pyc files: without them imports take twice as long where PYTHONDONTWRITEBYTECODE is set.
$(STAMP):
	@[ -n '$(PYTHON)' ] || { echo 'Python 3.11 or newer is needed, and none was found on PATH' >&2; exit 1; }
	'$(PYTHON)' -m venv --clear .venv
	.venv/bin/pip install --quiet --compile --constraint constraints.txt --editable '.[dev]'
	.venv/bin/pip check
	touch $@
