# make quickstart   train the shipped base on two workers and show what the prompt learned
# make test         every test that needs no GPU
# make check        lint, format, types, import contract
# make endurance    one run through twenty killed workers, and one that takes on a node: several minutes
# make bench        each benchmark in its small setting; numbers go to bench.jsonl. Those over real data and other
#                   bases (bench_quality, bench_peft_quality, bench_mixed) are given both by hand
# make clean        remove the environment, caches and runs
#
# Each creates .venv from constraints.txt where it is missing or older than the pins.

PYTHON ?= python3
BIN := .venv/bin

.DELETE_ON_ERROR:
.PHONY: quickstart test check endurance bench clean

# setuptools first, and no build isolation: deepspeed comes as source and its build looks at the torch that is
# installed. DS_BUILD_OPS=0: none of its C++ extensions is used here, so no compiler is needed.
.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools wheel
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[test]'
	touch $@

quickstart: .venv/.installed
	$(BIN)/python launch/quickstart.py

# One thread a process: two ranks on two cores, and sums in the same order everywhere.
test: export OMP_NUM_THREADS = 1
test: export MKL_NUM_THREADS = 1
test: .venv/.installed
	$(BIN)/python -m pytest tests/unit -n 2
	$(BIN)/python -m pytest tests/ranks
	$(BIN)/python -m pytest tests/ray

check: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict peftscale
	$(BIN)/lint-imports

endurance: .venv/.installed
	$(BIN)/python tests/bench/endurance.py

bench: export OMP_NUM_THREADS = 1
bench: .venv/.installed
	set -e; for bench in $(filter-out %quality.py %mixed.py,$(wildcard tests/bench/bench_*.py)); do echo "== $$bench"; $(BIN)/python $$bench; done

clean:
	rm -rf .venv build dist runs bench.jsonl *.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
