"""Calls of tools: a grammar of what may be called, and calls found in answers."""

import copy
import json
import random
from unittest.mock import Mock

import pytest
from conftest import LAYERS, config_of, generator_of, tiny_llama
from tokenizers import AddedToken, normalizers

from self_speculation import Request
from self_speculation.text.grammar import Grammar, GrammarProcessor
from serving import tools
from serving.tools import CallReader, call_grammar

TAGS = "{% if tools %}<tool_call>{% endif %}"
OBJECT = '{% if tools %}{"name": , "parameters": }{% endif %}'


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


def read(*pieces, several=True):
    """The text and the calls, name and arguments, of an answer that comes in pieces."""
    reader = CallReader(TOOLS, several)
    text = ""
    calls = []
    for number, piece in enumerate(pieces, 1):
        new, parts = reader.read(piece, number == len(pieces))
        text += new
        for part in parts:
            if "id" in part:
                calls.append({**part["function"]})
            else:
                calls[-1]["arguments"] += part["function"]["arguments"]
            assert part["index"] == len(calls) - 1
    assert reader.num_calls == len(calls)
    return text, calls


TAG_NAMES = ["<tool_call>", "</tool_call>"]
# Family -> tokenizer, added tokens that are special, and added tokens that are not.
FAMILIES = {
    "Qwen": ("byte_tokenizer", ["<|im_end|>"], TAG_NAMES),
    "Hermes": ("byte_tokenizer", ["<|im_end|>", *TAG_NAMES], []),
    "Llama 2": ("sentencepiece_tokenizer", [], []),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """A tokenizer, the special added tokens, and the other added tokens."""
    name, special, plain = FAMILIES[request.param]
    tokenizer = copy.deepcopy(request.getfixturevalue(name))
    if request.param == "Qwen":
        tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in plain])
    tokenizer.chat_template = TAGS
    return tokenizer, special, plain


def test_added_tokens_are_guided(family):
    """Guards against an answer in words where the grammar asks for a tag that is one token, for the text of a
    special token, or for letters that the tokenizer normalizes.
    """
    tokenizer, special, plain = family
    config = config_of(sample=True, max_steps=200, temperature=1.0, **LAYERS)
    model = tiny_llama(vocab_size=len(tokenizer) + 8)  # heads are often padded
    generator = generator_of(tokenizer, model, config.generation_strategy)

    def answer(grammar):
        result = generator.generate(Request([5, 6], grammar=grammar, seed=0), config)
        return result.decoded_prediction, result.generation_strategy_result.predicted_tokens

    called, ids = answer(call_grammar(TOOLS[1:2], tokenizer))
    assert read(called)[1]
    tags = [id_ for id_ in ids if id_ in tokenizer.get_added_vocab().values()]
    assert tokenizer.convert_ids_to_tokens(tags) == [tag for tag in TAG_NAMES if tag in special + plain]
    text = f"e\u0301{''.join(special + plain)}"
    assert json.loads(answer(Grammar.json_schema({"const": text}))[0]) == text
    assert answer(Grammar.lark(f"start: {json.dumps(text)}"))[0] == text
    for tag in special + plain:
        tagged, ids = answer(Grammar.lark(f'start: {tag} "x"'))
        assert (tagged, ids[0]) == (f"{tag}x", tokenizer.convert_tokens_to_ids(tag))


