"""Calls of tools: a grammar of what may be called, and calls found in answers."""

import json

import jsonschema
import pytest

import self_speculation
from self_speculation import GenerationConfig, HuggingfaceLlamaGenerator, Request, make_strategy
from serving.tools import call_grammar, find_calls, known_format

TAGS, OBJECT = "{% if tools %}<tool_call>{% endif %}", '{% if tools %}{"name": , "parameters": }{% endif %}'
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 6},
        "days": {"type": "integer", "maximum": 9, "minimum": 0},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": WEATHER}},
    {
        "type": "function",
        "function": {"name": "stop", "parameters": {"type": "object", "additionalProperties": False}},
    },
    *(
        {
            "type": "function",
            "function": {
                "name": name,
                "parameters": {
                    "type": "object",
                    "properties": {"place": {"$ref": "#/$defs/Place"}},
                    "required": ["place"],
                    "additionalProperties": False,
                    "$defs": {"Place": {"enum": [f"{name}1", f"{name}2", None]}},
                },
            },
        }
        for name in ("north", "south")
    ),
]


def test_the_template_tells_the_format():
    assert known_format(TAGS) == "tags"
    assert known_format(OBJECT) == "object"
    assert known_format("{{ messages }}") is known_format(None) is None


@pytest.mark.parametrize("template", [TAGS, OBJECT])
@pytest.mark.parametrize("name", [None, "weather", "stop", "south"])
def test_a_guided_answer_is_a_call(template, name):
    """Guards against references in the parameters of one function that lead to those of another."""
    model, tokenizer = self_speculation.load_model_and_tokenizer(self_speculation.default_model())
    strategy = make_strategy("self_speculative")
    generator = HuggingfaceLlamaGenerator(tokenizer, model, strategy)
    config = GenerationConfig(sample=False, max_steps=200, exit_layer=3, num_speculations=4)
    requests = [Request("call = ", grammar=call_grammar(TOOLS, template, name))]
    ((_, result),) = generator.generate_batch(requests, config)
    (call,) = find_calls(result.decoded_prediction, TOOLS)
    assert name in (None, call["name"])
    schema = next(
        tool["function"]["parameters"] for tool in TOOLS if tool["function"]["name"] == call["name"]
    )
    jsonschema.validate(json.loads(call["arguments"]), schema)


def test_calls_are_found():
    call = '{"name": "weather", "arguments": {"city": "Rome", "days": 2}}'
    expected = {"name": "weather", "arguments": '{"city": "Rome", "days": 2}'}
    assert find_calls(f"<tool_call>\n{call}\n</tool_call>", TOOLS) == [expected]
    assert (
        find_calls(f"<tool_call>{call}</tool_call>\n<tool_call>{call}</tool_call>", TOOLS) == [expected] * 2
    )
    assert find_calls(call.replace("arguments", "parameters"), TOOLS) == [expected]
    others = ["It is sunny.", "{}", "[1]", "[" * 9999, '{"name": "unknown"}', '{"name": []}']
    for text in (*others, "<tool_call>{</tool_call>"):
        assert find_calls(text, TOOLS) == []
