"""The protocol over HTTP, by OpenAI's client and by hand, on a tiny model in this process."""

import codecs
import contextlib
import json
import re
import threading
from unittest.mock import Mock

import openai
import pytest
import requests
import torch
from conftest import generate
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from servers import (
    CHAT,
    HELLO,
    TEMPLATE,
    Served,
    chunks,
    held,
    post,
    raw_request,
    refused,
    send,
    tiny_generator,
    until,
)
from tokenizers.processors import TemplateProcessing

from self_speculation import GenerationStrategyResult
from serving.engine import ClientDisconnected, QueueFull, RequestTimeout, ServerShutdown
from serving.metrics import FinishedRequest, Metrics, figures

LONG = [{"role": "user", "content": "x y z " * 60}]
PROMPTS = ["def add(a, b):", "Once upon a time", "Human: who", "café"]


def streamed(served, path="completions", **request):
    """The first choice of each chunk."""
    return [chunk["choices"][0] for chunk in chunks(post(served, path, **request, stream=True))]


def test_a_chat_gets_the_generators_answer(served, monkeypatch):
    """Streamed or not. Guards against another template, special tokens before it, and lost characters."""
    special = [("<s>", served.generator.tokenizer.bos_token_id)]
    first_special = TemplateProcessing("<s> $A", special_tokens=special)
    monkeypatch.setattr(served.generator.tokenizer.backend_tokenizer, "post_processor", first_special)
    request = {"messages": HELLO, "max_tokens": 20}
    answer = post(served, CHAT, **request).json()
    ChatCompletion.model_validate(answer)
    prompt = served.generator.encode("user: Hello\nassistant:", special_tokens=False)
    expected = served.expected(prompt, max_steps=20)
    [whole] = answer["choices"]
    assert whole["message"] == {"role": "assistant", "content": expected, "refusal": None}
    assert whole["finish_reason"] in ("stop", "length")
    parts = chunks(post(served, CHAT, **request, stream=True))
    for chunk in parts:
        ChatCompletionChunk.model_validate(chunk)
        assert "usage" not in chunk
    assert len({chunk["id"] for chunk in parts}) == 1
    first, *deltas = [chunk["choices"][0]["delta"] for chunk in parts]
    assert first == {"role": "assistant", "content": ""}
    assert "".join(delta.pop("content") for delta in deltas) == expected
    assert not any(deltas)
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in parts]
    assert reasons == [None] * len(deltas) + [whole["finish_reason"]]
    roles = [part["index"] for part in streamed(served, CHAT, **request, n=2) if "role" in part["delta"]]
    assert sorted(roles) == [0, 1]


def test_the_client_of_openai(served):
    """Guards against missing fields of the client's types, fields that the client sends back, and a base URL
    without /v1 that does not work, as it does with llama.cpp.
    """
    Model.model_validate(served.client.models.list().data[0].model_dump())
    create = served.client.with_options(base_url=served.url).chat.completions.create  # without /v1
    request = {"model": "tiny", "temperature": 0, "user": "Eve"}
    answer = create(**request, messages=HELLO)
    conversation = [*HELLO, answer.choices[0].message.model_dump(), *HELLO]  # many of the fields are null
    following = create(**request, messages=conversation)
    assert following.usage.prompt_tokens_details.cached_tokens >= answer.usage.prompt_tokens
    with pytest.raises(openai.BadRequestError) as error:
        create(**request, messages=HELLO, presence_penalty=3)
    assert error.value.param == "presence_penalty"
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        create(model="large", messages=HELLO)


def test_choices_come_in_the_order_of_prompts(served):
    """Guards against choices in the order in which they finish."""
    answer = post(served, prompt=PROMPTS[:2], n=2, max_tokens=9).json()
    Completion.model_validate(answer)
    assert [choice["index"] for choice in answer["choices"]] == list(range(4))


