"""Many clients at once, good and bad ones: each answer is right or an error, none is lost, nothing stays."""

import gc
import json
import random
import re
import signal
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import psutil
import pytest
import requests
from conftest import generator_of
from servers import GREEDY, Served, chunks, post, raw_request, tiny_generator, until
from test_serve import serving

from self_speculation import load_model_and_tokenizer
from serving.engine import Job

TEXTS = ["def add(a, b):", "Once upon a time", "class Stop:", "Human: who are you?", "café", "return a + b"]
PROMPTS = [*TEXTS, [5, 6, 7], TEXTS[:3], *("x y z " * n for n in (2, 9, 30))]
OPTIONS = {
    "n": 2, "stop": ["\n", "an"], "logprobs": 2, "drafts": False, "frequency_penalty": 1.0, "top_k": 4,
    "structured_outputs": {"regex": "[0-9]{2,5}"}, "prediction": {"type": "content", "content": TEXTS[1]},
}  # fmt: skip
LONG = json.dumps({"prompt": "x y " * 500}).encode()
INVALID = [b"", b"{", b"[]", b'{"prompt": 5}', b'{"prompt": "x", "n": 0}', LONG]


def random_request(draws):
    """A request that has one answer: greedy, or by its seed."""
    request = {"prompt": draws.choice(PROMPTS), "max_tokens": draws.randint(1, 24)}
    request |= {"temperature": draws.choice([0, 1.0]), "seed": draws.randint(0, 9)}
    return request | dict(draws.sample(sorted(OPTIONS.items()), draws.choice([0, 0, 1, 2])))


def said(parts):
    """By choice: text, log-probabilities and why it ended."""
    found = defaultdict(lambda: ["", [], None])
    for choice in (choice for part in parts for choice in part["choices"]):
        own = found[choice["index"]]
        own[0] += choice["text"]
        own[1] += (choice["logprobs"] or {}).get("token_logprobs", [])
        own[2] = choice["finish_reason"]
    return dict(found)


def storm(reference, url, number, seed, clients=16, half_way=lambda: None):
    """Random requests from many clients at once. Each answer must be that of `reference`, a server in this
    process, to the request alone, with drafts or without.

    Returns the number of requests by outcome. Calls `half_way` after half of them.
    """
    draws, answers = random.Random(seed), []
    kinds = ["answer", "stream", "answer", "stream", "gone", "invalid"]
    chosen = [(draws.choice(kinds), random_request(draws), draws.randint(0, 99)) for _ in range(number)]

    def send(index):
        if index == number // 2:
            half_way()
        try:
            return outcome(*chosen[index])
        except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError, ConnectionError):
            return "no connection"

    def outcome(kind, request, chance):
        request = {**request, "stream": kind == "stream"}
        if kind == "gone":
            stream = chance % 2 == 0
            with raw_request(url, {**request, "max_tokens": 200, "stream": stream}) as connection:
                if stream:
                    connection.recv(100)
            return kind
        body = INVALID[chance % len(INVALID)] if kind == "invalid" else json.dumps(request).encode()
        headers = {"Content-Type": "application/json"}
        response = requests.post(f"{url}/v1/completions", data=body, headers=headers, timeout=120)
        if response.status_code != 200:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}
            assert response.status_code in (429, 503, *[400] * (kind == "invalid")), response.text
            return response.status_code
        assert kind != "invalid"
        if kind == "stream" and "data: [DONE]" not in response.text:
            return json.loads(response.text.split("data: ")[-1])["error"]["message"]
        answers.append((request, said(chunks(response) if kind == "stream" else [response.json()])))
        return kind

    with ThreadPoolExecutor(clients) as pool:
        outcomes = Counter(pool.map(send, range(number)))
    until(lambda: not reference.num_jobs)
    for request, answer in answers:
        alone = {**request, "stream": False, "drafts": not request.get("drafts", True)}
        expected = said([post(reference, **alone).json()])
        for choice in expected.values():
            choice[1] = pytest.approx(choice[1], abs=1e-3)
        assert answer == expected, request
    return outcomes


