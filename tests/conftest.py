"""Models and tokenizers that need no download: random tiny Llamas, tokenizers trained on a few sentences."""

import copy
import dataclasses
import functools
import gc
import json
import math
import os
import random
import signal
import sys
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # the models are tiny, and pytest has a process for each core

if find_spec("triton") is not None:  # before torch imports it, for kernels that are computed here
    with patch.dict(os.environ, TRITON_INTERPRET="1"):
        import_module("triton.language")

import card_kernels
import cuda_graphs
import hypothesis
import pytest
import torch
import transformers
from helpers import small_run
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from self_speculation import (
    GenerationConfig,
    HuggingfaceLlamaGenerator,
    Request,
    default_model,
    load_model_and_tokenizer,
    make_strategy,
)
from self_speculation.backends.runners import fuse
from self_speculation.drafts.policy import AdaptivePolicy, Plan
from self_speculation.engine.scheduler import Scheduler
from self_speculation.generator_base import single_result
from self_speculation.requests.results import DraftStats
from self_speculation.weights.kernels import cpu_operators

# A shell that starts the tests in the background lets them ignore Ctrl-C, which tests send.
signal.signal(signal.SIGINT, signal.default_int_handler)
gc.freeze()  # full collections, of which accelerate makes many, do not look at the libraries
transformers.logging.set_verbosity_error()
torch.set_num_threads(1)

# The same examples at every run. `--hypothesis-profile search` looks for new ones.
hypothesis.settings.register_profile("same", deadline=None, derandomize=True, database=None)
hypothesis.settings.register_profile("search", deadline=None)
hypothesis.settings.load_profile("same")

ROOT = Path(__file__).parent.parent
EOS = 2
PROMPT = [5, 9, 4, 7, 7, 3]

# Ways to decode by a model of four layers: all give the same greedy ids.
LAYERS = {"exit_layer": 2, "num_speculations": 4}
COPY = {"exit_layer": 4, "num_speculations": 4, "draft_weights": "int4"}
ADAPTIVE = {"generation_strategy": "adaptive"}
WAYS = {
    "plain": {},
    "layers": LAYERS,
    "n-grams": {**LAYERS, "prompt_lookup": 2},
    "copy": COPY,
    "adaptive": ADAPTIVE,
    "adaptive copy": {**ADAPTIVE, "draft_weights": "int4"},
}

TEXTS = [
    "def add(a, b):\n    return a + b\n\nclass Stop:\n\tpass\n",
    "Once upon a time there was a man. Human: who are you? Assistant: nobody.",
    "naïve café, 日本語のテキスト, 🙂🙃 emoji, Ελληνικά\r\n",
]


@functools.cache
def tiny_llama(
    num_layers: int = 4,
    vocab_size: int = 50,
    agreement: str = "sometimes",
    exit_layer: int = 2,
    fused: bool = False,
    **config: object,
) -> LlamaForCausalLM:
    """A random Llama in fp32, with fused layers if `fused`.

    agreement: how often early exits guess the model's token: `always` (the layers from `exit_layer` on add
    nothing), `never` (the last layer changes every logit's sign), `often` or `sometimes`.
    """
    torch.manual_seed(0)
    settings = {
        "vocab_size": vocab_size, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": num_layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": 0,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **config})).eval()
    scale = {"sometimes": 1.0, "often": 0.25}.get(agreement, 0.0)
    for layer in model.model.layers[1 if agreement == "often" else exit_layer :]:
        layer.self_attn.o_proj.weight.data *= scale
        layer.mlp.down_proj.weight.data *= scale
    if agreement == "never":
        model.model.layers[-1].register_forward_hook(lambda module, inputs, output: -output)
    if fused:
        fuse(model)
    return model


def own_llama(*args: object, fused: bool = False, **config: object) -> LlamaForCausalLM:
    """A tiny Llama that a test may change."""
    model = copy.deepcopy(tiny_llama(*args, **config))
    if fused:
        fuse(model)
    return model


@pytest.fixture
def model() -> LlamaForCausalLM:
    """A tiny Llama that a test may change."""
    return own_llama()


needs_operators = pytest.mark.skipif(cpu_operators().variant is None, reason=str(cpu_operators()))

WITHOUT_OPERATORS = cpu_operators().variant is None  # then scripts print a line more


def ways(*names):
    """Parameters of a test: copies need operators on a CPU."""
    return [pytest.param(name, marks=needs_operators if "copy" in name else ()) for name in names]


def config_of(**settings):
    """Greedy settings, with the strategy that they ask for."""
    drafted = "self_speculative" if "num_speculations" in settings else "autoregressive"
    return GenerationConfig(**{"sample": False, "generation_strategy": drafted, **settings})


def in_batch(model, requests, batch_size, **settings):
    """Results by index."""
    config = config_of(**settings)
    strategy = make_strategy(config.generation_strategy)
    return dict(strategy.generate_batch(model, requests, config, batch_size))