def test_an_answer_that_ignores_its_end(served):
    """The end id is never picked, as in llama.cpp; other biases stay. Guards also against an error for a byte
    order mark.
    """
    [other] = served.generator.encode("x", special_tokens=False)
    bias = {str(served.generator.tokenizer.eos_token_id): 100, str(other): 50}
    for ignored, reason, number in ((False, "stop", 1), (True, "length", 9)):
        body = {"prompt": "x", "max_tokens": 9, "logit_bias": bias, "ignore_eos": ignored}
        answer = send(served, codecs.BOM_UTF8 + json.dumps(body).encode()).json()
        assert answer["choices"][0]["finish_reason"] == reason
        assert answer["usage"]["completion_tokens"] == number
        assert answer["choices"][0]["text"] == "x" * number * ignored


def test_logprobs_are_those_of_the_model(served):
    """Against one pass of transformers. Guards against logits of the draft or of a neighbouring position, and
    against tokens of a stop word, which is not part of the answer.
    """
    prompt = served.generator.encode(PROMPTS[0])
    ids = generate(served.generator.model, prompt, max_steps=30).predicted_tokens
    with torch.inference_mode():
        scores = served.generator.model(torch.tensor([[*prompt, *ids]])).logits[0].log_softmax(-1)
    text = served.expected(prompt, max_steps=30)
    request = {"prompt": PROMPTS[0], "max_tokens": 30, "stop": [text[6:9], "never there"], "logprobs": 3}
    [answer] = post(served, **request).json()["choices"]
    assert (answer["text"], answer["finish_reason"]) == (text[: text.index(text[6:9])], "stop")
    logprobs = answer["logprobs"]
    assert "".join(logprobs["tokens"]).startswith(answer["text"])
    assert all(offset < len(answer["text"]) for offset in logprobs["text_offset"])
    for i, logprob in enumerate(logprobs["token_logprobs"]):
        row = scores[len(prompt) + i - 1]
        assert logprob == pytest.approx(float(row[ids[i]]), abs=1e-3)
        assert max(logprobs["top_logprobs"][i].values()) == pytest.approx(float(row.max()), abs=1e-3)
    parts = streamed(served, **request)
    assert "".join(part["text"] for part in parts) == answer["text"]
    assert [token for part in parts for token in part["logprobs"]["tokens"]] == logprobs["tokens"]

    request = {"messages": HELLO, "logprobs": True, "top_logprobs": 2, "max_tokens": 10}
    [choice] = post(served, CHAT, **request).json()["choices"]
    tokens = choice["logprobs"]["content"]
    assert "".join(token["token"] for token in tokens) == choice["message"]["content"]
    assert all(len(token["top_logprobs"]) == 2 for token in tokens)


def counters(served):
    """What /metrics says, by name."""
    lines = requests.get(f"{served.url}/metrics").text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


