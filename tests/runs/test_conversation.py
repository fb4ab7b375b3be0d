"""A conversation reads only what is new of each turn."""

import copy
import json
import re

import pytest
from conftest import EOS, config_of, generator_of
from helpers import watch
from thinkers import QWEN3, TAGS, Teller, thinking_tokenizer
from tokenizers.processors import TemplateProcessing

from runs.conversation import Conversation

TEMPLATE = "{% for m in messages %}{{ m.role }}:{{ m.content }}</s>{% endfor %}assistant:"


@pytest.fixture
def turns(byte_tokenizer, text_model, monkeypatch):
    """Has a conversation by a template; returns prompt and result of each turn."""

    def converse(template, *prompts):
        monkeypatch.setattr(byte_tokenizer, "chat_template", template)
        tokenizer, special = copy.deepcopy(byte_tokenizer), [("<s>", byte_tokenizer.bos_token_id)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=special)
        generator = generator_of(tokenizer, text_model)
        config = config_of(max_steps=12, stop_token_ids=[EOS])
        talk = Conversation(generator, config, "none", chat=True)
        seen = watch(monkeypatch, generator, "generate")
        for prompt in prompts:
            talk.answer(prompt)
        return [(request.ids, result.generation_strategy_result) for (request, _), result in seen]

    return converse


@pytest.mark.parametrize("template", [TEMPLATE, TEMPLATE.replace("m.content", "m.content | upper")])
def test_a_turn_reads_what_the_template_changes(turns, byte_tokenizer, template):
    """Guards against tokens of an answer that the template rewrites, special tokens before those of the
    template, and a turn that reads the whole conversation.
    """
    (first, wrote), (second, took) = turns(template, "Who are you?", "And who am I?")
    messages = [
        {"role": "user", "content": "Who are you?"},
        {"role": "assistant", "content": byte_tokenizer.decode(wrote.predicted_tokens)},
        {"role": "user", "content": "And who am I?"},
    ]
    text = byte_tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert second == byte_tokenizer.encode(text, add_special_tokens=False)
    assert template != TEMPLATE or took.num_cached_tokens > len(first) // 2


def test_commands_of_a_conversation(byte_tokenizer, tmp_path):
    """Guards against a history that cannot be left, kept or begun by a system prompt, and a file that is
    replaced.
    """
    teller = Teller(thinking_tokenizer(byte_tokenizer, QWEN3), text="u</s>")
    talk, file = Conversation(teller, config_of(), "none", chat=True), tmp_path / "talk.json"
    assert talk.obey("system", "Be brief.") == "the system prompt is set"
    talk.answer("Who?")
    assert teller.tokenizer.decode(talk._encoded("And I?")[0]).startswith("system: Be brief.\nuser: Who?\n")
    assert talk.obey("save", str(file)) == f"the conversation is in {file}"
    said = [("system", "Be brief."), ("user", "Who?"), ("assistant", "u")]
    assert json.loads(file.read_text()) == [{"role": role, "content": text} for role, text in said]
    assert talk.obey("save", str(file)) == f"/save {file}: cannot be written (File exists)"
    assert talk.obey("save", "") == "/save: needs the name of a new file"
    assert talk.obey("clear", "") == "the conversation is forgotten"
    assert talk.obey("system", "") == "there is no system prompt now"
    assert teller.tokenizer.decode(talk._encoded("And I?")[0]) == "user: And I?\nassistant: "
    alone = Conversation(teller, config_of(), "none")
    assert alone.obey("system", "x") == "/system: needs --chat True, a prompt alone has no roles"


@pytest.mark.parametrize(("kwargs", "keeps"), [({}, False), ({"keep": True}, True)])
@pytest.mark.parametrize("thought", ["Hm.", ""])
def test_earlier_thinking_comes_back_if_the_template_asks(byte_tokenizer, capsys, kwargs, keeps, thought):
    """Guards against thinking that stays in the history because its tokens are kept."""
    block = f"{TAGS[0]}\n{thought}\n{TAGS[1]}\n\n"
    teller = Teller(thinking_tokenizer(byte_tokenizer, QWEN3), text=f"{block}u</s>")
    talk = Conversation(teller, config_of(), "none", chat=True, template_kwargs=kwargs)
    talk.answer("Who?")
    printed = capsys.readouterr()
    assert printed.out == "u\n"
    assert re.search(r"\d+ tokens, \d+ of them thinking, in", printed.err)
    ids, thinking = talk._encoded("And I?")
    answer = f"{block if keeps else ''}u"
    assert teller.tokenizer.decode(ids) == f"user: Who?\nassistant: {answer}\nuser: And I?\nassistant: "
    assert not thinking.has_begun
