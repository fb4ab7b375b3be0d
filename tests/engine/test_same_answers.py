"""No draft, row, order or kept prefix changes an answer: it is that of the prompt alone without drafts, which
follows from logits of transformers and the noise of the request's seed.
"""

import copy
import random
from collections import deque
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from itertools import count
from unittest.mock import patch

import pytest
import torch
from conftest import (
    COPY,
    LAYERS,
    WAYS,
    WITHOUT_OPERATORS,
    Recorder,
    config_of,
    in_batch,
    mixed_drafts,
    own_llama,
    random_plans,
    scheduler_of,
    ways,
)
from test_llama_model_utils import mixture, windowed
from test_sampling import by_definition
from transformers import NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

from self_speculation import Request, fuse
from self_speculation.backends.copies import quantize
from self_speculation.backends.cpu_runner import rounds_prompts
from self_speculation.backends.sampling import noise_key
from self_speculation.config import SAMPLING_RULES
from self_speculation.engine import batch
from self_speculation.requests.request import FrequencyPenaltyLogitsProcessor


def often_right(bits=None, **config):
    model = own_llama(agreement="often", **config)
    if bits:
        quantize(model, bits)
    return model


def scaled(model, factor):
    """Embeddings decide how often exits are right, and how much answers vary."""
    model.model.embed_tokens.weight.data *= factor
    return model.float()


MODELS = {
    "float32": often_right,
    "torch": often_right,
    "bfloat16": lambda: often_right().bfloat16(),
    "four bits": lambda: often_right(4, hidden_size=40, intermediate_size=72),
    "eight bits": lambda: often_right(8, hidden_size=40, intermediate_size=72),
    "windows": lambda: scaled(windowed("mistral"), 2),
    "windows in one layer of two": lambda: scaled(windowed("gemma3_text"), 0.2),
    "windows in layers of transformers": lambda: scaled(windowed("olmo3"), 3),
    "experts": lambda: scaled(mixture("mixtral"), 5),
}
NEED_OPERATORS = ("bfloat16", "four bits", "eight bits")
SLOW = ("torch", "windows in layers of transformers", "experts")
HAVE_SLOW_MODELS = ("plain", "layers", "adaptive copy")
HAVE_NO_COPIES = ("four bits", "eight bits", "experts")


@cache
def model_of(name):
    """It, and the same in float32 without operators; None: there is none."""
    model = MODELS[name]()
    exact = None
    if "bits" not in name and not rounds_prompts(model):
        exact = copy.deepcopy(model).float()
    if name != "torch":
        fuse(model)
    return model, exact


def changes(how):
    """A processor that depends on all of the history: it rolls, or later raises, gives NaN or one id."""

    def process(ids, scores):
        assert (len(ids), len(scores)) == (1, 1)
        chance = int((ids[0] * torch.arange(1, ids.shape[1] + 1)).sum())
        if how == "rolls":
            return scores.roll(chance % 7, dims=-1)
        if chance % 19:
            return scores
        if how == "raises":
            raise KeyError(how)
        return scores * torch.nan if how == "NaN" else torch.eye(len(scores[0]))[chance % 50, None].log()

    return {"logits_processors": [process]}


def ends(output):
    return sum(output[-3:]) % 19 == 0


def criterion(ids, _, fails=False):
    if (met := ends(ids[0].tolist())) and fails:
        raise KeyError
    return torch.tensor([met])


# Settings that a few requests have.
RARE = [
    *map(changes, ("rolls", "raises", "NaN", "one")), {"stop_checks": ends}, {"eos_token_ids": [7, 19, 33]},
    {"stopping_criteria": criterion}, {"stopping_criteria": lambda *args: criterion(*args, fails=True)},
    {"drafts": False},
]  # fmt: skip
PENALTIES = [
    {"no_repeat_ngram_size": 2}, {"repetition_penalty": 1.3}, {"frequency_penalty": 0.4},
    {"presence_penalty": 0.3},
]  # fmt: skip


def draw_config(draws):
    return {
        "max_steps": draws.randint(10, 40), "sample": draws.random() < 0.5,
        "temperature": draws.choice([0.3, 1.2]), "top_k": draws.choice([0, 0, 20]),
        "top_p": draws.choice([0.9, 1.0]), "min_p": draws.choice([0.0, 0.0, 0.05]),
        **(draws.choice(PENALTIES) if draws.random() < 0.15 else {}),
    }  # fmt: skip


def end_of(result):
    return type(result) if isinstance(result, Exception) else result.stop_reason


