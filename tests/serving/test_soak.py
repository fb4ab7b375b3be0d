"""Many clients at once, good and bad ones: every answer is right or refused, none is lost, nothing stays."""

import gc
import json
import random
import signal
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import psutil
import pytest
import requests
from servers import GREEDY, Served, raw_request, tiny_generator, until
from test_serve import serving

from self_speculation import HuggingfaceLlamaGenerator, load_model_and_tokenizer, make_strategy
from serving.engine import Job

PROMPTS = ["def add(a, b):", "Once upon a time", "class Stop:", "Human: who are you?", "café", "return a + b"]
MALFORMED = [
    b"",
    b"{",
    b"[]",
    b'{"prompt": 5}',
    b'{"prompt": "x", "tools": [1]}',
    b'{"prompt": "x", "n": -1}',
]
LONG = "x y " * 500


class Storm:
    """Requests against a server, by so many clients at once.

    Args:
        generator: answers as the server should, alone.
    """

    def __init__(self, url, generator, clients):
        self.url, self._generator, self._clients = url, generator, clients
        self._expected, self._lock = {}, threading.Lock()

    def __call__(self, number, seed, half_way=lambda: None):
        """Number of requests by what came of them; something else happens half way."""
        order = random.Random(seed)
        kinds = ["answer", "answer", "stream", "stream", "gone", "malformed", "long"]
        chosen = [(order.choice(kinds), order.choice(PROMPTS), order.randint(1, 24)) for _ in range(number)]

        def done(place):
            if place == number // 2:
                half_way()
            return self._one(*chosen[place])

        with ThreadPoolExecutor(self._clients) as clients:
            return Counter(clients.map(done, range(number)))

    def _one(self, kind, prompt, max_tokens):
        said = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": kind == "stream"}
        try:
            if kind == "gone":
                return self._leave({**said, "max_tokens": 200, "stream": max_tokens % 2 == 0})
            if kind == "malformed":
                return self._refused(MALFORMED[max_tokens % len(MALFORMED)])
            if kind == "long":
                return self._refused(json.dumps({**said, "prompt": LONG}).encode())
            response = self._post(json.dumps(said).encode())
            if response.status_code != 200:
                return self._status(response)
            text, status = self._text(response)
            if status:
                return status
            assert text == self._answer(prompt, max_tokens), (prompt, max_tokens)
            return kind
        except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError, ConnectionError):
            return "no connection"

    def _post(self, body):
        headers = {"Content-Type": "application/json"}
        return requests.post(f"{self.url}/v1/completions", data=body, headers=headers, timeout=120)

    def _text(self, response):
        """What an answer says, or a stream; and instead of a text what went wrong on the way."""
        if "event-stream" not in response.headers["Content-Type"]:
            return response.json()["choices"][0]["text"], None
        *chunks, last = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
        if last != "[DONE]":
            return None, json.loads(last)["error"]["message"]
        return "".join(json.loads(chunk)["choices"][0]["text"] for chunk in chunks), None

    def _status(self, response):
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        assert response.status_code in (429, 503), response.text
        return response.status_code

    def _refused(self, body):
        response = self._post(body)
        if response.status_code != 400:
            return self._status(response)
        return "refused"

    def _leave(self, said):
        """Ask, and go away before the answer, or in it."""
        with raw_request(self.url, said) as connection:
            if said["stream"]:
                connection.recv(100)
        return "gone"

    def _answer(self, prompt, max_tokens):
        with self._lock:
            if (prompt, max_tokens) not in self._expected:
                config = GREEDY.__class__(sample=False, max_steps=max_tokens)
                answer = self._generator.generate(prompt, config).decoded_prediction
                self._expected[prompt, max_tokens] = answer
            return self._expected[prompt, max_tokens]


def test_forty_requests_at_once(text_model, byte_tokenizer):
    """Guards against jobs that are kept for ever, and against whatever only many clients bring about."""
    with Served(tiny_generator(text_model, byte_tokenizer), batch_size=3, max_waiting=4) as served:
        alone = HuggingfaceLlamaGenerator(
            served.generator.tokenizer, text_model, make_strategy("autoregressive")
        )
        outcomes = Storm(served.url, alone, clients=12)(40, seed=1)
        assert sum(outcomes.values()) == 40
        assert set(outcomes) <= {"answer", "stream", "gone", "refused", 429}
        assert outcomes["answer"]
        assert outcomes["stream"]
        until(lambda: not served.num_jobs)
    gc.collect()
    assert [thing for thing in gc.get_objects() if type(thing) is Job] == []


@pytest.mark.slow
def test_a_thousand_requests_a_signal_and_a_kill_in_between(model_folder):
    """Guards against memory that grows with every request, and answers that are lost when a server ends: each
    is right, refused, or ends with its connection.
    """
    model, tokenizer = load_model_and_tokenizer(str(model_folder))
    alone = HuggingfaceLlamaGenerator(tokenizer, model, make_strategy("autoregressive"))
    flags = ["--model", model_folder, "--exit_layer", "2", "--max_waiting", "8"]
    total = Counter()
    with serving(*flags) as (script, _, url):
        storm = Storm(url, alone, clients=16)
        total += storm(300, seed=1)
        before = psutil.Process(script.pid).memory_info().rss
        total += storm(500, seed=2)
        assert psutil.Process(script.pid).memory_info().rss - before < 30e6
        assert requests.get(f"{url}/metrics").text.count("self_speculation_in_flight 0.0") == 1
    assert set(total) <= {"answer", "stream", "gone", "refused", 429}
    for number, status in ((signal.SIGTERM, 0), (signal.SIGKILL, -signal.SIGKILL)):
        with serving(*flags, port=url.rpartition(":")[2]) as (script, *_):
            total += storm(100, seed=int(number), half_way=partial(script.send_signal, number))
            assert script.wait() == status
    assert sum(total.values()) == 1000
    assert total["no connection"]
