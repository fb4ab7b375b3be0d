"""Tools of OpenAI's protocol: what a model may call, the grammar of a call, and calls found in an answer.

A chat template tells the format of calls: `<tool_call>` tags around a JSON object (Hermes, Qwen), or a JSON
object alone (Llama 3).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from self_speculation.decoding.grammar import Grammar, schema_text
from self_speculation.decoding.texts import Tag

_TAGGED = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)


def call_grammar(
    tools: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, name: str | None = None
) -> Grammar:
    """The language of one call of the function of this name; None: of any of them.

    Args:
        tools: each with `function`: its `name`, and `parameters`, a JSON schema.
        tokenizer: its chat template knows tools.
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
    schema = {"anyOf": calls}
    if not is_tagged:
        return Grammar.json_schema(schema)
    begin, end = (Tag.of(text, tokenizer).in_grammar for text in ("<tool_call>", "</tool_call>"))
    return Grammar.lark(f'start: {begin} "\\n" call "\\n" {end}\ncall: %json {schema_text(schema)}')


def find_calls(text: str, tools: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The calls of these functions in an answer: `name`, and `arguments` as JSON. Empty if it has none, or
    something that is no call.
    """
    names = [tool["function"]["name"] for tool in tools]
    calls = []
    for part in _TAGGED.findall(text) or [text]:
        try:
            call = json.loads(part)
        except (ValueError, RecursionError):
            return []
        if not isinstance(call, dict) or call.get("name") not in names:
            return []
        arguments = call.get("arguments", call.get("parameters", {}))
        calls.append({"name": call["name"], "arguments": json.dumps(arguments)})
    return calls
