# make demo     set up, then watch a real language model learn a real task
# make test     set up, then run the short suite: laws, units, golden files, readers, docs    make test-all   every test
# make check    lint, formatting, types, architecture, the documentation    make mutants   break one law at a time: the short suite notices
# make fuzz     broken and hostile input for SECONDS=60, from a new SEED    make kills    kill saves, merges, runs N=60 times
# make docs     build the documentation as a site, strictly, into build/site
# make tutorial run docs/tutorial.md from top to bottom and draw its pictures
# make examples run the examples, some twenty minutes; hours with ARGS=sweep_study    make examples-data   fetch only their data
# make bench    run the benchmarks; tables on the screen, JSON and pictures in benchmarks/results
# make bench-quick   the training step only, fewer turns    make bench-check   exit 1 where a bar is missed
# make readers  run llama.cpp and mlx-lm on what is exported for them, and write the table of docs/exporting.md
# make readers-vllm   the same with vLLM for the CPU, which takes about 3 GB
# make setup    only set up        make clean   remove what all of this made
#
# Another interpreter: make PYTHON=python3.12 …    Arguments for pytest: make test ARGS="-k merge"

PYTHON ?= python3
VENV := .venv/bin
ARGS ?=
# Two workers, a file each: the suite is written for two cores, each worker computing with one thread.
# tests/conftest.py says with which files they begin. Without bytecode every process would compile all sources.
WORKERS ?= 2
PYTEST = env -u PYTHONDONTWRITEBYTECODE $(VENV)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
# The variable silences the theme's notice about MkDocs 2.
SITE = @NO_MKDOCS_2_WARNING=1 $(VENV)/python -m mkdocs build --strict --quiet
SHORT := tests/architecture tests/unit tests/laws tests/golden tests/readers tests/docs

.PHONY: help setup setup-test demo tutorial examples examples-data test test-all fuzz kills mutants other-trainers readers readers-vllm check docs format bench bench-quick bench-check lock clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -14

setup:
	@$(PYTHON) tools/setup.py base

setup-test:
	@$(PYTHON) tools/setup.py test

demo: setup
	@$(VENV)/python tools/smollm2.py
	@$(VENV)/python -W ignore examples/demo.py $(ARGS)

tutorial: setup
	@$(VENV)/python tools/smollm2.py
	@$(VENV)/python tools/tutorial.py $(ARGS)

examples-data: setup-test
	@$(VENV)/python tools/examples_data.py
	@$(VENV)/python tools/smollm2.py

examples: examples-data
	@$(VENV)/python -W ignore tools/examples.py $(ARGS)

test: setup-test
	@$(PYTEST) -m "not slow" $(if $(findstring tests/,$(ARGS)),,$(SHORT)) $(ARGS)

# Everything: other libraries live, whole runs of the command line, examples; and that every refusal was raised.
test-all: examples-data
	@VENEER_NOPEFT_PYTHON="$$($(VENV)/python tools/make_nopeft_env.py)" $(PYTEST) $(ARGS)

# A case that fails is printed with its seed and number, and its files stay in build/fuzz.
fuzz: setup-test
	@$(VENV)/python -W ignore -m tests.fuzz --seconds $(or $(SECONDS),60) $(if $(SEED),--seed $(SEED)) $(ARGS)

kills: setup-test
	@$(VENV)/python -W ignore -m tests.e2e.kills $(or $(N),60) $(if $(SEED),--seed $(SEED)) $(ARGS)

mutants: setup-test
	@$(VENV)/python tools/mutants.py $(ARGS)

# axolotl, ms-swift and lm-evaluation-harness, from the package index.
other-trainers: setup-test
	@$(VENV)/python tools/other_trainers.py

# llama.cpp and mlx-lm, from the package index, each apart from the environment of the tests.
readers: setup-test
	@$(VENV)/python tools/smollm2.py
	@$(VENV)/python -W ignore tools/readers.py

readers-vllm: setup-test
	@$(VENV)/python tools/smollm2.py
	@$(VENV)/python -W ignore tools/readers.py vllm

check: setup-test
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .
	$(VENV)/mypy --strict src
	$(VENV)/python -m pytest -q tests/architecture
	$(SITE)

docs: setup-test
	$(SITE)
	@echo "The site: build/site/index.html"

format: setup-test
	$(VENV)/ruff check --fix .
	$(VENV)/ruff format .

bench: setup-test
	@$(VENV)/python -W ignore -m benchmarks $(ARGS)

bench-quick: setup-test
	@$(VENV)/python -W ignore -m benchmarks --quick training_step $(ARGS)

bench-check: setup-test
	@$(VENV)/python -W ignore -m benchmarks --check $(ARGS)

lock: setup-test
	$(VENV)/python tools/lock.py

clean:
	rm -rf .venv .venv-nopeft .cache build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
