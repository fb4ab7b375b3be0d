"""Tools of OpenAI's protocol: what a model may call, the grammar of a call, and calls found in an answer.

A chat template tells the format of calls: `<tool_call>` tags around a JSON object (Hermes, Qwen), or a JSON
object alone (Llama 3).
"""

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from transformers import PreTrainedTokenizerBase

from self_speculation.decoding.grammar import Grammar, json_rule
from self_speculation.decoding.texts import Tag

_BEGIN = re.compile(r"<tool_call>\s*")
_END = re.compile(r"\s*</tool_call>")
_decoder = json.JSONDecoder()


def call_grammar(
    tools: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    name: str | None = None,
    answer: str | None = None,
    several: bool = False,
) -> Grammar:
    """The language of one call of the function of this name; None: of any of them.

    Args:
        tools: each with `function`: its `name`, and `parameters`, a JSON schema.
        tokenizer: its chat template knows tools.
        answer: what may come in place of a call, in Lark; "": any text, also before calls.
        several: allow several calls, where they have tags.
    """
    chat_template, is_tagged = tokenizer.chat_template, "<tool_call>" in tokenizer.chat_template
    functions = [tool["function"] for tool in tools if name in (None, tool["function"]["name"])]
    key = "parameters" if not is_tagged and '"parameters"' in chat_template else "arguments"
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": function["name"]},
                # The id makes references within these parameters, such as #/$defs/City, start here.
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
    begin, end = (Tag.of(text, tokenizer) for text in ("<tool_call>", "</tool_call>"))
    before = "(?s:.*)" if answer == "" else r"\n?"
    found = (
        f"begin[lazy]: /{before}{begin.text}/"
        if begin.id is None
        else f"begin: /{before}/ {begin.in_grammar}"
    )
    rules += [found, f'call: begin "\\n" json "\\n" {end.in_grammar}', f"json: {json_call}"]
    return Grammar.lark("\n".join(rules))


def find_calls(text: str, tools: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The calls of these functions in an answer: `name`, and `arguments` as JSON. Empty if it has none, or
    something that is no call.
    """
    names = [tool["function"]["name"] for tool in tools]
    calls = []
    for call in _objects(text):
        if not isinstance(call, dict) or call.get("name") not in names:
            return []
        arguments = call.get("arguments", call.get("parameters", {}))
        calls.append({"name": call["name"], "arguments": json.dumps(arguments)})
    return calls


def _objects(text: str) -> list[Any]:
    """The JSON that an answer is, or that it has between tags; empty if anything else is between tags. An
    unfinished part at the end does not count. JSON tells where it ends: its strings may hold tags.
    """
    with suppress(ValueError, RecursionError):
        return [json.loads(text)]
    found, position = list[Any](), 0
    with suppress(ValueError, RecursionError):
        while (begin := _BEGIN.search(text, position)) and _END.search(text, begin.end()):
            content, position = _decoder.raw_decode(text, begin.end())
            if not _END.match(text, position):
                return []
            found.append(content)
        return found
    return []
