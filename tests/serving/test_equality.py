"""equality.py against servers in this process: this one, and ones that are unequal, fail, or know less."""

import csv
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from helpers import custom_data, only_run, refused, write_program
from servers import Served, tiny_generator

import equality
from measures.equality import first_difference, share_interval


class Peer(BaseHTTPRequestHandler):
    """A server of another maker. `answer` gives the status and the text for a request's fields and number;
    without a status the connection is closed.
    """

    answer = staticmethod(lambda asked, count: (200, f"ab{count % 2}"))
    has_logprobs = True
    key = None
    count = 0

    def log_message(self, *_):
        pass

    def _reply(self, status, body):
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        allowed = self.key in (None, self.headers.get("Authorization"))
        self._reply(200 if allowed else 401, {"data": [{"id": "peer"}]})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if "logprobs" in asked and not self.has_logprobs:
            self._reply(400, {"error": {"message": "no logprobs\nhere"}})
            return
        if asked["max_tokens"] == 2:  # the client tries what the server knows
            status, text = self.answer(asked, 0) if "drafts" in asked else (200, "a")
        else:
            type(self).count += 1
            status, text = self.answer(asked, self.count)
        if status is None:
            return
        logprobs = {"tokens": [*text], "token_logprobs": [-0.7] * len(text)}
        logprobs["top_logprobs"] = [{each: -0.7, "0": -0.7, "1": -0.8} for each in text]
        choice = {"text": text, "finish_reason": "stop", "logprobs": logprobs if self.has_logprobs else None}
        self._reply(status, {"choices": [choice], "usage": {"completion_tokens": len(text)}})


@pytest.fixture
def peer():
    """Start a peer; returns the address."""
    servers = []

    def start(**changes):
        kind = type("ChangedPeer", (Peer,), changes)
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), kind))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def answering(answer):
    return {"answer": staticmethod(answer)}


@pytest.fixture
def flags(tmp_path):
    data = ["--dataset", "custom_jsonl", "--data_path", custom_data(tmp_path), "--num_samples", "6"]
    return [*data, "--output_dir", str(tmp_path / "logs"), "--max_steps", "8", "--clients", "3"]


GREEDY = ["--picking", "greedy", "--ways"]


def results(tmp_path):
    """The summary, and the rows of answers."""
    folder = only_run(tmp_path)
    with open(folder / "answers.csv", encoding="utf-8") as file:
        return json.loads((folder / "equality.json").read_text()), [*csv.DictReader(file)]


@pytest.mark.parametrize("chat", ["False", "True"])
def test_this_server_answers_equally_in_every_way(chat, text_model, byte_tokenizer, flags, tmp_path, capsys):
    """Guards against a way that is not asked, text of a stream that is put together wrongly, and drafts that
    stay on.
    """
    with Served(tiny_generator(text_model, byte_tokenizer)) as served:
        status = equality.main([*flags, "--url", served.url, "--chat", chat])
    output = capsys.readouterr().out
    assert status == 0, output
    summary, rows = results(tmp_path)
    assert len(summary["pairs"]) == 30
    assert all(pair["equal"] == pair["compared"] == 6 for pair in summary["pairs"])
    assert len({row["text"] for row in rows}) > 6  # sampled answers are others
    drafted = {way["way"]: way["drafted"] for way in summary["ways"] if way["picking"] == "greedy"}
    assert drafted["no_drafts"] == drafted["no_drafts_together"] == 0
    assert min(drafted["alone"], drafted["stream"], drafted["together"]) > 0
    assert not summary["remarks"]
    assert "\ngreedy, alone / no_drafts                           6 of 6   100.0%" in output
    assert (only_run(tmp_path) / "equality.png").stat().st_size > 10_000


