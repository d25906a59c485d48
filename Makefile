PYTHON ?= python

.PHONY: test fast lint types aot attack demo bench

test:
	$(PYTHON) -m pytest

# Under a minute on two cores.
fast:
	$(PYTHON) -m pytest -n 2 --benchmark-disable -m 'not slow'

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types:
	$(PYTHON) -m mypy

aot:
	$(PYTHON) benchmarks/aot.py

# Kills, flipped bits and the like at random; docs/reliability.md says what must hold: make attack SEED=1 MINUTES=20
SEED ?= 1
MINUTES ?= 1
attack:
	$(PYTHON) tests/attack/runner.py --seed $(SEED) --minutes $(MINUTES)

demo:
	dpo-fast demo

bench:
	$(PYTHON) benchmarks/bench_head_cpu.py