def generate(model, prompt, strategy=None, eos=(EOS,), **settings):
    """The result of one prompt. Fields of `Request` may be given, too."""
    of_request = {field.name for field in dataclasses.fields(Request)} - {"prompt", "config"}
    fields = {name: settings.pop(name) for name in of_request & settings.keys()}
    request = Request(prompt, eos_token_ids=eos, **fields)
    settings |= {"generation_strategy": strategy} if strategy else {}
    return answer_of(make_strategy(config_of(**settings).generation_strategy), model, request, **settings)


def answer_of(strategy, model, request, batch_size=1, **settings):
    """The result of a request, or of a prompt, by a strategy that may have kept a cache."""
    request = request if isinstance(request, Request) else Request(request, eos_token_ids=[EOS])
    config = config_of(**{"max_steps": 12, **settings})
    return single_result(strategy.generate_batch(model, [request], config, batch_size))


def ids_of(model, prompt=PROMPT, **settings):
    """The ids of an answer that no end id ends."""
    return generate(model, prompt, **{"max_steps": 20, "eos": (), **settings}).predicted_tokens


def scheduler_of(model, batch_size, token_budget=None, **settings):
    config = config_of(**{"max_steps": 12, **settings})
    strategy = make_strategy(config.generation_strategy)
    return Scheduler(strategy, model, config, batch_size, token_budget)


def generator_of(tokenizer, model, strategy="autoregressive"):
    return HuggingfaceLlamaGenerator(tokenizer, model, make_strategy(strategy))


def drained(scheduler):
    """Step until all requests have finished; their results by key."""
    results = {}
    while scheduler.has_requests:
        scheduler.step()
        results |= scheduler.pop_finished()
    return results


class Recorder:
    """A streamer that keeps what it is given. After so many calls, `put` raises."""

    def __init__(self, calls=math.inf):
        self.decided = []
        self.drafts = []
        self.num_drafted = 0
        self.ended = 0
        self._left = calls

    def put(self, ids, is_draft=False):
        self._left -= 1
        if self.has_raised:
            raise KeyError("of the streamer")
        (self.drafts if is_draft else self.decided).extend(ids.tolist())
        self.num_drafted += is_draft

    @property
    def has_raised(self):
        return self._left < 0

    def delete(self, num_tokens, is_draft=False):
        assert (num_tokens, is_draft) == (len(self.drafts), True)
        self.drafts = []

    def end(self):
        self.ended += 1


@contextmanager
def mixed_drafts(*sources):
    """Require that in this block drafted tokens are accepted and rejected, also of each source that `sources`
    names by the start of the name. Compared ids would be equal, too, if a source silently stopped.
    """
    seen = DraftStats()
    add = DraftStats.add

    def counted(stats, *counts, **more):
        add(seen, *counts, **more)
        add(stats, *counts, **more)

    with patch.object(DraftStats, "add", counted):
        yield
    assert seen.num_drafted > seen.num_accepted > 0, f"{seen.num_accepted} of {seen.num_drafted} accepted"
    for source in sources:
        counts_of_source = [counts for name, counts in seen.by_source.items() if name.startswith(source)]
        drafted, accepted = (sum(counts[part] for counts in counts_of_source) for part in (1, 2))
        assert drafted > accepted > 0, f"{source}: {accepted} of {drafted} accepted"


def planned(choose):
    """Replaces `AdaptivePolicy.plan`: `choose` gets the sources that compute, the matches and the limits."""

    replaced = AdaptivePolicy.plan

    def plan(policy, matches, limits):
        replaced(policy, matches, limits)  # estimates the costs of the round
        policy._plan = choose([*policy._draft_steps], matches, limits)
        return policy._plan

    return plan


def random_plans(seed):
    """A patch: adaptive decoding makes any possible plan."""
    draws = random.Random(seed)

    def choose(sources, matches, limits):
        source = draws.choice([None, *sorted(sources)])
        most = draws.randint(0, max(limits))
        plan = Plan([], [], trial=draws.choice([None, draws.randrange(len(limits))]))
        for match, limit in zip(matches, limits, strict=True):
            looks_up = match is not None and draws.choice([True, False])
            length = draws.randint(0, min(most, len(match.ids) if looks_up else limit))
            length = length if looks_up or source else 0
            plan.source_names.append(None if length == 0 else match.source_name if looks_up else source)
            plan.lengths.append(length)
        return plan

    return patch.object(AdaptivePolicy, "plan", planned(choose))


def transformers_generate(model, prompt=PROMPT, max_steps=20, eos=EOS, **kwargs):
    """Greedy token ids by transformers, cut before the first end id."""
    with torch.inference_mode():
        ids = model.generate(
            torch.tensor([prompt]), max_new_tokens=max_steps, do_sample=False, eos_token_id=eos,
            pad_token_id=0, **kwargs,
        )  # fmt: skip
    new = ids[0, len(prompt) :].tolist()
    ends = [i for i, token in enumerate(new) if token in (eos if isinstance(eos, list) else [eos])]
    return new[: ends[0]] if ends else new