@pytest.mark.parametrize("template", [TAGS, OBJECT])
@pytest.mark.parametrize("added", [[], TAG_NAMES])
@pytest.mark.parametrize(
    ("name", "answer", "several"),
    [
        (None, None, False),
        ("south", None, False),
        (None, "", False),
        (None, "", True),
        (None, '"yes" | "no"', True),
    ],
)
def test_what_may_be_called_or_answered(byte_tokenizer, template, added, name, answer, several):
    """Guards against a call that text hides, arguments of none of the functions, references in the parameters
    of one that lead to those of another, and a second call where one may be.
    """
    tokenizer = copy.deepcopy(byte_tokenizer)
    is_tagged = template == TAGS
    is_free = answer == ""
    tokenizer.chat_template = template
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in added])
    grammar = call_grammar(TOOLS, tokenizer, name, answer, several)
    key = "arguments" if is_tagged else "parameters"

    def call(name, arguments):
        text = f'{{"name": "{name}", "{key}": {arguments}}}'
        return f"<tool_call>\n{text}\n</tool_call>" if is_tagged else text

    stop = call("stop", "{}")
    for text, allowed in (
        (stop, name is None),
        (call("weather", '{"city": "Rome", "days": 2}'), name is None),
        (call("weather", '{"city": "Rome"}'), False),
        (call("south", '{"place": "south1"}'), True),
        (call("south", '{"place": "north1"}'), False),
        (call("other", "{}"), False),
        ("yes", answer is not None),
        ("I see", is_free),
        ("", is_free),
        (f"I see.\n{stop}", is_free),
        (f"I see.\n{call('other', '{}')}", is_free and not is_tagged),
        (f"{stop}\n{stop}", several and is_tagged),
    ):
        ids = tokenizer.encode(text, add_special_tokens=False)
        ids.append(tokenizer.eos_token_id)
        processor = GrammarProcessor(grammar, tokenizer, len(tokenizer), ids[-1:])
        assert (processor.count_allowed([], ids) == len(ids)) == allowed, text


def test_calls_are_found():
    """Guards against words that are taken for a call, and calls that are lost without the tag that ends them:
    at a stop word, at the limit of tokens, or where the model leaves it out.
    """
    call = '{"name": "weather", "arguments": {"city": "Rome", "days": 2}}'
    expected = {"name": "weather", "arguments": '{"city": "Rome", "days": 2}'}
    cut = {**expected, "arguments": '{"city": "Ro'}
    for text, calls in (
        (f"<tool_call>\n{call}\n</tool_call>", [expected]),
        (f"<tool_call>{call}</tool_call>" * 2, [expected] * 2),
        (call.replace("arguments", "parameters"), [expected]),
        (f"<tool_call>\n{call}\n", [expected]),
        (f"<tool_call>{call}<tool_call>{call} and more</tool_call>", [expected] * 2),
        (f"<tool_call>{call}</tool_call><tool_call>{{</tool_call>", [expected]),
        ("<tool_call>" + call.partition('me", "days')[0], [cut]),
    ):
        assert read(text) == ("", calls)
    texts = ["It is sunny.", "{}", "[1]", "[" * 9999, '{"name": "unknown"}', '{"name": []}']
    for text in (*texts, "<tool_call>{</tool_call>"):
        assert read(text) == (text, [])


@pytest.mark.parametrize("name", ["arguments", "parameters"])
def test_an_argument_may_hold_tags(name):
    """Guards against a call that ends within a string: the client gets raw text instead of it."""
    for value in (
        "</tool_call>",
        "<tool_call>",
        '<tool_call>{"name": "stop"}</tool_call>',
        '"}}\n</tool_call>',
    ):
        arguments = {"city": f"a {value} b"}
        call = json.dumps({"name": "weather", name: arguments})
        expected = {"name": "weather", "arguments": json.dumps(arguments)}
        tagged = f"<tool_call>\n{call}\n</tool_call>"
        assert read(call) == ("", [expected])
        assert read(f"I see.\n{tagged}\n{tagged}") == ("I see.", [expected] * 2)
        assert read(f"{tagged}<tool_call>{{") == ("", [expected])


NESTED = '{"name": "weather", "arguments": {"city": "</tool_call> {}]", "days": [2, {"a": "\\""}]}}'
CALL = f"<tool_call>{NESTED}</tool_call>"
ANSWERS = [
    f"<tool_call>\n{NESTED}\n</tool_call>",
    f"I see.\n<tool_call>\n{NESTED}\n</tool_call>\n<tool_call>{NESTED}</tool_call>\n",
    NESTED,
    f" {NESTED} ",
    '<tool_call>{"arguments": {"city": "Rome"}, "name": "weather"}</tool_call>',
    '<tool_call>{"name": "stop", "arguments": 5}</tool_call>',
    '<tool_call>{"name": "st\\u006fp", "arguments": {}}</tool_call>',
    '{"name": "stop"}',
    '{"name": "stop"}; {"name": "stop"}',
    f"{NESTED}\nDone.",
    f'{{"days": "<tool_call>"}} {CALL}',
    f"{{x}} {CALL}",
    f'{{"name": "Rome", "arguments": {{"days": {json.dumps(CALL)}}}}} yes',
    '<tool_call>{"name": "weather", "arguments": {"city": "a\\\\\\"}{\\\\", "days": 2}}</tool_call>',
    # No calls:
    "It is sunny. 1 < 2, <tool_cal",
    '{"name": "Rome", "days": 2}',
    "<tool_call>{</tool_call> yes",
    '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
    "{ so it begins",
    "[" * 9999,
    "",
]


