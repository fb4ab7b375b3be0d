"""Tools of OpenAI's protocol: functions that a model may call, the grammar of a call, calls in an answer.

A chat template tells the format of calls: `<tool_call>` tags around a JSON object (Hermes, Qwen), or a JSON
object alone (Llama 3).
"""

import json
import re
import uuid
from collections.abc import Sequence
from contextlib import suppress

from transformers import PreTrainedTokenizerBase

from arguments import JSONObject
from self_speculation.text.grammar import Grammar, json_rule
from self_speculation.text.texts import Tag

_TAG = "<tool_call>"
# Without the look-behind, the time grows with the square of white space.
_BEGIN = re.compile(rf"(?<!\s)\s*{_TAG}\s*")
_BEGIN_OR_OBJECT = re.compile(rf"{_BEGIN.pattern}|\A\s*(?={{)")
# A call up to the arguments, which are an object or a list.
_HEAD = re.compile(r'\{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=[{[])')
# Ends or opens something in JSON; an escaped character does not.
_MARK = re.compile(r'\\.|["{}\[\]]', re.DOTALL)
_DECODER = json.JSONDecoder()


def call_grammar(
    tools: Sequence[JSONObject],
    tokenizer: PreTrainedTokenizerBase,
    name: str | None = None,
    answer: str | None = None,
    several: bool = False,
) -> Grammar:
    """Return the grammar of one call of the function `name`; None: of any function.

    Args:
        tools: each has a `function` with `name` and `parameters`, a JSON schema.
        tokenizer: has a chat template that knows tools.
        answer: the rule in Lark of an answer in place of a call; "": any text, also before calls.
        several: allow several calls, if calls have tags.
    """
    chat_template = tokenizer.chat_template
    is_tagged = _TAG in chat_template
    functions = [tool["function"] for tool in tools if name in (None, tool["function"]["name"])]
    key = "parameters" if not is_tagged and '"parameters"' in chat_template else "arguments"
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": function["name"]},
                # With an id, references within the parameters, such as #/$defs/City, start here.
                key: {"$id": f"urn:tool:{index}", **(function.get("parameters") or {"type": "object"})},
            },
            "required": ["name", key],
            "additionalProperties": False,
        }
        for index, function in enumerate(functions)
    ]
    json_call = json_rule({"anyOf": calls})
    any_text = "/(?s:.*)/" if is_tagged else r"/(?s:\s*[^{\s].*)?/"
    rules = [f"start: call{'+' * (several and is_tagged)}{' | other' * (answer is not None)}"]
    rules += [f"other: {answer or any_text}"] * (answer is not None)
    if not is_tagged:
        return Grammar.lark("\n".join([*rules, f"call: {json_call}"]))
    begin, end = (Tag.of(text, tokenizer) for text in (_TAG, "</tool_call>"))
    before = "(?s:.*)" if answer == "" else r"\n?"
    found = (
        f"begin[lazy]: /{before}{begin.text}/"
        if begin.id is None
        else f"begin: /{before}/ {begin.in_grammar}"
    )
    rules += [found, f'call: begin "\\n" json "\\n" {end.in_grammar}', f"json: {json_call}"]
    return Grammar.lark("\n".join(rules))


def _function(content: object, tools: Sequence[JSONObject]) -> dict[str, str] | None:
    """Return a call of a tool. None: the content is no call."""
    if not isinstance(content, dict) or content.get("name") not in [
        tool["function"]["name"] for tool in tools
    ]:
        return None
    arguments = content.get("arguments", content.get("parameters", {}))
    return {"name": content["name"], "arguments": json.dumps(arguments)}


class _JSONEnd:
    """Finds the end of an object or a list in JSON that grows. Reads each character once."""

    def __init__(self) -> None:
        self._num_read = 0
        self._depth = 0
        self._in_string = False

    def find(self, text: str, start: int = 0) -> int | None:
        """Return the end of the brackets that begin at `start` or later. None: they are not closed yet."""
        for mark in _MARK.finditer(text, max(start, self._num_read)):
            self._num_read = mark.end()
            if mark[0] == '"':
                self._in_string = not self._in_string
            elif not self._in_string and mark[0] in "{[":
                self._depth += 1
            elif not self._in_string and mark[0] in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return mark.end()
        # The second half of an escape may come next.
        self._num_read = max(self._num_read, len(text) - text.endswith("\\"))
        return None


