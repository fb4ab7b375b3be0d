"""serve.py as a process: flags, clients, signals."""

import contextlib
import json
import re
import signal
import socket
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import forks
import openai
import pytest
import requests
from conftest import ROOT
from helpers import refused, write_program
from openai import OpenAI
from servers import raw_request

import serve

FLAGS = [
    "--generation_strategy", "self_speculative", "--exit_layer", "3", "--num_speculations", "3",
    "--batch_size", "4",
]  # fmt: skip


@contextlib.contextmanager
def serving(*args, port=0, env=None, lines=None, program=ROOT / "serve.py"):
    """Run the script. Yields the process, the model's name and the URL. `lines` gets standard error."""
    with tempfile.TemporaryFile() as stderr:
        flags = [*FLAGS, "--port", port, *args]
        script = forks.Fork(program, *flags, stderr=stderr.fileno(), env=env)
        try:
            while not (found := re.search(r'serving (\S+) at (http://[^\s"]+)["\n]', forks.read(stderr))):
                assert script.poll() is None, forks.read(stderr)
                time.sleep(0.01)
            yield script, found[1], found[2]
            printed = forks.read(stderr)
            assert "Traceback" not in printed, printed
            assert script.poll() != 0 or "the server has ended" in printed.splitlines()[-1], printed
            if lines is not None:
                lines += printed.splitlines()
        finally:
            script.end()


def test_a_server_from_its_start_to_its_end():
    """Two clients, then SIGTERM during a stream. Guards against faults of imports, signals and exit status,
    which a server in the test's process does not show.
    """
    with serving() as (script, name, url):
        assert name == "python-10m"
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        request = {"model": name, "prompt": "def parse_header(line):", "temperature": 0, "max_tokens": 40}
        whole = client.completions.create(**request).choices[0]
        with raw_request(url, {"prompt": "def", "max_tokens": 9}) as connection:
            assert connection.recv(4096).startswith(b"HTTP/1.1 200 OK\r\n")
        assert requests.get(f"{url}/health").json() == {"status": "ok"}
        stream = client.completions.create(**request, stream=True)
        text = next(stream).choices[0].text
        script.send_signal(signal.SIGTERM)
        text += "".join(chunk.choices[0].text for chunk in stream)
        assert text == whole.text
        assert script.wait() == 0
        with pytest.raises(openai.APIConnectionError):
            client.models.list()


WITHOUT_SANDBOX = """
from unittest.mock import patch
import serve
from self_speculation.text.grammar_sandbox import GrammarSandbox
with patch.object(GrammarSandbox, "_start", side_effect=BrokenPipeError):
    sys.exit(serve.main())
"""


def test_a_machine_that_is_too_busy_for_grammars(tmp_path):
    """Guards against a server that does not start because the process that tries grammars does not answer."""
    with serving(program=write_program(tmp_path, WITHOUT_SANDBOX)) as (script, _, url):
        body = {"prompt": "def", "max_tokens": 3}
        assert requests.post(f"{url}/v1/completions", json=body, timeout=60).ok
        schema = {"structured_outputs": {"json": {"type": "object"}}}
        answer = requests.post(f"{url}/v1/completions", json=body | schema, timeout=60)
        assert answer.status_code == 503
        script.send_signal(signal.SIGTERM)
        assert script.wait() == 0


WITHOUT_HTTP = """
from unittest.mock import patch
import serve
from runs.program import run
with patch("uvicorn.Server.run", side_effect=RuntimeError("can't start new thread")):
    run(serve.main)
"""


def test_a_server_that_cannot_listen_does_not_serve(tmp_path):
    """Guards against the line `serving` of a server that answers nobody, and one that does not end."""
    with tempfile.TemporaryFile() as stderr:
        script = forks.Fork(
            write_program(tmp_path, WITHOUT_HTTP), *FLAGS, "--port", 0, stderr=stderr.fileno()
        )
        assert script.wait() == 1
        (line,) = [line for line in forks.read(stderr).splitlines() if not line.startswith("other programs")]
        assert line.startswith("program.py: error: out of memory; less takes")


