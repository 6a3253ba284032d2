# Everything a person or CI does here, by name; `make help` lists it. Each target makes .venv first where it must.
#
#     make journal                                                   synthetic patches
#     PCAM_DATA=DIR make journal                                     the official files, or the course's, in DIR
#     make INSTALL="uv pip install --torch-backend=cpu" journal      the small torch, quickly
#     make explore VOILA="--no-browser --port 8866"                  on another machine, reached through a tunnel

PYTHON ?= python3
INSTALL ?= .venv/bin/pip install
WORKERS ?= 2
VOILA ?=

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
BIN := .venv/bin
READY := .venv/.installed

export PYTHONNOUSERSITE := 1  # packages in ~/.local would shadow those of the lock
export PIP_DISABLE_PIP_VERSION_CHECK := 1
unexport PYTHONPATH PYTHONHOME  # cluster modules set them
ifneq ($(filter uv,$(firstword $(INSTALL))),)
export VIRTUAL_ENV := $(CURDIR)/.venv
endif

# pip's hundreds of lines, cut down to what is being fetched; errors go to stderr and are left alone
QUIETLY = while read -r word rest; do case "$$word" in \
	Downloading) echo "    $$rest";; Installing) echo "    unpacking";; esac; done

.PHONY: help journal test lint types unit nbval test-browser chromium test-slurm slurm test-install staged data-check \
	notebooks docs lab explore bench lock clean .venv

help:  ## this list
	@awk -F ':.*## ' '/^[.a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

journal: $(READY)  ## run the notebooks that are stale, write the three journals, their pages, assets/ and the cards
	@$(BIN)/pcam journal make
	@$(BIN)/python docs/cards.py

test: lint types unit nbval  ## lint, types, tests with coverage, notebooks

lint: $(READY)  ## ruff on Python files and notebooks
	@echo "==> lint"
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check

types: $(READY)  ## mypy on pcamlib
	@echo "==> types"
	@$(BIN)/mypy

# One thread a test process: two processes with two threads each would wait for one another on two cores.
unit: $(READY)  ## pytest, with the coverage of pcamlib
	@echo "==> tests"
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/pytest -n $(WORKERS) --cov=pcamlib --cov-report=term --cov-fail-under=85

# As above: 320 s where one notebook after the other, with both cores, took 521.
nbval: $(READY)  ## run the notebooks; compare the cells marked NBVAL_CHECK_OUTPUT, and the data of the figures
	@echo "==> notebooks"
	@rm -rf runs/scratch
	@PCAM_DATA= PCAM_COURSE= OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/pytest -p no:cacheprovider --timeout=600 \
		--nbval-lax -n $(WORKERS) --dist loadfile notebooks
	@PCAM_FIGURES=runs/scratch $(BIN)/pytest -p no:cacheprovider tests/notebooks/test_figure_gate.py

test-browser: $(READY) chromium  ## a real JupyterLab and a Chromium that clicks through notebook 06's explorer
	@echo "==> browser"
	@$(BIN)/pytest -m browser tests/browser

