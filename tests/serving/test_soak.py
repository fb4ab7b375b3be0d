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
from servers import Served, raw_request, tiny_generator, until
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


class Storm:
    """Random requests from many clients at once; checks the answers against a model alone."""

    def __init__(self, url, model, tokenizer, clients):
        self.url, self._clients, self._answers = url, clients, defaultdict(set)
        self._alone = HuggingfaceLlamaGenerator(tokenizer, model, make_strategy("autoregressive"))

    def __call__(self, number, seed, half_way=lambda: None):
        """Returns the number of requests by outcome. Calls `half_way` after half of them."""
        choose = random.Random(seed)
        kinds = ["answer", "stream", "answer", "stream", "gone", "invalid"]
        chosen = [
            (choose.choice(kinds), choose.choice(PROMPTS), choose.randint(1, 24)) for _ in range(number)
        ]

        def send(index):
            if index == number // 2:
                half_way()
            try:
                return self._send(*chosen[index])
            except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError, ConnectionError):
                return "no connection"

        with ThreadPoolExecutor(self._clients) as clients:
            outcomes = Counter(clients.map(send, range(number)))
        for (prompt, max_steps), texts in self._answers.items():
            config = GenerationConfig(sample=False, max_steps=max_steps)
            assert texts == {self._alone.generate(prompt, config).decoded_prediction}
        return outcomes

    def _send(self, kind, prompt, max_tokens):
        request = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": kind == "stream"}
        if kind == "gone":
            stream = max_tokens % 2 == 0
            with raw_request(self.url, {**request, "max_tokens": 200, "stream": stream}) as connection:
                if stream:
                    connection.recv(100)
            return kind
        body = INVALID[max_tokens % len(INVALID)] if kind == "invalid" else json.dumps(request).encode()
        headers = {"Content-Type": "application/json"}
        response = requests.post(f"{self.url}/v1/completions", data=body, headers=headers, timeout=120)
        if response.status_code != 200:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}
            assert response.status_code in (429, 503, *[400] * (kind == "invalid")), response.text
            return response.status_code
        assert kind != "invalid"
        if kind == "answer":
            text = response.json()["choices"][0]["text"]
        else:
            *chunks, last = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
            if last != "[DONE]":
                return json.loads(last)["error"]["message"]
            text = "".join(json.loads(chunk)["choices"][0]["text"] for chunk in chunks)
        self._answers[prompt, max_tokens].add(text)
        return kind


def test_forty_requests_at_once(text_model, byte_tokenizer):
    """Guards against jobs that stay in memory, and against races of many clients."""
    with Served(tiny_generator(text_model, byte_tokenizer), batch_size=3, max_waiting=4) as served:
        outcomes = Storm(served.url, text_model, byte_tokenizer, clients=12)(40, seed=1)
        assert {"answer", "stream"} <= set(outcomes) <= {"answer", "stream", "gone", 400, 429}
        until(lambda: not served.num_jobs)
    gc.collect()
    assert [thing for thing in gc.get_objects() if type(thing) is Job] == []


@pytest.mark.slow
def test_a_thousand_requests_a_kill_and_a_signal(model_folder):
    """Guards against memory that grows with requests, lost answers, and a port that stays taken."""
    flags = ["--model", model_folder, "--exit_layer", "2", "--max_waiting", "8"]
    with serving(*flags) as (script, _, url):
        storm = Storm(url, *load_model_and_tokenizer(str(model_folder)), clients=16)
        total = storm(300, seed=1)
        before = psutil.Process(script.pid).memory_info().rss
        total += storm(500, seed=2)
        assert psutil.Process(script.pid).memory_info().rss - before < 30e6
        assert requests.get(f"{url}/metrics").text.count("self_speculation_in_flight 0.0") == 1
    assert set(total) <= {"answer", "stream", "gone", 400, 429}
    for number, status in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 0)):
        with serving(*flags, port=url.rpartition(":")[2]) as (script, *_):
            total += storm(100, seed=int(number), half_way=partial(script.send_signal, number))
            assert script.wait() == status
    assert sum(total.values()) == 1000
    assert total["no connection"]
