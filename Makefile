PYTHON ?= python

.PHONY: test fast lint types aot demo bench

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

demo:
	dpo-fast demo

bench:
	$(PYTHON) benchmarks/bench_head_cpu.py
