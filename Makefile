# make install | demo | test | lint | docs | gpu. PYTHON is the interpreter that makes the virtual environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
# Threads that spin while they wait slow a shared machine several times over.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: install demo test lint docs gpu

install: $(VENV)/.installed

# The CPU wheel of torch comes first: with it in place nothing asks for a CUDA build. On a GPU machine: make install GPU=1.
$(VENV)/.installed: pyproject.toml constraints-cpu.txt
	$(PYTHON) -m venv $(VENV)
ifdef GPU
	$(BIN)/pip install -e '.[dev,fast,gpu]'
else
	$(BIN)/pip install -q 'torch==2.13.0+cpu' || $(BIN)/pip install torch==2.13.0 --index-url $(TORCH_INDEX)
	$(BIN)/pip install -q -c constraints-cpu.txt -e '.[dev,fast]'
endif
	touch $@

demo: install
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no rl/grpo.py --config configs/recipes/demo.yaml

test: install
	$(BIN)/python -m pytest -q -n 2

# The packages as an installed tree, for tools that read sources without importing them.
PACKAGES := slides envs rewards models recipe allocator evaluation sft rl deploy doctor

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p build/typed/frugalpath
	ln -sfn $(addprefix $(CURDIR)/,$(PACKAGES)) $(wildcard $(CURDIR)/frugalpath/*.py) build/typed/frugalpath/
	cd build/typed && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml
	cd build/typed && $(abspath $(BIN))/lint-imports --config $(CURDIR)/pyproject.toml

# A module that cannot be imported or read is an error.
docs: install
	$(BIN)/pip install -q -e '.[docs]'
	PDOC_ALLOW_EXEC=1 $(BIN)/python -W error::UserWarning:pdoc.doc -W error::UserWarning:pdoc.doc_ast -m pdoc -d google -o site frugalpath

# All that needs a GPU, measured: MINUTES and OUT may be given. Where nothing is installed yet it takes the CUDA build.
MINUTES ?= 8
OUT ?= runs/gpu
gpu:
	test -f $(VENV)/.installed || $(MAKE) install GPU=1
	$(BIN)/python benchmarks/gpu.py --minutes $(MINUTES) --out $(OUT)
