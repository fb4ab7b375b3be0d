"""Calls of tools: a grammar of what may be called, and calls found in answers."""

import json

import jsonschema
import pytest

import self_speculation
from self_speculation import GenerationConfig, HuggingfaceLlamaGenerator, Request, make_strategy
from serving.tools import call_grammar, find_calls, known_format

TAGS, OBJECT = "{% if tools %}<tool_call>{% endif %}", '{% if tools %}{"name": , "parameters": }{% endif %}'


def tool(name, defs=None, **properties):
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    schema |= {"additionalProperties": False, "$defs": defs or {}}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


PLACE = {"$ref": "#/$defs/Place"}
TOOLS = [
    tool("weather", city={"type": "string", "maxLength": 6}, days={"type": "integer", "maximum": 9}),
    tool("stop"),
    tool("north", {"Place": {"enum": ["north1", "north2", None]}}, place=PLACE),
    tool("south", {"Place": {"enum": ["south1", "south2", None]}}, place=PLACE),
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
    generator = HuggingfaceLlamaGenerator(tokenizer, model, make_strategy("self_speculative"))
    config = GenerationConfig(sample=False, max_steps=200, exit_layer=3, num_speculations=4)
    result = generator.generate(Request("call = ", grammar=call_grammar(TOOLS, template, name)), config)
    (call,) = find_calls(result.decoded_prediction, TOOLS)
    assert name in (None, call["name"])
    [schema] = [t["function"]["parameters"] for t in TOOLS if t["function"]["name"] == call["name"]]
    jsonschema.validate(json.loads(call["arguments"]), schema)


def test_calls_are_found():
    call = '{"name": "weather", "arguments": {"city": "Rome", "days": 2}}'
    expected = {"name": "weather", "arguments": '{"city": "Rome", "days": 2}'}
    assert find_calls(f"<tool_call>\n{call}\n</tool_call>", TOOLS) == [expected]
    assert find_calls(f"<tool_call>{call}</tool_call>" * 2, TOOLS) == [expected] * 2
    assert find_calls(call.replace("arguments", "parameters"), TOOLS) == [expected]
    others = ["It is sunny.", "{}", "[1]", "[" * 9999, '{"name": "unknown"}', '{"name": []}']
    for text in (*others, "<tool_call>{</tool_call>"):
        assert find_calls(text, TOOLS) == []