# What random answers are made of: calls, what breaks them, and texts.
PARTS = [
    *ANSWERS, NESTED, "<tool_call>", "</tool_call>", "<tool_", '{"name": "weather", "arguments": ', "{", "}",
    "[", "]", '"', "\\", ", ", ' "days": [1, {}]', '{"city": "Ro\\"me"}', '{"name": "stop", "arguments": {}}',
    '{"name": "other", "arguments": {}}', '{"arguments": {}, "name": "stop"}', "\n", " ", "I see.",
    "é</tool_call",
]  # fmt: skip


@pytest.mark.parametrize("number", [3000, pytest.param(60_000, marks=pytest.mark.slow)])
def test_a_stream_has_the_calls_of_the_whole(number):
    """However the text is cut. Guards against calls that a stream loses, repeats or makes of words, and ones
    that are calls in a stream and text as a whole.
    """
    draw = random.Random(number)
    texts = [*ANSWERS]
    while len(texts) < number:
        text = "".join(draw.choices(PARTS, k=draw.randint(1, 6)))
        texts.append(text[: draw.choice([None, None, draw.randint(0, len(text))])][:2000])
    differ = []
    num_calls = 0
    for text in texts:
        several = draw.random() < 0.8
        cuts = sorted(draw.randint(0, len(text)) for _ in range(draw.randint(1, 30)))
        pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        whole, calls = read(text, several=several)
        num_calls += len(calls)
        assert text.startswith(whole)
        assert calls or whole == text
        if read(*pieces, "", several=several) != (whole, calls):
            differ.append(pieces)
    assert num_calls > number / 4
    assert not differ, (len(differ), differ[0])


@pytest.mark.parametrize("answer", ANSWERS)
def test_each_character_may_be_a_piece(answer):
    """Guards against calls that need a part of the text at once."""
    assert read(*answer, "") == read(answer)


@pytest.mark.parametrize("order", [["name", "arguments"], ["arguments", "name"]])
def test_the_time_of_a_call_grows_with_its_length(order, monkeypatch):
    """Guards against long arguments that are parsed again at each bracket, while all streams wait."""
    decoder = Mock(wraps=tools._DECODER)
    monkeypatch.setattr(tools, "_DECODER", decoder)
    call = {"name": "weather", "arguments": {"rows": [[1, 2], {"a": []}] * 200}}
    answer = f"<tool_call>{json.dumps({name: call[name] for name in order})}</tool_call>"
    reader = CallReader(TOOLS, several=True)
    for piece in answer:
        reader.read(piece, is_last=False)
    assert reader.num_calls == 1
    assert decoder.raw_decode.call_count <= 2


def test_text_and_arguments_come_as_they_grow():
    """Guards against a stream that waits for the end of a call, or of an answer that might be one."""
    reader = CallReader(TOOLS, several=False)
    assert reader.read("I see <b", False) == ("I see <b", [])
    assert reader.read(" \n<tool", False) == ("", [])
    assert reader.read('_call>{"name": "weather", ', False) == ("", [])
    text, [begun] = reader.read('"arguments": {"city": "Ro', False)
    assert (text, begun["function"]) == ("", {"name": "weather", "arguments": '{"city": "Ro'})
    assert reader.read('me"', False) == ("", [{"index": 0, "function": {"arguments": 'me"'}}])
    assert reader.read("}", False) == ("", [{"index": 0, "function": {"arguments": "}"}}])
    assert reader.read('}</tool_call><tool_call>{"name": "stop", "arguments": {}}', True) == ("", [])
