PYTHON ?= python

.PHONY: test lint types aot demo bench

test:
	$(PYTHON) -m pytest

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