class CallReader:
    """Finds calls in an answer as the text comes, and passes on arguments as they grow. Text before the first
    call is text, and so is an object that calls no tool. After a call there are only calls. A call begins
    with the name and ends with the arguments, closed or not: what comes next, a tag or nothing, changes
    nothing. So pieces of any size give the text and the calls of the whole answer.
    """

    def __init__(self, tools: Sequence[JSONObject], several: bool) -> None:
        self._tools = tools
        self._several = several
        self.num_calls = 0
        self._held = ""  # text that may be a call, or the arguments so far of an unfinished call
        self._json_end = _JSONEnd()
        self._num_sent: int | None = None  # characters of arguments that are passed on; None: no open call
        self._is_start = True
        self._may_call = True

    def read(self, new: str, is_last: bool) -> tuple[str, list[JSONObject]]:
        """Return new text of the answer, and deltas of calls. The first delta of a call has an id. A whole
        answer has one delta for each call.
        """
        self._held += new
        texts = list[str]()
        deltas = list[JSONObject]()
        while self._take(texts, deltas):
            pass
        if is_last and not self.num_calls:
            texts.append(self._held)
        return "".join(texts), deltas

    def _take(self, texts: list[str], deltas: list[JSONObject]) -> bool:
        """Take decided text or a delta of a call. False: the rest needs more text."""
        if self._num_sent is not None:
            return self._grow(self._num_sent, deltas)
        begin = (
            (_BEGIN_OR_OBJECT if self._is_start else _BEGIN).search(self._held) if self._may_call else None
        )
        end = begin.start() if begin else self._num_decided()
        if text := self._held[:end]:
            self._is_start = False
            if not self.num_calls:
                texts.append(text)
        self._held = self._held[end:]
        return self._begin_call(begin.end() - end, texts, deltas) if begin else False

    def _num_decided(self) -> int:
        """Return the number of characters before a tag that may begin at the end of the held text."""
        if not self._may_call:
            return len(self._held)
        start = self._held.rfind("<")
        is_tag = start >= 0 and _TAG.startswith(self._held[start:])
        return len(self._held[: start if is_tag else None].rstrip())

    def _begin_call(self, start: int, texts: list[str], deltas: list[JSONObject]) -> bool:
        """Begin the call whose JSON starts at `start`. Take a complete call if arguments do not come last."""
        is_tagged = _BEGIN.match(self._held) is not None
        call: object = None
        end = 0
        head = _HEAD.match(self._held, start)
        if head and _function({"name": head[1]}, self._tools):
            call = {"name": head[1]}
            end = head.end()
        elif self._json_end.find(self._held, start) is None:
            return False
        else:
            with suppress(ValueError, RecursionError):
                call, end = _DECODER.raw_decode(self._held, start)
        self._json_end = _JSONEnd()
        if (function := _function(call, self._tools)) is None:
            self._is_start = False
            self._may_call = not is_tagged  # tags may follow an object that is no call
            if self._may_call:
                texts.append(self._held[:end])
                self._held = self._held[end:]
            return True
        if head:
            function["arguments"] = ""
        call_id = f"call_{uuid.uuid4().hex}"
        deltas.append({"index": self.num_calls, "id": call_id, "type": "function", "function": function})
        self.num_calls += 1
        self._held = self._held[end:]
        self._num_sent = 0 if head else None
        self._is_start = False
        self._may_call = bool(head) or self._several
        return True

    def _grow(self, num_sent: int, deltas: list[JSONObject]) -> bool:
        """Pass on more arguments of the last call. Returns whether the call ends."""
        end = self._json_end.find(self._held)
        index = self.num_calls - 1
        arguments = self._held[num_sent:end]
        if deltas and deltas[-1]["index"] == index:
            deltas[-1]["function"]["arguments"] += arguments
        elif arguments:
            deltas.append({"index": index, "function": {"arguments": arguments}})
        self._num_sent = None if end else len(self._held)
        if end:
            self._held = self._held[end:]
            self._may_call = self._several
            self._json_end = _JSONEnd()
        return end is not None
