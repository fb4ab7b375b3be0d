"""Many clients at once, good and bad ones: each answer is right or an error, none is lost, nothing stays."""

import gc
import json
import random
import signal
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import psutil
import pytest
import requests
from servers import Served, chunks, raw_request, tiny_generator, until
from test_serve import serving

from self_speculation import (
    GenerationConfig,
    HuggingfaceLlamaGenerator,
    load_model_and_tokenizer,
    make_strategy,
)
from serving.engine import Job

PROMPTS = ["def add(a, b):", "Once upon a time", "class Stop:", "Human: who are you?", "café", "return a + b"]
LONG = json.dumps({"prompt": "x y " * 500}).encode()
INVALID = [b"", b"{", b"[]", b'{"prompt": 5}', b'{"prompt": "x", "tools": [1]}', LONG]


def storm(generator, url, number, seed, clients=16, half_way=lambda: None):
    """Random requests from many clients at once, whose answers must be those of a model alone.

    Returns the number of requests by outcome. Calls `half_way` after half of them.
    """
    choose, answers = random.Random(seed), defaultdict(set)
    kinds = ["answer", "stream", "answer", "stream", "gone", "invalid"]
    chosen = [(choose.choice(kinds), choose.choice(PROMPTS), choose.randint(1, 24)) for _ in range(number)]

    def send(index):
        if index == number // 2:
            half_way()
        try:
            return outcome(*chosen[index])
        except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError, ConnectionError):
            return "no connection"

    def outcome(kind, prompt, max_tokens):
        request = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": kind == "stream"}
        if kind == "gone":
            stream = max_tokens % 2 == 0
            with raw_request(url, {**request, "max_tokens": 200, "stream": stream}) as connection:
                if stream:
                    connection.recv(100)
            return kind
        body = INVALID[max_tokens % len(INVALID)] if kind == "invalid" else json.dumps(request).encode()
        headers = {"Content-Type": "application/json"}
        response = requests.post(f"{url}/v1/completions", data=body, headers=headers, timeout=120)
        if response.status_code != 200:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}
            assert response.status_code in (429, 503, *[400] * (kind == "invalid")), response.text
            return response.status_code
        assert kind != "invalid"
        if kind == "stream" and "data: [DONE]" not in response.text:
            return json.loads(response.text.split("data: ")[-1])["error"]["message"]
        parts = chunks(response) if kind == "stream" else [response.json()]
        answers[prompt, max_tokens].add("".join(part["choices"][0]["text"] for part in parts))
        return kind

    with ThreadPoolExecutor(clients) as pool:
        outcomes = Counter(pool.map(send, range(number)))
    for (prompt, max_steps), texts in answers.items():
        config = GenerationConfig(sample=False, max_steps=max_steps)
        assert texts == {generator.generate(prompt, config).decoded_prediction}
    return outcomes


def test_forty_requests_at_once(text_model, byte_tokenizer):
    """Guards against jobs that stay in memory, and against races of many clients."""
    with Served(tiny_generator(text_model, byte_tokenizer), batch_size=3, max_waiting=4) as served:
        alone = HuggingfaceLlamaGenerator(byte_tokenizer, text_model, make_strategy("autoregressive"))
        outcomes = storm(alone, served.url, 40, seed=1, clients=12)
        assert {"answer", "stream"} <= set(outcomes) <= {"answer", "stream", "gone", 400, 429}
        until(lambda: not served.num_jobs)
    gc.collect()
    assert [thing for thing in gc.get_objects() if type(thing) is Job] == []


@pytest.mark.slow
def test_a_thousand_requests_a_kill_and_a_signal(model_folder):
    """Guards against memory that grows with requests, lost answers, and a port that stays taken."""
    flags = ["--model", model_folder, "--exit_layer", "2", "--max_waiting", "8"]
    with serving(*flags) as (script, _, url):
        model, tokenizer = load_model_and_tokenizer(str(model_folder))
        alone = HuggingfaceLlamaGenerator(tokenizer, model, make_strategy("autoregressive"))
        total = storm(alone, url, 300, seed=1)
        before = psutil.Process(script.pid).memory_info().rss
        total += storm(alone, url, 500, seed=2)
        assert psutil.Process(script.pid).memory_info().rss - before < 30e6
        assert requests.get(f"{url}/metrics").text.count("self_speculation_in_flight 0.0") == 1
    assert set(total) <= {"answer", "stream", "gone", 400, 429}
    for number, status in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 0)):
        with serving(*flags, port=url.rpartition(":")[2]) as (script, *_):
            total += storm(alone, url, 100, int(number), half_way=partial(script.send_signal, number))
            assert script.wait() == status
    assert sum(total.values()) == 1000
    assert total["no connection"]