@torch.inference_mode()
def end_by_transformers(model, request, config, context, tokens):
    """The end of an answer of the given tokens and the position. Fails if a token is another one."""
    start = len(request.prompt_ids)
    ids = [*request.prompt_ids, *tokens]
    passed = model(torch.tensor([ids]), output_hidden_states=True)
    logits = passed.logits
    if config.exit_layer != -1:
        logits = model.lm_head(model.model.norm(passed.hidden_states[config.exit_layer]))
    processors = [
        RepetitionPenaltyLogitsProcessor(config.repetition_penalty),
        FrequencyPenaltyLogitsProcessor(start, config.frequency_penalty, config.presence_penalty),
        *([NoRepeatNGramLogitsProcessor(2)] if config.no_repeat_ngram_size else []),
        *(request.logits_processors or []),
    ]
    for n, scores in enumerate(logits[:, start - 1 :].unbind(1)):
        history = torch.tensor([ids[: start + n]])
        try:
            if n and request.stop_checks and request.stop_checks(tokens[:n]):
                return "stop_word", n
            if n and request.stopping_criteria and request.stopping_criteria(history, scores):
                return "stopping_criteria", n
            if n == config.max_steps or start + n == context:
                return "max_steps" if n == config.max_steps else "context", n
            for process in processors:
                scores = process(history, scores)
        except KeyError:
            return KeyError, n
        if scores.isnan().any():
            return FloatingPointError, n
        key = torch.tensor([noise_key(request.seed, n)])
        rules = {name: getattr(config, name) for name in SAMPLING_RULES}
        token = int(by_definition(scores, key, **rules) if config.sample else scores.argmax())
        if token in (request.eos_token_ids or ()):
            return "eos", n
        assert [token] == tokens[n : n + 1]


def together(model, requests, batch_size, budget, cancelled, **config):
    """Results by index. With a budget all requests are added before the first step.

    cancelled: a step and the index of a request.
    """
    scheduler = scheduler_of(model, batch_size, budget, **config)
    waiting = deque(enumerate(requests))
    results = {}
    before = {}
    for step in count():
        while waiting and (budget or scheduler.num_free_slots):
            scheduler.add_request(*waiting.popleft())
        if step == cancelled[0]:
            scheduler.cancel({cancelled[1]})
            before = {row.request_id: [*row.output_ids] for row in scheduler.batch.sequences}
        scheduler.step()
        results |= scheduler.pop_finished()
        if not (waiting or scheduler.has_requests):
            assert scheduler.num_free_slots == batch_size
            for key, result in results.items():
                if end_of(result) == "cancelled":
                    assert (key, result.predicted_tokens) == (cancelled[1], before.get(key, []))
            return results


def compare(name, way, draws):
    """Some requests, each alone without drafts, and all beside and after each other with drafts. Returns how
    many tokens of prompts were cached.
    """
    model, exact = model_of(name)
    shared = draw_config(draws)
    context = draws.choice([128, 128, 60])
    if name not in SLOW:  # whose bits depend on the pass
        shared["cache_dtype"] = copy.copy(draws).choice(["float32", "float16", "bfloat16"])
        exact = exact if shared["cache_dtype"] == "float32" else None
    late = draws.choice([False, False, True])
    budget = draws.choice([None, None, 1, 4, 9])
    cancelled = draws.choice([(-1, 0), (-1, 0), (draws.randint(0, 12), draws.randrange(3))])
    if "num_speculations" in way:
        way = {**way, "num_speculations": draws.choice([*range(1, 9), 256])}
    plain = shared | {"exit_layer": way["exit_layer"]} if way.keys() == {"exit_layer"} else shared
    requests = []
    results = []
    shown = []
    beginning = random.Random(name).choices(
        range(3, 50), k=copy.copy(draws).choice([0, 0, 70])
    )  # of all prompts
    with (
        patch.object(model.config, "max_position_embeddings", context),
        patch("self_speculation.backends.kv_cache._FIRST_ALLOCATION", 3),
        patch.object(batch, "queues_passes", lambda _: late),
        random_plans(draws.randrange(2**32)),
    ):
        for row in range(draws.randint(3, 4)):
            prompt = beginning + draws.choices(range(3, draws.choice([9, 50])), k=draws.randint(1, 30))
            if row > 1:  # goes on from an answer, or from a part of the prompt
                before = draws.randrange(2)
                prompt = [*requests[before].prompt, *shown[before].decided][: draws.randint(5, 80)] + prompt
            config = config_of(**draw_config(draws)) if draws.random() < 0.7 else None
            rare = draws.choice(RARE) if draws.random() < 0.5 else {}
            request = Request(prompt[: context - 10], seed=draws.randrange(2**40), config=config, **rare)
            shown.append(Recorder())
            results += in_batch(model, [replace(request, streamer=shown[-1])], 1, **plain).values()
            decided = shown[-1].decided
            if exact is not None:
                config = replace(config or config_of(**shared), exit_layer=plain.get("exit_layer", -1))
                found = end_by_transformers(exact, request, config, context, decided)
                assert found == (end_of(results[-1]), len(decided))
            predicted = [*decided[:9], draws.choice([1, 5, -1, 10**6]), *decided[10:]]
            streamer = Recorder(draws.choice([99] * 9 + [5]))  # it may raise
            prediction = predicted if draws.random() < 0.3 else None
            requests.append(replace(request, streamer=streamer, prediction=prediction))
        settings = {**shared, **way, "reuse_cache": not rounds_prompts(model)}
        found = together(model, requests, draws.choice([2, 2, 3]), budget, cancelled, **settings)
        fixed = [replace(request, streamer=None) for request in requests if "num_speculations" in way]
        drafted = [in_batch(model, [request], 1, **shared, **way)[0] for request in fixed]
    for row, (request, alone) in enumerate(zip(requests, shown, strict=True)):
        result = found[row]
        streamer = request.streamer
        if streamer.has_raised:
            assert isinstance(result, KeyError)
            continue
        assert (streamer.drafts, streamer.ended) == ([], 1)
        if end_of(result) == "cancelled":
            assert result.predicted_tokens == streamer.decided == alone.decided[: len(streamer.decided)]
            continue
        assert (end_of(result), streamer.decided) == (end_of(results[row]), alone.decided)
        if not isinstance(result, Exception):
            assert result.predicted_tokens == alone.decided
            assert result.end_token_id == results[row].end_token_id
            assert request.drafts or not (result.draft_stats and result.draft_stats.num_drafted)
            assert not drafted or result.draft_stats == drafted[row].draft_stats
    return sum(result.num_cached_tokens for result in found.values() if not isinstance(result, Exception))


