"""One request, from the body to the answer: prompts, a job of the engine for each choice, and the text."""

import asyncio
import itertools
import math
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from threading import Event

from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from arguments import JSONObject
from self_speculation import GenerationConfig, GenerationStrategyResult, HuggingfaceLlamaGenerator, Request
from self_speculation.models.families import context_length
from self_speculation.text.grammar import short_json
from self_speculation.text.texts import Thinking
from serving.engine import Engine, Job
from serving.errors import APIError
from serving.fields import check_number_of_values
from serving.flags import ServeArguments
from serving.metrics import FinishedRequest, Origin, figures
from serving.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from serving.responses import ResponsesRequest
from serving.streaming import Delta, DeltaStreamer, DraftDeltaStreamer, LogprobCollector
from serving.tools import CallReader

RequestKind = type[ChatRequest | CompletionRequest | ResponsesRequest]
_SEEDS = 2**63
_TOOL_CHARACTERS = 8  # most characters of the tools' JSON for each token of the context


@dataclass(frozen=True)
class ServedModel:
    """A model, the engine that runs it, and the defaults of fields that requests leave out."""

    generator: HuggingfaceLlamaGenerator
    engine: Engine
    config: GenerationConfig
    args: ServeArguments
    name: str

    def check_name(self, name: str) -> None:
        """Raises APIError if a client means another model."""
        if name != self.name:
            message = f"model {name!r}: this server has {self.name!r}"
            raise APIError(message, 404, "model", "model_not_found")


@dataclass
class _Choice:
    """One choice of an answer and the job that generates it."""

    index: int
    job: Job
    logprobs: LogprobCollector | None
    call_reader: CallReader | None
    finished: FinishedRequest | None = None


