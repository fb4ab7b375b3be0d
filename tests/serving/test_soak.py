"""Many clients at once, good and bad ones: each answer is right or an error, none is lost, nothing stays."""

import gc
import itertools
import json
import random
import re
import signal
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import psutil
import pytest
import requests
from conftest import config_of, generator_of
from servers import Served, chunks, raw_request, send, tiny_generator, until
from test_serve import serving

from self_speculation import Request, load_model_and_tokenizer
from self_speculation.text.grammar import Grammar
from serving.engine import Job
from serving.protocol import FINISH_REASONS

TEXTS = ["def add(a, b):", "Once upon a time", "class Stop:", "Human: who are you?", "café", "return a + b"]
PROMPTS = [*TEXTS, [5, 6, 7], TEXTS[:3], *("x y z " * n for n in (2, 9, 30))]
PENALTIES = {"frequency_penalty": 1.0, "presence_penalty": 1.0, "repetition_penalty": 2.0}
OPTIONS = PENALTIES | {
    "n": 2, "stop": ["\n", "an"], "logprobs": 2, "drafts": False, "top_k": 4,
    "structured_outputs": {"regex": "[0-9]{2,5}"}, "prediction": {"type": "content", "content": TEXTS[1]},
}  # fmt: skip
LONG = json.dumps({"prompt": "x y " * 500}).encode()
INVALID = [b"", b"{", b"[]", b'{"prompt": 5}', b'{"prompt": "x", "n": 0}', LONG]


def random_request(draws):
    """A request that has one answer: greedy, or by a seed."""
    request = {"prompt": draws.choice(PROMPTS), "max_tokens": draws.randint(1, 24)}
    request |= {"temperature": draws.choice([0, 1.0]), "seed": draws.randint(0, 9)}
    return request | dict(draws.sample(sorted(OPTIONS.items()), draws.choice([0, 0, 1, 2])))


def joined(parts):
    """By choice: text, and why it ended."""
    found = defaultdict(lambda: ["", None])
    for choice in (choice for part in parts for choice in part["choices"]):
        found[choice["index"]][0] += choice["text"]
        found[choice["index"]][1] = choice["finish_reason"]
    return dict(found)


def expected(generator, request):
    """The same by the library, each prompt alone and without drafts."""
    prompts = request["prompt"]
    found = []
    prompts = prompts if isinstance(prompts, list) and isinstance(prompts[0], str) else [prompts]
    settings = {name: request[name] for name in ("temperature", "top_k", *PENALTIES) if name in request}
    settings |= {"sample": request["temperature"] > 0, "stop_words": request.get("stop")}
    config = config_of(max_steps=request["max_tokens"], **settings)
    regex = request.get("structured_outputs", {}).get("regex")
    for prompt, nth in itertools.product(prompts, range(request.get("n", 1))):
        given = Request(prompt, seed=request["seed"] + nth, grammar=regex and Grammar.regex(regex))
        result = generator.generate(given, config)
        end = FINISH_REASONS[result.generation_strategy_result.stop_reason]
        found.append([result.decoded_prediction, end])
    return dict(enumerate(found))


def storm(model, tokenizer, served, number, seed, clients=16):
    """Random requests from many clients at once; checks each answer. Returns their number by outcome."""
    draws = random.Random(seed)
    generator = generator_of(tokenizer, model)
    kinds = ["answer", "stream", "answer", "stream", "gone", "invalid"]
    chosen = [(draws.choice(kinds), random_request(draws), draws.randint(0, 99)) for _ in range(number)]
    answers = []

    def outcome(kind, request, chance):
        request = {**request, "stream": kind == "stream"}
        if kind == "gone":
            stream = chance % 2 == 0
            with raw_request(served.url, {**request, "max_tokens": 200, "stream": stream}) as connection:
                if stream:
                    connection.recv(100)
            return kind
        response = send(served, INVALID[chance % len(INVALID)] if kind == "invalid" else json.dumps(request))
        if response.status_code != 200:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}
            assert response.status_code == 429 or (kind, response.status_code) == ("invalid", 400)
            return response.status_code
        assert kind != "invalid"
        answers.append((request, joined(chunks(response) if kind == "stream" else [response.json()])))
        return kind

    with ThreadPoolExecutor(clients) as pool:
        outcomes = Counter(pool.map(lambda each: outcome(*each), chosen))
    for request, answer in answers:
        assert answer == expected(generator, request), request
    return outcomes


def test_sixty_requests_at_once(text_model, byte_tokenizer):
    """Guards against jobs that stay in memory, races of many clients, noise, limits, stops, penalties or
    grammars that requests share, fields without an effect, and one seed for all choices.
    """
    generator = tiny_generator(text_model, byte_tokenizer)
    with Served(generator, batch_size=3, max_waiting=15) as served:
        outcomes = storm(text_model, byte_tokenizer, served, 60, seed=1, clients=9)
        assert {"answer", "stream"} <= set(outcomes) <= {"answer", "stream", "gone", 400, 429}
        assert outcomes["answer"] + outcomes["stream"] > 25
        until(lambda: not served.num_jobs)
    gc.collect()
    assert [thing for thing in gc.get_objects() if type(thing) is Job] == []


@pytest.mark.slow
def test_eight_hundred_requests(model_folder):
    """Guards against memory that grows with requests."""
    flags = ["--model", model_folder, "--exit_layer", "2", "--max_waiting", "8", "--sample", "False"]
    model, tokenizer = load_model_and_tokenizer(str(model_folder))
    with serving(*flags) as (script, _, url):
        total = storm(model, tokenizer, Mock(url=url), 300, seed=1)
        before = psutil.Process(script.pid).memory_info().rss
        total += storm(model, tokenizer, Mock(url=url), 500, seed=2)
        assert psutil.Process(script.pid).memory_info().rss - before < 30e6
        assert re.search(r"vllm:num_requests_running{.*} 0.0\n", requests.get(f"{url}/metrics").text)
    assert set(total) <= {"answer", "stream", "gone", 400, 429}


# What would take much of something.
SCHEMAS = [
    {"type": "integer", "multipleOf": 999983},
    {"type": "string", "allOf": [{"pattern": f"^.*{i}.*$"} for i in range(300)]},
    {"type": "string", "pattern": "^(a{1000}){1000}$"},
]
EXPENSIVE = [
    *({"structured_outputs": {"json": schema}} for schema in SCHEMAS),
    {"prediction": {"type": "content", "content": "x = 1\n" * 400_000}, "n": 8},
    {"stop": ["def f():" * 32] * 128, "n": 2, "stream": True},
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "seconds"),
    [(signal.SIGTERM, 0), (signal.SIGTERM, 0.5), (signal.SIGTERM, 6), (signal.SIGKILL, 2)],
)
def test_signals_beside_expensive_bodies(number, seconds):
    """Guards against a server that does not end while grammars are compiled or predictions tokenized, and
    against processes that outlive it.
    """
    with serving("--max_waiting", 64, "--shutdown_time", 5) as (script, _, url):
        processes = psutil.Process(script.pid).children(recursive=True)
        assert processes
        for fields in EXPENSIVE:
            with raw_request(url, {"prompt": "def f(x):", "max_tokens": 8, **fields}):
                pass
        time.sleep(seconds)
        processes += psutil.Process(script.pid).children(recursive=True)
        script.send_signal(number)
        assert script.wait() in (0, 1, -signal.SIGKILL)
        _, alive = psutil.wait_procs(processes, 5)
        assert not alive
