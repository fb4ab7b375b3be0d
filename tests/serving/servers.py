"""Servers in threads of the test's process, over tiny models; engines that a test can hold."""

import contextlib
import copy
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import requests
import uvicorn
from conftest import config_of, generator_of
from openai import OpenAI

from serving.answers import ServedModel
from serving.app import App
from serving.engine import Engine
from serving.flags import ServeArguments
from serving.http11 import StrictProtocol

GREEDY = config_of(max_steps=12, exit_layer=2, num_speculations=3, reuse_cache=True)
CHAT = "chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


def tiny_generator(model, tokenizer, config=GREEDY):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE
    return generator_of(tokenizer, model, config.generation_strategy)


class Running(Engine):
    """An engine in a thread."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._has_succeeded = ThreadPoolExecutor(1).submit(self.run)

    def stop(self):
        """Return whether the engine worked to the end."""
        self.shut_down(0)
        return self._has_succeeded.result()


class Served:
    """A server with an engine and a client."""

    def __init__(self, generator, config=GREEDY, batch_size=4, **args):
        self.generator = generator
        self.config = config
        self.args = ServeArguments(**args)
        self.engine = Running(generator, config, batch_size, self.args.max_waiting)
        served = ServedModel(generator, self.engine, config, self.args, "tiny")
        self.app = App(served, self.args.host)
        config = uvicorn.Config(self.app, self.args.host, 0, http=StrictProtocol, log_config=None)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)

    def __enter__(self):
        self._thread.start()
        until(lambda: self._server.started)
        self.url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"
        self.client = OpenAI(base_url=f"{self.url}/v1", api_key=self.args.api_key or "none", max_retries=0)
        return self

    def __exit__(self, *_):
        self.client.close()
        self._server.should_exit = True
        self._thread.join()
        assert self.engine.stop()

    @property
    def num_jobs(self):
        return len(self.engine.in_flight) + len(self.engine.waiting)

    def expected(self, prompt, max_steps):
        """The text of autoregressive decoding, greedy and alone."""
        alone = generator_of(self.generator.tokenizer, self.generator.model)
        return alone.generate(prompt, config_of(max_steps=max_steps)).decoded_prediction


def send(served, body, path="completions", **headers):
    headers = {"Content-Type": "application/json", **headers}
    return requests.post(f"{served.url}/v1/{path}", data=body, headers=headers, timeout=60)


def post(served, path="completions", **request):
    return requests.post(f"{served.url}/v1/{path}", json=request, timeout=60)


def refused(served, path="completions", **request):
    """The message of an error 400."""
    response = post(served, path, **request)
    assert response.status_code == 400
    return response.json()["error"]["message"]


def chunks(response):
    """The objects of a stream."""
    *chunks, last = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert last == "[DONE]", last
    return [json.loads(chunk) for chunk in chunks]


def until(condition):
    """Wait for another thread."""
    while not condition():
        time.sleep(0.005)


@contextlib.contextmanager
def raw_request(url, request):
    """Send a request for completions; yields the connection."""
    body = json.dumps(request).encode()
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=120) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(body) + body
        )
        yield connection


@contextlib.contextmanager
def held(engine, num_steps=0):
    """Hold the engine after so many steps."""
    go_on = threading.Event()
    at_rest = threading.Event()
    step = engine._scheduler.step
    left = iter(range(num_steps))

    def wait():
        if next(left, None) is None:
            at_rest.set()
            go_on.wait()
        step()

    engine._scheduler.step = wait
    try:
        yield at_rest
    finally:
        engine._scheduler.step = step
        go_on.set()