class Answer:
    """The answer to a request: call `parse`, `submit`, `chunks`. `parse` and `submit` raise the errors of an
    invalid request, and take long for a long one.
    """

    def __init__(self, served: ServedModel, origin: Origin) -> None:
        self._served = served
        self._generator = served.generator
        self._origin = origin
        self._arrival_time = time.perf_counter()
        self._loop = asyncio.get_running_loop()
        # The index of a choice, with new text, the result or the error.
        self._events = asyncio.Queue[tuple[int, Delta | GenerationStrategyResult | Exception]]()
        self._choices = list[_Choice]()
        self._is_cancelled = Event()

    def parse(self, kind: RequestKind, body: bytes) -> set[str]:
        """Read, check and tokenize the request. Returns the names of ignored fields."""
        generator = self._generator
        ignored = set[str]()
        check_number_of_values(body)
        client_request = kind.model_validate_json(body, context=ignored)
        self._writer = client_request.writer(self._served.name)
        request = client_request.chat if isinstance(client_request, ResponsesRequest) else client_request
        self.request = request
        prompt_field = client_request.prompt_field
        self._check()
        if isinstance(request, ChatRequest):
            prompts = [self._encode_chat(request, prompt_field, request.add_special_tokens)]
        else:
            encode = partial(self._encode, param=prompt_field, special_tokens=request.add_special_tokens)
            prompts = [Request(encode(prompt)) for prompt in request.prompt]
        config = request.generation_config(self._served.config)
        bias = dict(request.logit_bias)
        grammar = request.grammar(generator.tokenizer)
        if request.ignore_eos and grammar is None:
            bias |= dict.fromkeys(generator.eos_token_ids, -math.inf)
        prediction = request.prediction
        predicted = generator.encode_prediction(prediction.content, config) if prediction else None
        self.is_guided = grammar is not None
        shared = {"config": config, "logit_bias": bias, "drafts": request.drafts}
        shared |= {"prediction": predicted, "grammar": grammar}
        seed = secrets.randbelow(_SEEDS) if request.seed is None else request.seed
        self._requests = [
            replace(prompt, **shared, seed=(seed + nth) % _SEEDS)
            for prompt, nth in itertools.product(prompts, range(request.n))
        ]
        return ignored

    def convert(
        self, kind: type[TokenizeRequest | DetokenizeRequest], body: bytes, ignored: set[str]
    ) -> JSONObject:
        """Convert text to token ids, or back. Adds the names of ignored fields to `ignored`."""
        generator = self._generator
        context = context_length(self._generator.model.config)
        check_number_of_values(body)
        request = kind.model_validate_json(body, context=ignored)
        self._served.check_name(request.model or self._served.name)
        if isinstance(request, DetokenizeRequest):
            if (number := len(request.tokens)) > context:
                raise APIError(f"tokens: must have at most {context} ids, not {number}", param="tokens")
            ids = generator.encode(request.tokens)  # checks the ids
            return {"prompt": generator.tokenizer.decode(ids)}
        if request.prompt is None:
            ids = self._encode_chat(request.chat, "messages", request.add_special_tokens or False).prompt
        else:
            ids = self._encode(request.prompt, "prompt", request.add_special_tokens is not False)
        texts = generator.tokenizer.convert_ids_to_tokens(ids) if request.return_token_strs else None
        return {"count": len(ids), "max_model_len": context, "tokens": ids, "token_strs": texts}

    def submit(self) -> None:
        """Compile the grammar, and submit a job for each choice."""
        request = self.request
        generator = self._generator
        served = self._served
        max_time = served.args.max_time
        for index, choice_request in enumerate(self._requests):
            # A job does not refer to this object, so Python frees a finished answer at once.
            streamer = None
            logprobs = None
            emit = partial(_emit, self._loop, self._events, index)
            if request.stream:
                kind = DraftDeltaStreamer if request.stream_drafts else DeltaStreamer
                streamer = kind(generator.tokenizer, emit)
            prepared = generator.tokenize(replace(choice_request, streamer=streamer), served.config)
            if request.num_top_logprobs is not None:
                logprobs = LogprobCollector(generator.tokenizer, request.num_top_logprobs, prepared.reader)
                prepared = replace(prepared, stopping_criteria=logprobs)
            job = Job(prepared, emit, self._is_cancelled, max_time, self._arrival_time, origin=self._origin)
            self._choices.append(_Choice(index, job, logprobs, request.call_reader()))
        served.engine.submit([choice.job for choice in self._choices])

    def cancel(self) -> None:
        """End the jobs: the client is gone, also during `submit`, or has the whole answer."""
        self._is_cancelled.set()

    async def chunks(self) -> AsyncGenerator[str]:
        """Yield the answer as one JSON object, or as server-sent events."""
        async for choice, delta in self._deltas():
            formatted = self._format(choice, delta)
            if formatted and (chunk := self._writer.add(formatted)):
                yield chunk
        finished = [choice.finished for choice in self._choices if choice.finished]
        yield self._writer.end(figures(finished, self.request.n))

    async def _deltas(self) -> AsyncGenerator[tuple[_Choice, Delta]]:
        """Yield new text of the choices until all finish. The last text of a choice comes with `finished`;
        without a stream it is the whole text. Raises the error of a choice.
        """
        request = self.request
        unfinished = len(self._choices)
        while unfinished:
            index, event = await self._events.get()
            choice = self._choices[index]
            if isinstance(event, Exception):
                raise event
            if isinstance(event, Delta):
                yield choice, event
                continue
            unfinished -= 1
            delta = Delta("")
            if not request.stream:
                whole = choice.job.request.finish(event)
                delta = Delta(whole.decoded_prediction, thinking=whole.thinking)
            choice.finished = FinishedRequest(choice.job, event)
            yield choice, delta

    def _format(self, choice: _Choice, delta: Delta) -> JSONObject | None:
        """Format new text of a chunk, or the whole answer. Returns None while text may become a call."""
        is_last = choice.finished is not None
        stop_reason = choice.finished.result.stop_reason if choice.finished else None
        if choice.call_reader and (delta.text or is_last):
            text, calls = choice.call_reader.read(delta.text, is_last)
            if not (text or calls or is_last):
                return None
            accepted = min(delta.accepted, len(text))
            has_calls = choice.call_reader.num_calls > 0
            delta = delta._replace(text=text, accepted=accepted, calls=calls, has_calls=has_calls)
        logprobs = None
        if choice.logprobs:
            # A stop word is not part of the answer, and tokens of calls are not part of the text.
            is_whole = stop_reason not in (None, "stop_word") and not delta.has_calls
            logprobs = choice.logprobs.take(len(delta.text), is_whole)
        return self.request.choice(choice.index, delta, logprobs, stop_reason)

    def _check(self) -> None:
        request = self.request
        served = self._served
        served.check_name(request.model or served.name)
        num_prompts = 1 if isinstance(request, ChatRequest) else len(request.prompt)
        if num_prompts * request.n > (limit := served.engine.max_choices):
            param, number = ("n", request.n) if num_prompts <= limit else ("prompt", num_prompts)
            raise APIError.at(param, number, f"must be at most {limit} answers together, for all prompts")
        most = served.args.max_answer_tokens
        wanted = request.max_new_tokens
        if most is not None and wanted is not None and wanted > most:
            raise APIError.at("max_tokens", wanted, f"must be at most {most} on this server")
        size = self._generator.model.config.vocab_size
        if any(id_ >= size for id_ in request.logit_bias):
            raise APIError(f"logit_bias: must be by token ids below {size}", param="logit_bias")

    def _encode_chat(self, request: ChatRequest, param: str, special_tokens: bool) -> Request:
        """Encode the prompt by the chat template, which adds special tokens. Find how the answer thinks."""
        generator = self._generator
        args = self._served.args
        if not generator.tokenizer.chat_template:
            raise APIError(f"{param}: the model has no chat template, use /v1/completions", param=param)
        tools = request.tools_for_template
        most = _TOOL_CHARACTERS * context_length(generator.model.config)
        if short_json(tools, most) is None:
            message = f"tools: have more than the {most} characters that fit into this model's context"
            raise APIError(message, param="tools", code="context_length_exceeded")
        messages = [message.for_template for message in request.messages]
        kwargs = {**args.template_kwargs, **request.template_kwargs}
        continues = request.continue_final_message
        begins = not continues if request.add_generation_prompt is None else request.add_generation_prompt
        ending = {"add_generation_prompt": begins, "continue_final_message": continues}
        try:
            prompt = generator.render_chat(messages, kwargs, tools=tools or None, **ending)
        except ValueError as error:
            if not continues:
                raise
            problem = f"the chat template cannot continue this message: {error!s:.80}"
            raise APIError.at("continue_final_message", True, problem) from error
        thinking = Thinking.of(generator.tokenizer, prompt)
        return Request(self._encode(prompt, param, special_tokens), thinking=thinking)

    def _encode(self, prompt: str | list[int], param: str, special_tokens: bool) -> list[int]:
        generator = self._generator
        length = f"{len(prompt)} characters"
        context = context_length(generator.model.config)
        if isinstance(prompt, list) or not generator.is_far_too_long(prompt):
            ids = generator.encode(prompt, special_tokens)
            if len(ids) < context:
                return ids
            length = f"{len(ids)} tokens"
        message = f"{param}: this model's maximum context length is {context} tokens, the prompt has {length}"
        raise APIError(message, param=param, code="context_length_exceeded")


class AnswerResponse(StreamingResponse):
    """Submits a parsed answer and sends the chunks. The head goes out with the first chunk, so an earlier
    error sets the status. The end of the response cancels the jobs, also when the client disconnects.
    """

    def __init__(self, answer: Answer, submit: Callable[[Answer], Awaitable[None]]) -> None:
        self._answer = answer
        self._submit = submit
        self._is_whole = False
        media_type = "text/event-stream" if answer.request.stream else "application/json"
        super().__init__((), media_type=media_type)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.cancel()
        if not self._is_whole:
            raise ClientDisconnect("the client has disconnected")

    async def stream_response(self, send: Send) -> None:
        await self._submit(self._answer)
        has_begun = False
        async for chunk in self._answer.chunks():
            if not has_begun:
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            has_begun = True
            await send({"type": "http.response.body", "body": chunk.encode(), "more_body": True})
        self._is_whole = True
        await send({"type": "http.response.body", "body": b""})


def _emit(loop: asyncio.AbstractEventLoop, events: asyncio.Queue, index: int, event: object) -> None:
    with suppress(RuntimeError):  # the loop is closed
        loop.call_soon_threadsafe(events.put_nowait, (index, event))
