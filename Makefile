# make run: set up everything and run the main job.  make test: set up everything and test it.
# Any of these does; the pins were made with the first.
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13,$(shell command -v $(name))) python3)
PARAMS ?= params.yaml
BIN := .venv/bin
# The tests write and sync many small files, which is faster in memory, where there is room.
IN_MEMORY := $(shell [ "$$(df --output=avail /dev/shm 2>/dev/null | tail -1)" -gt 8000000 ] 2>/dev/null \
	&& ! findmnt -no OPTIONS /dev/shm | grep -q noexec && echo /dev/shm)
# Stages are processes of their own: they start sooner from modules that were compiled once, at their first use.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help run test coverage check bench setup digits
help:
	@echo "make run [PARAMS=FILE]   the whole job: data in, decision out"
	@echo "make test                every test"
	@echo "make coverage            every test, and which lines no test runs"
	@echo "make check               ruff, mypy, documents in step with the code"
	@echo "make bench               the last run's model beside its peers; budgets, ablation, scaling, bits; LeNets; hours"
	@echo "make digits              the data of data/recipes/mlp-digits.yaml"

run: setup
	$(BIN)/weighin run --params $(PARAMS)

# One file of tests per core at a time; with one thread each, so that they do not wait for one another, and with memory
# that is kept, as stages have it (flows/stage.py).
test: setup .venv/softhsm
	$(if $(IN_MEMORY),TMPDIR=$(IN_MEMORY)) OMP_NUM_THREADS=1 MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=1073741824 \
	$(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# What the tests' own processes run of the code; the stages that they start as processes are not counted.
coverage: setup .venv/softhsm
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder \
	--cov=flows --cov=tasks --cov-branch --cov-report=term:skip-covered

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest --quiet --durations=0 tests/test_docs.py tests/test_dvc_yaml.py

# One that misses its target does not keep the others from running.
bench: digits
	status=0; for name in peers budgets classic_methods deep_compression scaling ablation bits busy; do \
	$(BIN)/python tests/bench/$$name.py || status=1; done; exit $$status

setup: .venv/.ready

# uv takes a fifth of pip's time. It is told the indexes that pip knows; where that is not enough, pip goes on.
.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	known() { $(BIN)/python -m pip config get global.$$1 2>/dev/null; }; \
	$(BIN)/python -m pip install --quiet --constraint constraints.txt uv && \
	UV_DEFAULT_INDEX="$${PIP_INDEX_URL:-$$(known index-url)}" UV_INDEX="$${PIP_EXTRA_INDEX_URL:-$$(known extra-index-url)}" \
	UV_INDEX_STRATEGY=unsafe-best-match \
	$(BIN)/uv pip install --python $(BIN)/python --constraint constraints.txt --editable '.[dev,digits]' || \
	$(BIN)/python -m pip install --no-compile --progress-bar off --constraint constraints.txt --editable '.[dev,digits]'
	touch $@

# A software token for the one test that needs PKCS#11; without Debian's packages that test says that it is skipped.
.venv/softhsm: .venv/.ready
	cd .venv && apt-get download --quiet softhsm2 libsofthsm2 && \
	for package in *softhsm2_*.deb; do dpkg-deb --extract $$package softhsm; done || \
	echo "softhsm2 cannot be had here: the test of PKCS#11 is skipped"

digits: setup
	$(BIN)/python data/recipes/mnist_5k.py