chromium:  ## Chromium from the system's packages, where it is missing and may be installed
	@command -v chromium chromium-browser google-chrome >/dev/null || { \
		[ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && echo "==> installing Chromium" \
			&& apt-get -qq update && apt-get -qq install -y chromium >/dev/null; } || { \
		echo "no Chromium here; install the system's package, on Debian: apt install chromium" >&2; exit 1; }

test-slurm: $(READY) slurm  ## a real Slurm of two nodes on this machine: jobs submitted, killed, requeued, resumed
	@echo "==> slurm"
	@OMP_NUM_THREADS=1 $(BIN)/pytest -m slurm -n $(WORKERS) --dist loadfile tests/slurm

slurm:  ## a local Slurm and Ruby from the system's packages, where they are missing and may be installed
	@for program in slurmctld slurmd munged; do \
		PATH="$$PATH:/usr/sbin:/sbin" command -v $$program >/dev/null || missing="slurm-wlm munge"; done; \
	command -v ruby >/dev/null || missing="$${missing:-} ruby"; \
	as=; [ "$$(id -u)" = 0 ] || as="sudo -n"; \
	[ -z "$${missing:-}" ] || { command -v apt-get >/dev/null && echo "==> installing $$missing" && $$as apt-get -qq update \
			&& $$as env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y $$missing >/dev/null; } || { \
		echo "no Slurm here; install the system's packages, on Debian: apt install slurm-wlm munge ruby" >&2; exit 1; }

test-install: $(READY)  ## an empty machine: the stick installed without a network, each step of the Dockerfile in a chroot
	@echo "==> install"
	@OMP_NUM_THREADS=1 $(BIN)/pytest -m install -n $(WORKERS) --timeout=1800 tests/serving/test_bundle.py tests/test_container.py

staged: $(READY)  ## every registered model: whole, small enough, loads, scores what was recorded
	@$(BIN)/pcam verify

data-check: $(READY)  ## the data notebooks again; their data must be those of data.lock
	@$(BIN)/pcam notebook run 00 && $(BIN)/pcam notebook run 02 && $(BIN)/pcam data lock --check

notebooks: $(READY)  ## run the notebooks in place: new stored outputs, to be committed
	@PCAM_DATA= PCAM_COURSE= $(BIN)/python -c 'from pathlib import Path; from pcamlib.jobs.notebook import run; \
		[run(path, {}, path, timeout=600) for path in sorted(Path("notebooks").glob("*.ipynb"))]'

docs: $(READY)  ## cards, architecture picture and the site, in build/site
	@$(BIN)/python docs/cards.py && $(BIN)/python docs/architecture.py
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

lab: $(READY)  ## JupyterLab on notebooks/
	@$(BIN)/jupyter lab notebooks

explore: $(READY)  ## the error explorer as a page (Voila), on $PCAM_DATA and the newest run
	@$(BIN)/voila notebooks/explorer.py --VoilaConfiguration.extension_language_mapping=.py=python $(VOILA)

bench: $(READY)  ## every benchmark; tables here, rows in benchmarks/results/
	@mkdir -p benchmarks/results; failed=; \
	for script in benchmarks/[a-z]*.py; do \
		name=$$(basename "$$script" .py); echo "==> $$name"; \
		$(BIN)/python "$$script" --json "benchmarks/results/$$name.json" || failed="$$failed $$name"; \
	done; \
	[ -z "$$failed" ] || { echo "failed:$$failed" >&2; exit 1; }

.venv: $(READY)  ## the Python environment: requirements.lock and this package, in .venv/
	@:

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "$(PYTHON) is missing or older than 3.11; install one, on a cluster 'module load' one," \
			"or name it: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
		echo "$(PYTHON) has no venv; on Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "==> making .venv with $$($(PYTHON) --version): the packages of requirements.lock (minutes, once)"
	@$(PYTHON) -m venv .venv
	@PYTHONUNBUFFERED=1 $(INSTALL) -r requirements.lock | { $(QUIETLY); }
	@$(INSTALL) --no-deps --no-build-isolation -e . | { $(QUIETLY); }
	@touch $(READY)
	@echo "==> .venv is ready"

lock:  ## newest versions that pyproject.toml allows -> requirements.lock
	@echo "==> installing the newest versions into build/lock, then writing requirements.lock"
	@rm -rf build && $(PYTHON) -m venv build/lock
	@PYTHONUNBUFFERED=1 build/lock/bin/pip install --upgrade ".[dev,serve,docs]" | { $(QUIETLY); }
	@{ grep '^#' requirements.lock; \
		{ build/lock/bin/pip freeze --all --exclude pip --exclude wheel --exclude pcamlib \
			| grep -Ev '^(nvidia-|cuda-|triton==)' | sed 's/+[^ ]*//'; grep ' ; ' requirements.lock; } \
		| LC_ALL=C sort -f -u -t = -k 1,1; } > requirements.lock.new
	@mv requirements.lock.new requirements.lock && rm -rf build
	@git --no-pager diff --stat requirements.lock

clean:  ## delete .venv and caches; runs, data and the journal stay
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache build dist *.egg-info .coverage*
	find . -name __pycache__ -prune -exec rm -rf {} +
