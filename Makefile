# `make` lists the targets. Those for users and `check` need nothing but python3 >= 3.11, make and a package index: they
# make .venv themselves (with uv where it is on PATH, else venv and pip) and renew it when requirements.lock changes.

VENV ?= .venv
PYTHON = $(VENV)/bin/python
# Runs on the compiled build if there is one of these very sources; COMPILED=1 builds it first, COMPILED=0 runs src/.
COMPILED ?=
RUN = COMPILED=$(COMPILED) tools/run $(PYTHON)
VERSIONS ?= 3.11 3.12 3.13
PYTEST_ARGS ?=
WORKERS ?= 6
PROFILE ?= test
PYTEST = $(RUN) -m pytest -n $(WORKERS) --dist loadfile --hypothesis-profile=$(PROFILE) $(PYTEST_ARGS)
# Tests of what has no I/O: the rooms that decide, the values, and the guards that read source only.
UNIT = tests/wire tests/payload tests/routing tests/discovery/test_table.py tests/discovery/test_record.py \
  tests/events/test_event.py tests/transport/test_address.py \
  $(addprefix tests/guards/test_,imports.py circles.py file_sizes.py exports.py words.py)
# Tests of the rooms that `make compiled` compiles.
COMPILED_ROOMS = $(addprefix tests/,wire payload transport routing calling runtime compat llm/http llm/test_openai_api.py llm/test_front.py \
  llm/test_serve.py llm/test_text.py)
FUZZ_SECONDS ?= 60
CHAOS_SECONDS ?= 60
CHAOS_SEED ?= 1
CHAOS_SEEDS ?= 1000
CHAOS_RUN = $(RUN) -m harness.runs.chaos --seed $(CHAOS_SEED) --seconds $(CHAOS_SECONDS)
INSTALLED_BY = pyproject.toml setup.py requirements.lock tools/install tools/requirements.py tools/pip tools/find-python tools/get-etcd
BUSY_RUNS ?= 3
export TRD_BASE_PYTHON
# Without cached bytecode, each of the tests' thousand processes compiles what it imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help compiled wheel test-compiled demo demo-llm demo-cluster unit test test-all test-newest test-oldest test-busy test-node test-transformers versions lock _test-with check format docs bench bench-peers instructions chaos crowd fuzz soak survival models hostile scaling clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.core ## hello world: two server processes and a client; prints which instance answered what
	$(RUN) examples/hello_world/demo.py

demo-llm: $(VENV)/.llm ## two workers serve a real model, one is killed in the middle of an answer, and the text is the same
	$(RUN) examples/served_model/demo.py

demo-cluster: $(VENV)/.cluster ## hello world over a real etcd and a real NATS server, started and ended by it
	$(RUN) examples/hello_world/demo_cluster.py

unit: $(VENV)/.dev ## the tests of what has no I/O, in one process and some seconds; needs no server and no model
	$(RUN) -m pytest -q --hypothesis-profile=unit $(UNIT) $(PYTEST_ARGS)

test: $(VENV)/.test ## the whole test suite (PYTEST_ARGS="-k name -x" narrows it, WORKERS=0 runs it in one process)
	$(PYTEST)

test-compiled: ## the tests of the compiled rooms, on a compiled build that is made from these very sources
	$(MAKE) --no-print-directory test COMPILED=1 PYTEST_ARGS="$(COMPILED_ROOMS) $(PYTEST_ARGS)"

test-all: ## the whole test suite on every supported Python (VERSIONS="3.11 3.12 3.13")
	@missing=; failed=; passed=; \
	for version in $(VERSIONS); do \
	  if tools/find-python $$version >/dev/null; then \
	    echo "== Python $$version"; \
	    if TRD_PYTHON_VERSION=$$version $(MAKE) --no-print-directory test VENV=.venv-$$version; \
	    then passed="$$passed $$version"; else failed="$$failed $$version"; fi; \
	  else missing="$$missing $$version"; fi; \
	done; \
	echo "== passed:$${passed:- none}; failed:$${failed:- none}; NOT TESTED, no interpreter found:$${missing:- none}"; \
	test -z "$$failed$$missing"

test-newest: ## the whole test suite with the newest version of each package, whatever requirements.lock says
	@$(MAKE) --no-print-directory _test-with WITH=newest VENV=$(VENV)-newest

test-oldest: ## the whole test suite with the oldest versions that pyproject.toml promises to work with
	@$(MAKE) --no-print-directory _test-with WITH=oldest VENV=$(VENV)-oldest

_test-with:
	tools/install $(VENV) dev,examples,servers,types $(WITH)
	tools/get-etcd $(VENV)
	@echo "== the $(WITH) versions:"
	@tools/versions $(VENV)
	$(PYTEST)

test-transformers: $(VENV)-transformers/.installed ## the tests of the engine transformers, with torch (500 MB or more) in an environment of its own
	COMPILED=0 tools/run $(VENV)-transformers/bin/python -m pytest tests/llm/test_transformers.py $(PYTEST_ARGS)

test-busy: $(VENV)/.test ## the whole test suite beside four busy processes, BUSY_RUNS (3) times in a row
	@tools/versions $(VENV)
	$(PYTHON) tools/busy.py $(BUSY_RUNS) $(PYTEST)

test-node: $(VENV)/.test ## the client of npm against a front end: needs node and npm; installs the package `openai` with npm
	cd tests/llm/node && npm ci --ignore-scripts --no-audit --no-fund
	$(RUN) -m pytest -v tests/llm/test_node_client.py

versions: $(VENV)/.test ## print the versions that `make test` runs with
	@tools/versions $(VENV)