def test_a_near_tie_is_told_from_a_difference(peer, flags, tmp_path, capsys):
    """Guards against a tool that always finds equality, near-ties that count as equal, and a gap that is not
    the tokens'.
    """
    url = peer(**answering(lambda _, count: (200, f"ab{int(count > 6)}")))
    assert equality.main([*flags, "--url", url, *GREEDY, "alone", "again"]) == 1
    (pair,) = results(tmp_path)[0]["pairs"]
    assert (pair["compared"], pair["equal"], pair["near_ties"]) == (6, 0, 6)
    found = pair["differences"][0]
    assert (found["character"], found["token"], found["tokens"]) == (2, 2, ["0", "1"])
    assert found["gap"] == pytest.approx(0.1)
    assert "greedy, prompt 0, character 2: near-tie, log-probabilities 0.10 apart" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("status", "why"), [(500, "status 500: "), (None, "Remote end closed connection without response")]
)
def test_an_answer_that_errs_is_a_row(status, why, peer, flags, tmp_path, capsys):
    """Guards against a run that ends at the first error, and errors that count as equal answers."""
    url = peer(**answering(lambda _, count: (status if count == 3 else 200, "x")))
    assert equality.main([*flags, "--url", url, *GREEDY, "alone", "together"]) == 1
    summary, rows = results(tmp_path)
    assert [bool(row["error"]) for row in rows] == [index == 2 for index in range(12)]
    assert (summary["pairs"][0]["compared"], summary["pairs"][0]["equal"]) == (5, 5)
    assert f"answers are missing: 1, the first one by: {why}" in capsys.readouterr().err


def test_a_stream_that_is_none_gives_no_answers(peer, flags, tmp_path, capsys):
    """Guards against empty texts that are equal to each other, and a picture of nothing."""
    assert equality.main([*flags, "--url", peer(), *GREEDY, "alone", "stream"]) == 1
    summary, rows = results(tmp_path)
    assert {row["error"] for row in rows if row["way"] == "stream"} == {"the answer has no end"}
    assert summary["pairs"][0]["compared"] == 0
    assert "no answers" in capsys.readouterr().out


def test_a_server_without_log_probabilities_or_drafts(peer, flags, tmp_path, capsys):
    """Guards against a run that ends where a server knows less than this one."""
    knows_no_drafts = answering(lambda asked, _: (400 if "drafts" in asked else 200, "x"))
    url = peer(has_logprobs=False, **knows_no_drafts)
    assert equality.main([*flags, "--url", url, *GREEDY, "alone", "again", "no_drafts"]) == 0
    output = capsys.readouterr().out
    assert "note: the server refuses log-probabilities (status 400: " in output
    assert 'note: no ways without drafts: the server refuses --no_drafts {"drafts": false}' in output
    (pair,) = results(tmp_path)[0]["pairs"]
    assert (pair["equal"], pair["near_ties"]) == (6, None)


def test_a_key_that_is_refused(peer, flags, tmp_path, capsys, monkeypatch):
    """Guards against a traceback, a key in the records, and a key that is not sent."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    url = peer(key="Bearer secret", **answering(lambda *_: (200, "x")))
    line = refused(equality.main, [*flags, "--url", url], capsys)
    assert f"--api_key: the server at {url} refuses the key (status 401" in line
    assert equality.main([*flags, "--url", url, "--api_key", "secret", *GREEDY, "alone", "again"]) == 0
    assert "secret" not in (only_run(tmp_path) / "equality.json").read_text()


def test_the_interval_of_a_share():
    """Guards against an interval without width at 0 and 1; numbers of Wilson's formula."""
    assert share_interval(200, 200) == (pytest.approx(0.98665, abs=1e-4), 1.0)
    assert share_interval(0, 10) == (0.0, pytest.approx(0.2129, abs=1e-3))
    assert share_interval(5, 10) == (pytest.approx(0.2693, abs=1e-3), pytest.approx(0.7307, abs=1e-3))


def test_an_answer_that_ends_earlier_differs():
    """Guards against a prefix that counts as equal."""
    found = first_difference({"text": "ab", "tokens": []}, {"text": "abc", "tokens": []})
    assert (found["character"], found["texts"], found["gap"]) == (2, ["", "c"], None)
    assert first_difference({"text": "ab", "tokens": []}, {"text": "ab", "tokens": []}) is None


def test_it_needs_no_torch(tmp_path, peer, flags):
    """Guards against a client that loads what only models need."""
    flags += ["--url", peer(**answering(lambda *_: (200, "x"))), *GREEDY, "alone", "again"]
    code = (
        f"import equality\nassert equality.main({flags!r}) == 0\n"
        "print({'torch', 'transformers', 'pandas', 'datasets'} & {*sys.modules})\n"
    )
    program = [sys.executable, write_program(tmp_path, code)]
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