def test_figures_of_answers_and_counters(served):
    """In an answer, the last chunk of a stream that asks for usage, and /metrics. Guards against streams that
    are not counted, and rejected requests that are.
    """
    prompt = served.generator.encode("def never_said_before():")
    request = {"prompt": prompt, "max_tokens": 20}
    before = counters(served)
    first, second = (post(served, **request).json() for _ in range(2))
    options = {"include_usage": True}
    *chunks_of_text, last = chunks(post(served, **request, stream=True, stream_options=options))
    post(served, prompt=prompt, max_tokens=0)
    after = counters(served)
    assert all(chunk["usage"] is None for chunk in chunks_of_text)
    assert last["choices"] == []
    answers = (first, second, last)
    cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers]
    assert cached[0] < cached[1] == cached[2] == len(prompt) - 1
    for answer in answers:
        usage = answer["usage"]
        metrics = answer["metrics"]
        counts = (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"])
        assert counts == (len(prompt), 20, len(prompt) + 20)
        assert min(metrics["tokens_per_second"], metrics["time_to_first_token"]) > 0
        drafts = metrics["speculative_decoding"]
        source = drafts["by_source"]["exit 2"]
        assert 0 < drafts["accepted"] < drafts["drafted"] == drafts["accepted"] / drafts["acceptance_rate"]
        assert (source["drafted"], source["accepted"]) == (drafts["drafted"], drafts["accepted"])
        assert drafts["mean_accepted_length"] > 1

    def vllm(name, *labels):
        labels = ",".join(sorted(['engine="0"', 'model_name="tiny"', *labels]))
        return after[f"vllm:{name}{{{labels}}}"] - before.get(f"vllm:{name}{{{labels}}}", 0)

    drafts = [answer["metrics"]["speculative_decoding"] for answer in answers]
    per_position = "spec_decode_num_accepted_tokens_per_pos_total"
    by_position = [vllm(per_position, f'position="{i}"') for i in range(3)]
    times = ("time_to_first_token", "e2e_request_latency", "request_queue_time", "request_prefill_time")
    times += ("request_decode_time", "request_time_per_output_token")
    for name, number in (
        *((f"{name}_seconds_count", 3) for name in times),
        ("request_prompt_tokens_sum", 3 * len(prompt)),
        ("request_generation_tokens_sum", 60),
        ("generation_tokens_total", 60),
        ("prompt_tokens_total", 3 * len(prompt)),
        ("prefix_cache_queries_total", 3 * len(prompt)),
        ("prefix_cache_hits_total", sum(cached)),
        ("spec_decode_num_draft_tokens_total", sum(each["drafted"] for each in drafts)),
        ("spec_decode_num_accepted_tokens_total", sum(each["accepted"] for each in drafts)),
        ("spec_decode_num_accepted_tokens_total", sum(by_position)),
        *((name, 0) for name in ("num_requests_waiting", "num_requests_running", "kv_cache_usage_perc")),
    ):
        assert vllm(name) == number, name
    assert vllm("request_success_total", 'finished_reason="length"') == 3
    assert 0 < vllm("inter_token_latency_seconds_count") < 60  # rounds with drafts
    assert 0 < vllm("inter_token_latency_seconds_sum") < vllm("e2e_request_latency_seconds_sum")
    refused = 'self_speculation_refused_total{status="400"}'
    assert after[refused] - before.get(refused, 0) == 1
    assert vllm("spec_decode_num_drafts_total") >= by_position[0] > 0


def test_figures_of_choices():
    """Guards against the times of a batch's rows that add up, a prompt that counts for each choice, and times
    to a token that never came.
    """
    times = {"num_prompt_tokens": 7, "num_decode_tokens": 10, "decode_time": 2.0}
    job = Mock(arrival_time=1.0, admission_time=2.0, request=Mock(reader=Mock(num_thinking=0)))
    choice = FinishedRequest(job, GenerationStrategyResult([5] * 11, **times))
    found = figures([choice, choice], 2)
    assert found["metrics"]["tokens_per_second"] == 20 / 2.0
    assert (found["usage"]["prompt_tokens"], found["usage"]["completion_tokens"]) == (7, 22)
    metrics = Metrics(Mock(waiting=[], in_flight=[], cache_usage=0), "tiny", log_requests=False)
    metrics.count(job, GenerationStrategyResult([], stop_reason="cancelled"), ClientDisconnected())
    labels = {"model_name": "tiny", "engine": "0"}
    assert metrics.registry.get_sample_value("vllm:time_to_first_token_seconds_count", labels) == 0


def test_drafts_can_be_streamed_and_switched_off(served):
    """Guards against drafts that stay pending, and the target's characters that count as accepted."""
    request = {"prompt": PROMPTS[1], "max_tokens": 30}
    text = served.expected(PROMPTS[1], max_steps=30)
    parts = streamed(served, **request, stream_drafts=True)
    accepted = "".join(part["text"][: part["draft"]["accepted"]] for part in parts)
    assert "".join(part["text"] for part in parts) == text
    assert 0 < len(accepted) < len(text)
    assert all(part["draft"]["accepted"] in (0, len(part["text"])) for part in parts)
    assert any(part["draft"]["pending"] for part in parts)
    assert parts[-1]["draft"]["pending"] == ""

    drafts = post(served, **request, drafts=False).json()["metrics"]["speculative_decoding"]
    assert drafts["drafted"] == 0


def test_a_log_of_requests(text_model, byte_tokenizer, capsys, monkeypatch):
    """Guards against an answer, an error or a client that disconnects which no line names, against lines that
    a client writes, long ones, and a line for each request with the same unknown field. Guards against a
    server that ends because a disk is full, or a program that read the lines is gone.
    """
    with Served(tiny_generator(text_model, byte_tokenizer), log_requests=True) as served:
        for _ in range(2):
            fields = {"frobnicate": 1, "a\nb": 2, **{f"{'y' * 40}{i}": 0 for i in range(9)}}
            send(served, json.dumps({"prompt": "x", "max_tokens": 3, **fields}), **{"X-Request-Id": "mine"})
        post(served, prompt="x", max_tokens=0)
        requests.get(f"{served.url}/v1/a%0Ab{'/x' * 500}")
        with held(served.engine, num_steps=2) as at_rest:
            with raw_request(served.url, {"prompt": "x", "max_tokens": 200, "stream": True}):
                assert at_rest.wait(60)
                (job,) = served.engine.in_flight
            until(job.is_cancelled.is_set)
        until(lambda: not served.num_jobs)
        ignored, first, second, invalid, missing, gone = capsys.readouterr().err.splitlines()
        with contextlib.suppress(OSError), open("/dev/full", "w") as full:
            monkeypatch.setattr("sys.stderr", full)
            answers = [post(served, prompt="x", max_tokens=3, unknown=1) for _ in range(2)]
            monkeypatch.undo()
    assert [answer.status_code for answer in answers] == [200, 200]
    assert ignored.startswith("requests have fields that this server ignores: a\\nb, frobnicate, yyyy")
    assert (len(ignored), len(missing)) == (200, 200)
    for line in (first, second):
        answer = (
            r"\S+ POST /v1/completions mine: max_steps, 3 tokens in \S+ s, the first after \S+ s; prompt 1 "
        )
        assert re.match(answer, line)
    assert re.match(r"\S+ POST /v1/completions \w{32}: 400, max_tokens 0: ", invalid)
    assert re.match(r"\S+ GET /v1/a\\nb(/x){30}", missing)
    assert re.match(r"\S+ POST /v1/completions \w{32}: 499, the client has disconnected$", gone)


TOO_LONG = "maximum context length is 256 tokens"


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        (
            b'{"prompt": "x", "structured_outputs": {"regex": "("}}',
            None,
            "response_format, structured_outputs",
        ),
        (b"{", None, "the body: must be JSON: EOF"),
        (b"[1]", None, "the body: must be an object"),
        (b"[" * 100_000, None, ""),
        (b'{"\\ud800": 1}', None, ""),
        (b'{"prompt": [99999]}', None, "the prompt has the token id 99999"),
        (b'{"prompt": "x", "logit_bias": {"99999": 1}}', "logit_bias", "must be by token ids below"),
        (b'{"prompt": "x", "echo": true}', "echo", "this server does not have it, leave it out"),
        (b'{"prompt": ["x", "y", "z"], "n": 3}', "n", "n 3: must be at most 4 answers"),
        (json.dumps({"prompt": [5] * 256}).encode(), "prompt", TOO_LONG),
        (json.dumps({"prompt": "x y " * 1000}).encode(), "prompt", TOO_LONG),
        (json.dumps({"messages": LONG}).encode(), "messages", TOO_LONG),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_error_names_the_fault(served, body, param, says, stream):
    """Also of a stream. Guards against tracebacks, HTML, and status 200."""
    if stream:
        body = body.replace(b"{", b'{"stream": true, ', 1)
    response = send(served, body, CHAT if b"messages" in body else "completions")
    error = response.json()["error"]
    assert response.status_code == 400
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert says in error["message"]
    # Clients shorten a prompt if they know this code.
    assert (error["code"] == "context_length_exceeded") == (says == TOO_LONG)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ x.y.z }}", "the chat template fails: "),
    ],
)
def test_a_template_that_refuses_messages_or_variables(served, monkeypatch, template, says):
    """Guards against a status 500."""
    monkeypatch.setattr(served.generator.tokenizer, "chat_template", template)
    assert says in refused(served, CHAT, messages=HELLO, chat_template_kwargs={"x": 0})


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status"),
    [(QueueFull, 429), (ServerShutdown, 503), (RequestTimeout, 504), (ZeroDivisionError, 500)],
)
def test_an_aborted_request_has_a_status(served, monkeypatch, error, status, stream):
    """Guards against an aborted request that looks like an answer."""

    def submit(jobs):
        if error is QueueFull:
            raise error("later")
        jobs[0].on_finish(error("later"))

    monkeypatch.setattr(served.engine, "submit", submit)
    response = post(served, prompt=PROMPTS[0], stream=stream)
    assert response.status_code == status
    assert response.json()["error"]["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    assert response.headers.get("Retry-After") == ("1" if status in (429, 503) else None)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("is_waiting", [False, True])
def test_a_client_that_disconnects_cancels_its_job(served, stream, is_waiting):
    """Guards against sequences that decode although their client is gone, against requests and tokens that
    nobody counts, and one that counts twice.
    """
    gone = 'self_speculation_refused_total{status="499"}'
    tokens = 'vllm:generation_tokens_total{engine="0",model_name="tiny"}'
    before = counters(served)
    with held(served.engine, num_steps=0 if is_waiting else 3) as at_rest:
        if is_waiting:
            for prompt in PROMPTS:
                threading.Thread(target=post, args=(served,), kwargs={"prompt": prompt}).start()
            until(lambda: served.num_jobs == 4)
        with raw_request(served.url, {"prompt": PROMPTS[0], "max_tokens": 200, "stream": stream}):
            until(lambda: served.num_jobs == 1 + 4 * is_waiting)
            assert at_rest.wait(60)
            usage = counters(served)['vllm:kv_cache_usage_perc{engine="0",model_name="tiny"}']
            assert (0 < usage < 0.2) == (not is_waiting)
            job = [*served.engine.in_flight, *served.engine.waiting][-1]
            assert job.timeout == served.args.max_time
        until(job.is_cancelled.is_set)
    until(lambda: not served.num_jobs)
    after = counters(served)
    assert after[gone] == before.get(gone, 0) + 1
    assert after[tokens] - before[tokens] > 1
    assert post(served, prompt="x", max_tokens=3).status_code == 200


def test_a_failure_in_a_stream_is_its_last_event(served, monkeypatch):
    """Guards against a stream that ends as if the answer was whole, and an engine that ends with it. The
    client raises the error.
    """
    with held(served.engine, num_steps=1) as at_rest:  # which prefills
        stream = served.client.completions.create(model="tiny", prompt=PROMPTS[0], max_tokens=50, stream=True)
        next(iter(stream))
        assert at_rest.wait(60)

        def broken(_):
            monkeypatch.undo()
            raise torch.OutOfMemoryError("out of memory")

        monkeypatch.setattr(served.engine._scheduler._strategy, "decode_round", broken)
    with pytest.raises(openai.APIError, match="out of memory; less takes a shorter prompt"):
        list(stream)
    assert post(served, prompt="x").status_code == 200


def test_one_model_is_found_by_its_name(served):
    """Guards against clients that look for a model at the model's path."""
    assert served.client.models.retrieve("tiny") == served.client.models.list().data[0]
    with pytest.raises(openai.NotFoundError, match="model 'a/b': this server has 'tiny'"):
        served.client.models.retrieve("a/b")


def test_text_to_token_ids_and_back(served):
    """As in vLLM. Guards against other ids than those of prompts: special tokens, a template, tools."""

    def converted(path, **request):
        response = requests.post(f"{served.url}/{path}", json=request, timeout=60)
        return response.json() if response.ok else response.json()["error"]["message"]

    generator = served.generator
    text = converted("tokenize", prompt="caf\u00e9 x", return_token_strs=True)
    ids = generator.encode("caf\u00e9 x")
    strings = generator.tokenizer.convert_ids_to_tokens(ids)
    assert text == {"count": len(ids), "max_model_len": 256, "tokens": ids, "token_strs": strings}
    bare = converted("v1/tokenize", prompt="x", add_special_tokens=False)
    assert bare["tokens"] == generator.encode("x", special_tokens=False)
    chat = converted("tokenize", messages=HELLO, model="tiny")
    rendered = "user: Hello\nassistant:"
    assert (chat["tokens"], chat["token_strs"]) == (generator.encode(rendered, special_tokens=False), None)
    assert post(served, CHAT, messages=HELLO, max_tokens=1).json()["usage"]["prompt_tokens"] == chat["count"]
    assert converted("detokenize", tokens=chat["tokens"]) == {"prompt": rendered}
    assert "must be one of them" in converted("tokenize")
    assert "this server has 'tiny'" in converted("tokenize", prompt="x", model="large")
    assert "at most 256 ids" in converted("detokenize", tokens=[5] * 257)
    assert "the token id 99999" in converted("detokenize", tokens=[99999])
    assert TOO_LONG in converted("tokenize", prompt="x y " * 1000)


@pytest.mark.parametrize("path", ["v1/chat/completions", "v1/completions", "v1/responses", "tokenize"])
def test_a_body_of_too_many_values_is_never_parsed(served, monkeypatch, path):
    """Guards against a path that parses them."""
    monkeypatch.setattr("pydantic.BaseModel.model_validate_json", None)
    body = b'{"x": [' + b"[]," * 100_000 + b"[]]}"
    answer = requests.post(
        f"{served.url}/{path}", body, headers={"Content-Type": "application/json"}, timeout=60
    )
    assert (answer.status_code, "100000 texts, lists and objects" in answer.text) == (400, True)


def test_a_request_says_whether_its_prompt_has_special_tokens(served, monkeypatch):
    """As in vLLM. Guards against a field that was ignored, which changes each prompt of Llama."""
    encoded = []
    encode = type(served.generator).encode
    monkeypatch.setattr(
        served.generator,
        "encode",
        lambda prompt, *special: (
            encoded.append((prompt, *special)) or encode(served.generator, prompt, *special)
        ),
    )
    for field in ({}, {"add_special_tokens": False}, {"add_special_tokens": True}):
        post(served, prompt="x", max_tokens=1, **field).raise_for_status()
        post(served, CHAT, messages=HELLO, max_tokens=1, **field).raise_for_status()
    texts = [special for prompt, *special in encoded if isinstance(prompt, str)]
    assert texts == [[True], [False], [False], [False], [True], [True]]


def test_the_last_message_can_be_continued(served, monkeypatch):
    """Guards against the beginning of another message before the continuation, and a text that is lost."""
    begun = [*HELLO, {"role": "assistant", "content": "The capital"}]
    request = {"messages": begun, "max_tokens": 9, "continue_final_message": True}
    template = TEMPLATE.replace("assistant:", "{% if add_generation_prompt %}assistant:{% endif %}")
    monkeypatch.setattr(served.generator.tokenizer, "chat_template", template)
    prompts = []
    encode = type(served.generator).encode
    monkeypatch.setattr(
        served.generator,
        "encode",
        lambda text, *args: prompts.append(text) or encode(served.generator, text, *args),
    )
    whole = post(served, CHAT, **request).json()["choices"][0]["message"]["content"]
    assert prompts[0] == "user: Hello\nassistant: The capital"
    ids = encode(served.generator, prompts[0], special_tokens=False)
    assert whole == served.expected(ids, max_steps=9)
    parts = streamed(served, CHAT, **request, add_generation_prompt=False)
    assert "".join(part["delta"]["content"] for part in parts) == whole
    post(served, CHAT, messages=begun, max_tokens=1, add_generation_prompt=False)
    assert "user: Hello\nassistant: The capital\n" in prompts
    monkeypatch.setattr(served.generator.tokenizer, "chat_template", "{{ messages[0].content }}{# content #}")
    assert "the chat template cannot continue" in refused(served, CHAT, **request)
