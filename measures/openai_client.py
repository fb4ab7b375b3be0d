"""A client of OpenAI's protocol for servers of any kind: what an answer has, and one kind of error."""

import json
from collections.abc import Iterator
from typing import Any

import requests

from arguments import JSONObject
from data import one_line


class ServerError(Exception):
    """A server's answer that is an error or no answer at all; the message is one line."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class Server:
    """A server of OpenAI's protocol.

    Raises ServerError, also by `ask`: no answer, an error status, or an answer that is not of the protocol.
    """

    def __init__(self, url: str, key: str | None, timeout: float) -> None:
        self._url = url.rstrip("/").removesuffix("/v1") + "/v1/"
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._timeout = timeout

    def models(self) -> list[str]:
        """The names of the models."""
        try:
            return [each["id"] for each in self._send("models").json()["data"]]
        except (KeyError, TypeError, ValueError) as error:
            raise ServerError(f"not of OpenAI's protocol ({one_line(error)})") from error

    def ask(self, path: str, body: JSONObject) -> JSONObject:
        """The only choice of the answer, with `usage` and the like; a stream is put together."""
        answer = JSONObject(text="", tokens=[], finish_reason=None)
        try:
            with self._send(path, body) as response:
                for chunk in _chunks(response) if body.get("stream") else [response.json()]:
                    _add(answer, chunk)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ServerError(f"not of OpenAI's protocol ({one_line(error)})") from error
        except requests.RequestException as error:
            raise ServerError(_innermost(error)) from error
        if not answer["finish_reason"]:
            raise ServerError("the answer has no end")
        return answer

    def _send(self, path: str, body: JSONObject | None = None) -> requests.Response:
        how: Any = {"headers": self._headers, "timeout": self._timeout, "stream": bool(body)}
        try:
            response = requests.request("POST" if body else "GET", self._url + path, json=body, **how)
        except requests.RequestException as error:
            raise ServerError(_innermost(error)) from error
        if not response.ok:
            said = " ".join(response.text.split())
            raise ServerError(f"status {response.status_code}: {said:.200}", response.status_code)
        return response


def _chunks(response: requests.Response) -> Iterator[JSONObject]:
    """The events of a stream."""
    for line in response.iter_lines():
        if line.startswith(b"data:") and (content := line.removeprefix(b"data:").strip()) != b"[DONE]":
            yield json.loads(content)


def _add(answer: JSONObject, chunk: JSONObject) -> None:
    """Add what an event of a stream, or a whole answer, has."""
    if error := chunk.get("error"):
        raise ServerError(str(error.get("message", error) if isinstance(error, dict) else error))
    answer |= {name: chunk[name] for name in ("usage", "metrics", "timings") if chunk.get(name)}
    for choice in chunk.get("choices", ()):
        message = choice.get("message") or choice.get("delta") or choice
        thinking = message.get("reasoning_content") or message.get("reasoning")
        answer["text"] += (thinking or "") + (message.get("content") or choice.get("text") or "")
        answer["tokens"] += _tokens(choice.get("logprobs") or {})
        answer["finish_reason"] = choice.get("finish_reason") or answer["finish_reason"]


def _innermost(error: BaseException) -> str:
    """What a library's error wraps: the reason of the system, such as a refused connection."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return one_line(error)


def _tokens(logprobs: JSONObject) -> list[tuple[str, float, dict[str, float]]]:
    """Text, log-probability and likely alternatives of each token of a choice, of a chat or a completion."""
    if (content := logprobs.get("content")) is not None:
        return [
            (
                each["token"],
                each["logprob"],
                {top["token"]: top["logprob"] for top in each.get("top_logprobs") or ()},
            )
            for each in content
        ]
    texts = logprobs.get("tokens") or []
    tops = logprobs.get("top_logprobs") or [{}] * len(texts)
    found = zip(texts, logprobs.get("token_logprobs") or (), tops, strict=False)
    return [(text, logprob, top or {}) for text, logprob, top in found if logprob is not None]