def test_sixty_requests_at_once(text_model, byte_tokenizer):
    """Guards against jobs that stay in memory, races of many clients, noise, limits, stops, grammars or
    log-probabilities that requests share, and choices in the order in which they finish.
    """
    with Served(tiny_generator(text_model, byte_tokenizer), batch_size=3, max_waiting=15) as served:
        outcomes = storm(served, served.url, 60, seed=1, clients=9)
        assert {"answer", "stream"} <= set(outcomes) <= {"answer", "stream", "gone", 400, 429}
        assert outcomes["answer"] + outcomes["stream"] > 25
        until(lambda: not served.num_jobs)
    gc.collect()
    assert [thing for thing in gc.get_objects() if type(thing) is Job] == []


@pytest.mark.slow
def test_a_thousand_requests_a_kill_and_a_signal(model_folder):
    """Guards against memory that grows with requests, lost answers, and a port that stays taken."""
    flags = ["--model", model_folder, "--exit_layer", "2", "--max_waiting", "8", "--sample", "False"]
    model, tokenizer = load_model_and_tokenizer(str(model_folder))
    with Served(generator_of(tokenizer, model, GREEDY.generation_strategy)) as reference:
        with serving(*flags) as (script, _, url):
            total = storm(reference, url, 300, seed=1)
            before = psutil.Process(script.pid).memory_info().rss
            total += storm(reference, url, 500, seed=2)
            assert psutil.Process(script.pid).memory_info().rss - before < 30e6
            assert re.search(r"vllm:num_requests_running{.*} 0.0\n", requests.get(f"{url}/metrics").text)
        assert set(total) <= {"answer", "stream", "gone", 400, 429}
        for number, status in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 0)):
            with serving(*flags, port=url.rpartition(":")[2]) as (script, *_):
                kill = partial(script.send_signal, number)
                total += storm(reference, url, 100, int(number), half_way=kill)
                assert script.wait() == status
    assert sum(total.values()) == 1000
    assert total["no connection"]


BAD_SCHEMAS = [
    {"type": "integer", "multipleOf": 999983},
    {"type": "string", "allOf": [{"pattern": f"a{i}"} for i in range(100)]},
    {"type": "string", "allOf": [{"pattern": f"^.*{i}.*$"} for i in range(300)]},
    {"type": "string", "pattern": "^(a{1000}){1000}$"},
]


def guided(schema):
    return {"structured_outputs": {"json": schema}}


def expensive_body(choose):
    """A request that would take much of something."""
    number = choose.randint(10**5, 10**6)
    schemas = [
        {"type": "integer", "multipleOf": number},
        {"allOf": [{"pattern": f"{'abcdef'[i % 6]}{i}"} for i in range(number % 200)]},
        {"pattern": f"^(a{{{number % 1500}}}|b{{{number % 700}}}){{{number % 900}}}$"},
        {"type": "object", "properties": {f"p{i}": {"pattern": f"^{i}.*$"} for i in range(number % 900)}},
    ]
    text = choose.choice(["x = 1\n", "a", " ", "def f():"]) * choose.randint(1, 400_000)
    fields = [
        guided({"type": "string", **choose.choice(schemas)}),
        {"prediction": {"type": "content", "content": text}, "n": choose.randint(1, 8)},
        {"stop": [text[: 10**6]], "n": 2, "stream": True},
    ]
    return {"prompt": "def f(x):", "max_tokens": 8, **choose.choice(fields)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "seconds"),
    [(signal.SIGTERM, 0), (signal.SIGTERM, 0.5), (signal.SIGTERM, 6), (signal.SIGKILL, 2)],
)
def test_signals_beside_expensive_bodies(number, seconds):
    """Guards against a server that does not end while grammars are compiled or predictions tokenized, and
    against processes that outlive it.
    """
    choose = random.Random(seconds)
    bodies = [{"prompt": "x", **guided(schema)} for schema in BAD_SCHEMAS]
    with serving("--max_waiting", 64, "--shutdown_time", 5) as (script, _, url):
        processes = psutil.Process(script.pid).children(recursive=True)
        assert processes
        for body in [*bodies, *[expensive_body(choose) for _ in range(8)]]:
            with raw_request(url, body):
                pass
        time.sleep(seconds)
        processes += psutil.Process(script.pid).children(recursive=True)
        script.send_signal(number)
        assert script.wait(10) in (0, 1, -signal.SIGKILL)
        _, alive = psutil.wait_procs(processes, 5)
        assert not alive