def assert_close(actual, expected, computed_in=None, roundings=100):
    """Equal up to so many roundings of the largest number: sums may have another order.

    computed_in: the dtype of the roundings, if a part is computed in fewer bits than the result has.
    """
    eps = torch.finfo(computed_in or expected.dtype).eps
    bound = roundings * eps * float(expected.detach().abs().max())
    torch.testing.assert_close(actual, expected, rtol=0, atol=bound, check_dtype=False)


SPECIAL = ["<unk>", "<s>", "</s>"]


def _trained(
    tokenizer: Tokenizer, vocab_size: int, tokens: tuple[str, ...] = (), **trainer: object
) -> PreTrainedTokenizerFast:
    """Train on TEXTS, with `tokens` in the vocabulary."""
    settings = {"special_tokens": [*SPECIAL, *tokens], "show_progress": False, **trainer}
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=vocab_size, **settings))
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in SPECIAL]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, as in Llama 3: tokens may be parts of a UTF-8 character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _trained(tokenizer, 330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


@pytest.fixture(scope="session")
def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """Spaces in words, bytes for unknown characters, as in Llama 2: decoding strips the first space."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_ = tuple(f"<0x{byte:02X}>" for byte in range(256))
    return _trained(tokenizer, 360, bytes_, initial_alphabet=[], limit_alphabet=40)


@pytest.fixture(scope="session")
def text_model(byte_tokenizer) -> LlamaForCausalLM:
    """A tiny Llama with the byte tokenizer's vocabulary."""
    return tiny_llama(vocab_size=len(byte_tokenizer))


@pytest.fixture(scope="session")
def model_folder(byte_tokenizer, text_model, tmp_path_factory) -> Path:
    """The tiny Llama and a tokenizer as a Hugging Face folder, for the scripts."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    byte_tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    )
    byte_tokenizer.save_pretrained(folder)
    text_model.save_pretrained(folder)
    return folder


# Where `make test` installs it, since it slows down every start.
TRITON = Path(sys.prefix) / "triton"
HAS_TRITON = TRITON.is_dir() or find_spec("triton") is not None


@pytest.fixture
def triton_kernels(monkeypatch):
    """The module of kernels of a card. A CPU would compute them by Triton's interpreter."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.syspath_prepend(TRITON)
    if not HAS_TRITON:
        pytest.skip("triton is not installed")
    return import_module("self_speculation.backends.card_kernels")


@pytest.fixture
def interpreter(triton_kernels, monkeypatch):
    """Fused layers decode by the kernels of a card, in the interpreter."""
    monkeypatch.setattr(triton_kernels, "_processors", lambda device: 8)
    with card_kernels.on_cpu(triton_kernels.decode_attention, triton_kernels.gated):
        yield triton_kernels


@pytest.fixture
def graphs(triton_kernels, monkeypatch):  # noqa: ARG001
    """CUDA graphs without a GPU, see `cuda_graphs.stand_in`. Kernels are torch's: in the interpreter a layer
    of one token takes 80 ms.
    """
    with card_kernels.on_cpu(card_kernels.decode_attention, card_kernels.gated):
        yield cuda_graphs.stand_in(monkeypatch)


def card_llama(num_layers: int = 2, **config: object) -> LlamaForCausalLM:
    """A tiny fused Llama whose heads the kernels of a card take."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
    return own_llama(num_layers, fused=True, **{**heads, **config})


@pytest.fixture
def one_rank(tmp_path):
    """A process group of this process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def bundled():
    """The bundled model and tokenizer."""
    return load_model_and_tokenizer(default_model())


@pytest.fixture
def common(model_folder, tmp_path):
    """Flags of a script over a small dataset."""
    return small_run(model_folder, tmp_path)


@pytest.fixture(scope="session")
def endless_folder(byte_tokenizer, tmp_path_factory):
    """A model that never generates an end id, for tests that interrupt it."""
    folder = tmp_path_factory.mktemp("endless")
    byte_tokenizer.save_pretrained(folder)
    model = tiny_llama(vocab_size=len(byte_tokenizer), max_position_embeddings=100_000)
    torch.nn.init.zeros_(model.lm_head.weight[EOS])
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """A glob of twenty small files."""
    folder = tmp_path_factory.mktemp("texts")
    for index in range(20):
        lines = [f"def add_{index}_{line}(a, b):\n    return a + b + {line * index}\n" for line in range(15)]
        (folder / f"{index}.py").write_text("\n".join(lines))
    return str(folder / "*.py")


@pytest.fixture(scope="module")
def served(text_model, byte_tokenizer):
    """A server in this process, over the tiny Llama."""
    from servers import Served, tiny_generator  # tests/serving has the tests of servers

    with Served(tiny_generator(text_model, byte_tokenizer), max_waiting=4, max_time=500) as served:
        yield served


@pytest.fixture(scope="module")
def few_files_are_read():
    """Keep the harness from reading thousands of tasks and the installed packages, which takes seconds."""
    from lm_eval.tasks import TaskManager

    manager = functools.partial(TaskManager, include_defaults=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.tasks.TaskManager", manager)
        patch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)
        patch.setattr("lm_eval.utils._LOGGING_CONFIGURED", True)  # it would keep one test's standard error
        yield
