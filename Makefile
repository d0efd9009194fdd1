# Every target first sets up what it needs in .venv, and writes nothing outside this folder.
#   make train ARGS=--config.train.num_steps=60   more flags for main.py or pytest
#   make train EXTRAS=gpu                         also installs extras of pyproject.toml
#   make train PYTHON=/path/to/python3.13         another Python to build .venv with

PYTHON ?= python3 python3.14 python3.13 python3.12 /usr/bin/python3
EXTRAS ?=
ARGS ?=

# What `test-oldest` sets: another environment, with other versions than the newest.
VENV := .venv
PINNED :=

pins := requirements.txt requirements-dev.txt pyproject.toml
# Named by content, so that neither a fresh clone nor a change of branch is fooled by file times.
stamp := $(VENV)/pins-$(firstword $(shell cat $(pins) | cksum))$(addprefix -,$(EXTRAS))
python := $(VENV)/bin/python
# Two workers: compilation, most of the work, runs on one thread. A stolen test keeps both busy.
pytest := $(python) -m pytest -n 2 --dist worksteal
# The lower bound of jax, as a pin: jax==0.11.2.
oldest := $(shell sed -n 's/^jax>=\([0-9.]*\).*/jax==\1/p' requirements.txt)

.PHONY: help train test test-all test-oldest lint format venv clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-13s%s\n", $$1, $$2}' Makefile

train: $(stamp)  ## train the tiny model on this Python's standard library, or resume it
	$(python) main.py --config=configs/tiny.py --workdir=runs/tiny $(ARGS)
	$(python) main.py --workdir=runs/tiny --mode=evaluate
	$(python) main.py --workdir=runs/tiny --mode=generate --prompt='"""Return '

test: $(stamp)  ## run the tests that are not marked slow
	$(pytest) -m "not slow" $(ARGS)

test-all: $(stamp)  ## run every test
	$(pytest) $(ARGS)

test-oldest:  ## run the tests of kernels, model and training with the oldest jax allowed
	@$(MAKE) --no-print-directory test VENV=.venv-oldest EXTRAS= PINNED=$(oldest) \
	    ARGS="tests/kernels_pallas tests/model tests/training $(ARGS)"

lint: $(stamp)  ## check style and types
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy

format: $(stamp)  ## format the code and mend what ruff can
	$(python) -m ruff format .
	$(python) -m ruff check --fix .

venv: $(stamp)  ## create .venv, or bring it up to its pins

clean:  ## remove .venv and caches, keep runs
	rm -rf .venv .venv-oldest .cache .hypothesis .ruff_cache build *.egg-info

# The lock makes a second make wait (fd 9 keeps it until this shell and its children are gone); the
# mark makes the next one start afresh where this one is interrupted; the stamp comes last.
mark := .cache/$(VENV)-unfinished

$(stamp):
	@for python in $(PYTHON); do \
	    $$python -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 12))' 2> /dev/null \
	        && break; \
	    python=; \
	done; \
	if [ -z "$$python" ]; then \
	    echo "umv2 needs Python >= 3.12 with its venv module, and none of these is one: $(PYTHON)." \
	        "Install it with 'apt install python3.12-venv', 'brew install python@3.13' or" \
	        "'pyenv install 3.12', or name it: make PYTHON=/path/to/python3" >&2; \
	    exit 1; \
	fi; \
	set -e; \
	mkdir -p .cache; \
	exec 9> .cache/$(VENV).lock; \
	$$python -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'; \
	if [ -e $@ ]; then exit; fi; \
	echo "Installing the pinned packages into $(VENV), once: about a minute"; \
	usable='import pip, sys; sys.exit(sys.version_info < (3, 12))'; \
	if [ -e $(mark) ] || ! $(python) -c "$$usable" 2> /dev/null; then \
	    touch $(mark); \
	    $$python -m venv --clear $(VENV); \
	fi; \
	touch $(mark); \
	rm -f $(VENV)/pins-*; \
	$(python) -m pip install -qq --disable-pip-version-check \
	    -r requirements.txt -r requirements-dev.txt $(PINNED) $(if $(EXTRAS),-e '.[$(EXTRAS)]'); \
	rm $(mark); \
	touch $@