# Settings, and the sources that draft.
ALL_WAYS = {
    "plain": ({}, []),
    "early exit": ({"exit_layer": 2}, []),
    "first layer": ({**LAYERS, "exit_layer": 1}, ["exit"]),
    "layers": (LAYERS, ["exit"]),
    "n-grams": (WAYS["n-grams"], ["exit", "n-grams", "prediction"]),
    "copy": (COPY, ["4-bit copy"]),
    "copy of a few layers": ({**COPY, "exit_layer": 3}, ["exit"]),
    "adaptive": (WAYS["adaptive"], ["exit", "prediction"]),
    "adaptive copy": (WAYS["adaptive copy"], ["exit", "4-bit copy"]),
}


@pytest.mark.parametrize("way", ways(*ALL_WAYS))
def test_answers_are_those_of_plain_decoding_alone(way):
    """Guards against

    - errors in length limits, rollback, keys that are rounded, stops inside a draft, windows, experts,
      rounding in wider passes, the history of processors and stop conditions, and memory for drafts that the
      limit rules out;
    - keys, values or ids that an inexact draft, another source or another row leaves, and noise that depends
      on drafts, rows or their order;
    - slots, masks, positions, settings or conditions of other rows, a row at the end of the context that
      shortens other rows, a chunk of a prompt at a wrong position, and a token that a cancelled row still
      gets;
    - kept keys of rejected drafts, of tokens after the end, of layers that did not run, or of another text;
    - on a GPU, where tokens are read late, a pass too many that shows;
    - an error that reaches another row, a drafted token that ends or changes an output because processors
      raise there, and an output that goes on where draft and target are both NaN;
    - a streamer that does not get all tokens before an error, gets one twice, or keeps a draft.

    Plans of adaptive decoding are random: on a tiny model, the policy always has the same best plan.
    """
    settings, sources = ALL_WAYS[way]
    num_cached = 0
    left_out = [
        *(HAVE_NO_COPIES if "copy" in way else ()),
        *(() if way in HAVE_SLOW_MODELS else SLOW),
        *(NEED_OPERATORS if WITHOUT_OPERATORS else ()),
    ]
    with mixed_drafts(*sources) if sources else nullcontext():
        for name in [name for name in MODELS if name not in left_out]:
            print(name)  # shown if it fails
            num_cached += compare(name, settings, random.Random(f"{way}, {name}"))
        for turn in range(9):  # where prompts are rounded, the other models keep none; or many are left out
            if not num_cached or (WITHOUT_OPERATORS and turn < 3):
                num_cached += compare("float32", settings, random.Random(f"{way}, {turn}"))
    assert num_cached
