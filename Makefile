# One target a line in `make help`. Everything runs with .venv; targets that need no run make it if it is missing.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PY := .venv/bin/python
NODES ?= 2
N ?= 40
SEED ?=
CLUSTER ?= local
RUN ?=
DIR ?=
ARGS ?=

.PHONY: help setup setup-dev demo test lint train merge infer report status constraints \
        retry cancel there bundle test-faults soak bench slurm-up slurm-down serve chat

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' Makefile

setup: ## make .venv with LLaMA-Factory and torch (about 6 GB)
	@.ci/setup train

setup-dev:
	@.ci/setup train,dev

# a run is there only where .venv is: who asks for one by mistake, in a fresh clone, waits for no installation
there:
	@[ "$(PY)" != .venv/bin/python ] || { ls .venv/.installed-* >/dev/null 2>&1 && [ ! -e .venv-unfinished ]; } || \
	    { echo "no .venv yet: make setup" >&2; exit 2; }

demo: setup ## the whole pipeline here: a tiny model, two nodes as processes, to a report
	@"$(PY)" -m pkuslurm.launch nodes=2 $(ARGS)

test: setup-dev ## all tests, in two processes (ARGS="-k name" for some, in one)
	@if [ "$$(id -u)" = 0 ] && [ -e /etc/debian_version ]; then .ci/slurm packages; else \
	    echo "tests/cluster is skipped: a Slurm cluster of its own needs root on Debian or Ubuntu" >&2; \
	    export PKUSLURM_WITHOUT_SLURM=1; fi; \
	"$(PY)" -m pytest -n auto $(ARGS)

lint: setup-dev ## ruff, mypy --strict, the layers, shellcheck
	@"$(PY)" -m ruff check . .ci/bundle && "$(PY)" -m ruff format --check . .ci/bundle && "$(PY)" -m mypy && .venv/bin/lint-imports --no-cache && \
	    .venv/bin/shellcheck sbatch/*.sbatch .ci/run .ci/setup .ci/setup-0.9.4 .ci/slurm

train: setup ## one run (NODES=2 CLUSTER=local ARGS="train.learning_rate=5e-5")
	@"$(PY)" -m pkuslurm.launch cluster=$(CLUSTER) nodes=$(NODES) $(ARGS)

merge: there ## merge a run's adapter again (RUN=id, default the newest; ARGS=--force: also a complete one)
	@"$(PY)" -m pkuslurm merge $(if $(RUN),"$(RUN)") $(ARGS)

infer: there ## ask a run's questions again (RUN=id; ARGS=--force: also where all are answered)
	@"$(PY)" -m pkuslurm infer $(if $(RUN),"$(RUN)") $(ARGS)

serve: there ## let a run's models answer, base and tuned, in a page and an OpenAI endpoint (RUN=id)
	@"$(PY)" -m pkuslurm serve $(if $(RUN),"$(RUN)") $(ARGS)

chat: there ## talk to them on the terminal (RUN=id)
	@"$(PY)" -m pkuslurm chat $(if $(RUN),"$(RUN)") $(ARGS)

report: there ## write a run's report.html anew (RUN=id)
	@"$(PY)" -m pkuslurm report $(if $(RUN),"$(RUN)") $(ARGS)

status: there ## how a run stands (RUN=id)
	@"$(PY)" -m pkuslurm status $(if $(RUN),"$(RUN)") $(ARGS)

retry: there ## once more what is not complete of a run (RUN=id)
	@"$(PY)" -m pkuslurm retry $(if $(RUN),"$(RUN)") $(ARGS)

cancel: there ## end a run (RUN=id)
	@"$(PY)" -m pkuslurm cancel $(if $(RUN),"$(RUN)") $(ARGS)

bundle: ## one folder for PYTHONPATH (DIR=/path), for an image or a pod without an index (docs/images.md)
	@[ -x "$(PY)" ] || .ci/setup base
	@"$(PY)" .ci/bundle "$(DIR)"

constraints: ## pin the newest versions that fit (needs uv)
	uv pip compile -q pyproject.toml --upgrade --python-version 3.11 --universal --no-annotate --no-header -o .constraints/base.txt
	uv pip compile -q pyproject.toml --upgrade --extra train --extra dev --python-version 3.11 --universal --no-annotate --no-header -o .constraints/train.txt
	uv pip compile -q pyproject.toml --upgrade --extra ascend --python-version 3.11 --python-platform aarch64-manylinux_2_28 --no-annotate --no-header -o .constraints/ascend.txt

BENCHES := startup launch runs prefork training merge asking sweep
bench: setup-dev ## everything measured, into docs/benchmarks.md (half an hour; BENCHES="launch runs" for some)
	@for name in $(BENCHES); do "$(PY)" tests/bench/$$name.py || exit; done

slurm-up: ## a real Slurm cluster on this Debian machine, as root (tests/cluster/README.md)
	@.ci/slurm up $(ARGS)

slurm-down: ## remove exactly what slurm-up made
	@.ci/slurm down

test-faults: setup-dev ## every fault, most on a real Slurm, into docs/reliability.md (as root, Debian; an hour; ARGS="-k row")
	@.ci/slurm packages && "$(PY)" -m pytest -m "faults or row" --record $(ARGS)

soak: setup-dev ## N pipelines under random faults, from a SEED that is printed (as root, Debian; twenty minutes)
	@.ci/slurm packages && "$(PY)" -m tests.faults.soak -n $(N) $(if $(SEED),--seed $(SEED)) $(ARGS)