# So many MB of addresses are left when the flags are read.
LIMITED = """
import resource
import psutil, torch, transformers
import serve
from runs.program import run
most = psutil.Process().memory_info().vms + int(sys.argv.pop(1)) * 10**6
resource.setrlimit(resource.RLIMIT_AS, (most, most))
run(serve.main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("megabytes", [*range(50, 901, 50)])
def test_a_server_with_few_addresses_answers_or_ends(megabytes, tmp_path):
    """With `ulimit -v`. Guards against SIGABRT by a library in Rust, and a server that hangs because a thread
    could not begin.
    """
    program = write_program(tmp_path, LIMITED)
    with tempfile.TemporaryFile() as stderr:
        script = forks.Fork(program, megabytes, *FLAGS, "--port", 0, stderr=stderr.fileno())
        try:
            until = time.monotonic() + forks.HANGS
            while not (found := re.search(r"serving \S+ at (\S+)", forks.read(stderr))):
                assert time.monotonic() < until
                if script.poll() is not None:
                    printed = forks.read(stderr)
                    assert (script.poll(), printed.count("error: out of memory")) == (1, 1), printed
                    assert "Traceback" not in printed
                    return
                time.sleep(0.01)
            body = {"prompt": "def f(x):\n    return x\n" * 60, "max_tokens": 20}

            def status(number):
                request = {**body, "seed": number, "structured_outputs": {"regex": "[a-z]+"}}
                return requests.post(
                    f"{found[1]}/v1/completions", json=request, timeout=forks.HANGS
                ).status_code

            with ThreadPoolExecutor(4) as threads:
                assert {*threads.map(status, range(8))} <= {200, 500, 503}
            assert requests.get(f"{found[1]}/health", timeout=60).ok
            script.send_signal(signal.SIGTERM)
            assert script.wait() == 0
        finally:
            script.end()


def test_flags_by_variables_and_lines_as_objects():
    """Guards against a variable that is not read or wins over the flag, and a line that is no object."""
    variables = {"API_KEY": "sesame", "SERVED_NAME": "mine", "LOG_FORMAT": "json", "LOG_REQUESTS": "true"}
    env = {f"SELF_SPECULATION_{name}": value for name, value in {**variables, "MAX_WAITING": "7"}.items()}
    lines = []
    with serving("--served_name", "yours", env=env, lines=lines) as (script, name, url):
        assert name == "yours"
        assert requests.get(f"{url}/v1/models").status_code == 401
        headers = {"Authorization": "Bearer sesame", "X-Request-Id": "a b"}
        body = {"prompt": "def", "max_tokens": 3}
        assert requests.post(f"{url}/v1/completions", json=body, headers=headers, timeout=60).ok
        script.send_signal(signal.SIGTERM)
        assert script.wait() == 0
    found = [json.loads(line) for line in lines]
    assert all({"time", "message"} <= each.keys() for each in found)
    refused, answered = [each for each in found if "request_id" in each]
    assert (refused["method"], refused["path"], refused["status"]) == ("GET", "/v1/models", 401)
    assert (answered["path"], answered["request_id"]) == ("/v1/completions", "a b")
    assert (answered["completion_tokens"], answered["finish_reason"]) == (3, "length")
    assert answered["latency"] >= answered["time_to_first_token"] > 0


def test_a_second_signal_aborts_long_requests_with_an_error(endless_folder):
    """Until then /health says 503. Guards against SIGHUP that ends all answers, a server that waits for ever,
    a stream that just stops, and one that refuses connections while it still answers, which looks like a
    crash.
    """
    with serving("--model", endless_folder, "--shutdown_time", 600) as (script, name, url):
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        stream = client.completions.create(model=name, prompt="x", max_tokens=90_000, stream=True)
        next(stream)
        script.send_signal(signal.SIGHUP)
        while (health := requests.get(f"{url}/health")).status_code == 200:
            time.sleep(0.01)
        assert (health.status_code, health.json()) == (503, {"status": "shutting down"})
        next(stream)
        script.send_signal(signal.SIGINT)
        with pytest.raises(openai.APIError, match="the server shuts down"):
            list(stream)
        assert script.wait() == 0


@pytest.mark.parametrize("device", ["cpu", "split"])
def test_the_server_is_one_process(device, capsys, monkeypatch):
    """Guards against processes that load a model and then wait for a port, and one that waits for another
    process.
    """
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("serve.socket", None)
    line = refused(serve.main, ["--device", device], capsys)
    assert "torchrun: serve.py is one process; for a model on several cards: --device split" in line
    monkeypatch.setenv("RANK", "1")
    assert serve.main(["--device", device]) == 2
    assert capsys.readouterr().err == ""


def test_a_limit_below_the_default(capsys, monkeypatch):
    """Guards against a server whose default it refuses itself."""
    monkeypatch.setattr("serve.socket", None)
    line = refused(serve.main, ["--max_answer_tokens", "5"], capsys)
    assert "--max_answer_tokens 5: must be at least --max_steps (512)" in line


def test_a_port_that_is_taken(capsys, monkeypatch):
    """Guards against a model that is loaded before the port is asked for."""
    monkeypatch.setattr("runs.startup.load_generator", None)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        line = refused(serve.main, ["--port", str(port)], capsys)
    assert f"error: --host 127.0.0.1 --port {port}: Address already in use" in line