compiled: $(VENV)/.dev ## compile the hot path with mypyc into build/compiled/; it needs a C compiler. The other targets then run it
	@tree=$$($(PYTHON) tools/compiled.py build) && echo "built: the targets of this Makefile run it now. For programs of your own:" && \
	  echo "  make wheel COMPILED=1, and pip install the file that it names; or PYTHONPATH=$$tree"

# mypyc comes with mypy, which is not in the core.
wheel: $(VENV)/$(if $(filter 1,$(COMPILED)),.dev,.core) ## the pure wheel, in dist/; with COMPILED=1 the compiled one for this Python
	rm -rf build/lib* build/bdist*
	TRD_COMPILE=$(COMPILED) $(PYTHON) -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@ls -t dist/*.whl | head -n 1

lock: ## choose the versions of requirements.lock anew: the newest that pyproject.toml admits
	tools/lock

check: $(VENV)/.dev ## lint, layout and types: ruff, mypy (strict)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

format: $(VENV)/.dev ## lay the code out and repair what ruff can
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

docs: $(VENV)/.docs ## the documentation as a site, in site/: open site/index.html, no server is needed
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict

bench-peers: $(VENV)/.bench ## benchmarks beside Dynamo, Ray, NATS and HTTP, which it installs in .venv-peers (BENCH_ARGS="--quick")
	$(PYTHON) -m benchmarks.foreign $(BENCH_ARGS)

bench: $(VENV)/.bench ## benchmarks against the yardstick and grpc.aio, as tables, JSON and pictures (BENCH_ARGS="--quick")
	$(RUN) -m benchmarks $(BENCH_ARGS)

instructions: $(VENV)/.bench ## instructions of a call and an item, by valgrind; status 1 where they grew by over 5 % (INSTRUCTIONS_ARGS=--where)
	$(PYTHON) -m benchmarks.instructions $(INSTRUCTIONS_ARGS)

chaos: $(VENV)/.test ## faults on a schedule, every request judged: CHAOS_SEEDS (1000) simulated, CHAOS_SECONDS (60) on each of four networks
	$(RUN) -m harness.runs.simulated --seeds $(CHAOS_SEEDS)
	$(CHAOS_RUN) --direct
	$(CHAOS_RUN) --network tls
	$(CHAOS_RUN) --network tcp --discovery etcd
	$(CHAOS_RUN) --plane nats

fuzz: $(VENV)/.fuzz ## fuzz what reads bytes from the network, for FUZZ_SECONDS (60) in all
	$(PYTHON) -m tests.fuzz --seconds $(FUZZ_SECONDS)

crowd: $(VENV)/.bench ## 20,000 calls at once, 10,000 idle streams; prints what they cost
	$(RUN) -m benchmarks.crowd

soak: $(VENV)/.bench ## 10 minutes of mixed load, faults and restarts, which must leave nothing (SOAK_ARGS="--minutes 1")
	$(RUN) -m harness.runs.soak $(SOAK_ARGS)

survival: $(VENV)/.bench ## kills, restarts and floods real workers; status 1 where a promise breaks (SURVIVAL_ARGS="--only kill")
	$(RUN) -m harness.runs.survival $(SURVIVAL_ARGS)

models: $(VENV)/.bench ## served models: clients leave, workers are killed, models come and go (MODELS_ARGS="kills --rounds 3")
	$(RUN) -m harness.runs.models $(MODELS_ARGS)

hostile: $(VENV)/.bench ## peers that mean harm against a worker and a client; ends with status 1 when a bound is broken
	$(RUN) -m harness.runs.hostile $(HOSTILE_ARGS)

scaling: $(VENV)/.cluster ## 10,000 simulated workers in a real etcd; writes docs/scaling.md (SCALING_ARGS="--instances 1000")
	$(RUN) -m benchmarks.scaling $(SCALING_ARGS)

clean: ## remove what the other targets made
	rm -rf .venv .venv-* .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage .coverage.* htmlcov build dist site
	rm -rf src/*.egg-info tests/llm/node/node_modules
	find src tests examples harness benchmarks tools -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# One stamp a set of extras; each is newer than what decides its content.
$(VENV)/.core: $(INSTALLED_BY)
	tools/install $(VENV)
	@touch $@

$(VENV)/.llm: $(INSTALLED_BY)
	tools/install $(VENV) dev,examples
	@touch $@ $(VENV)/.core $(VENV)/.dev

$(VENV)/.cluster: $(INSTALLED_BY)
	tools/install $(VENV) cluster,servers
	tools/get-etcd $(VENV)
	@touch $@ $(VENV)/.core

$(VENV)/.dev: $(INSTALLED_BY)
	tools/install $(VENV) dev
	@touch $@ $(VENV)/.core

$(VENV)/.test: $(INSTALLED_BY)
	tools/install $(VENV) dev,examples,servers,types
	tools/get-etcd $(VENV)
	@touch $@ $(VENV)/.core $(VENV)/.dev

# torch's wheels differ between indexes (2.13.0, 2.13.0+cpu), and so do their hashes: the versions alone are pinned.
$(VENV)-transformers/.installed: $(INSTALLED_BY) tests/llm/transformers.lock
	tools/install $(VENV)-transformers dev
	tools/pip $(VENV)-transformers --constraint tests/llm/transformers.lock torch transformers
	@touch $@

$(VENV)/.docs: $(INSTALLED_BY)
	tools/install $(VENV) dev,docs
	@touch $@ $(VENV)/.core $(VENV)/.dev

$(VENV)/.bench: $(INSTALLED_BY)
	tools/install $(VENV) dev,bench,numpy,servers
	tools/get-etcd $(VENV)
	@touch $@ $(VENV)/.core

$(VENV)/.fuzz: $(INSTALLED_BY)
	tools/install $(VENV) dev,fuzz
	@touch $@ $(VENV)/.core $(VENV)/.dev
