"""A conversation reads only what is new of each turn."""

import copy
import re
from unittest.mock import Mock

import pytest
from conftest import EOS, config_of, generator_of
from helpers import watch
from thinkers import QWEN3, TAGS, Teller, thinking_tokenizer
from tokenizers.processors import TemplateProcessing

from runs.conversation import Conversation
from runs.terminal import obey

TEMPLATE = "{% for m in messages %}{{ m.role }}:{{ m.content }}</s>{% endfor %}assistant:"


@pytest.mark.parametrize("template", [TEMPLATE, TEMPLATE.replace("m.content", "m.content | upper")])
def test_a_turn_reads_what_the_template_changes(template, byte_tokenizer, text_model, monkeypatch):
    """Guards against special tokens before the template's, and a turn that reads what was read."""
    tokenizer = copy.deepcopy(byte_tokenizer)
    special = [("<s>", byte_tokenizer.bos_token_id)]
    tokenizer.chat_template = template
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=special)
    generator = generator_of(tokenizer, text_model)
    talk = Conversation(generator, config_of(max_steps=12, stop_token_ids=[EOS]), "none", chat=True)
    seen = watch(monkeypatch, generator, "generate")
    for prompt in ("Who are you?", "And who am I?"):
        talk.answer(prompt)
    (((first, _), _), ((second, _), result)) = seen
    text = tokenizer.apply_chat_template(talk.messages[:3], add_generation_prompt=True, tokenize=False)
    assert second.prompt_ids == tokenizer.encode(text, add_special_tokens=False)
    num_cached = result.generation_strategy_result.num_cached_tokens
    assert template != TEMPLATE or num_cached > len(first.prompt_ids) // 2


def test_commands_of_a_conversation(byte_tokenizer):
    """Guards against a history that cannot be left, or begun by a system prompt."""
    teller = Teller(thinking_tokenizer(byte_tokenizer, QWEN3), text="u</s>")
    talk = Conversation(teller, config_of(), "none", chat=True)

    def prompt():
        return teller.tokenizer.decode(talk._encoded("And I?")[0])

    obey(talk, "/system  Be brief. ")
    talk.answer("Who?")
    assert prompt().startswith("system: Be brief.\nuser: Who?\n")
    obey(talk, " /clear")
    obey(talk, "/system")
    assert prompt() == "user: And I?\nassistant: "
    alone = Conversation(teller, config_of(), "none")
    assert obey(alone, "/system x") == "/system: needs --chat True, a prompt alone has no roles"


@pytest.mark.parametrize(
    ("prompt", "status"),
    [
        ("/help", "/help: no such command; there are /clear, /system TEXT, /exit"),
        ("/sytem Be brief.\nAnd kind.", "/sytem: no such command; did you mean /system? there are"),
        ("/system: Be brief.", "/system:: no such command; did you mean /system? there are"),
        ("/Clear", "/Clear: no such command; did you mean /clear? there are"),
        ("/exit now", "/exit: takes no text"),
        ("/clear it", "/clear: takes no text"),
        ("/etc/hosts", None),
        ("/etc is what?", None),
        ("/* C */ int main", None),
        ("// a comment", None),
        ("system?", None),
    ],
)
def test_what_looks_like_a_command_is_not_asked(prompt, status):
    """Guards against a command with a typing error that the model answers, and a path that it does not."""
    assert (obey(Conversation(None, None, chat=True), prompt) or "None").startswith(str(status))


@pytest.mark.parametrize(("kwargs", "keeps"), [({}, False), ({"keep": True}, True)])
@pytest.mark.parametrize("thought", ["Hm.", ""])
def test_earlier_thinking_comes_back_if_the_template_asks(byte_tokenizer, capsys, kwargs, keeps, thought):
    """Guards against thinking that stays in the history because the tokens are kept."""
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


def test_a_comparison_needs_turns_that_agree(monkeypatch):
    """Guards against the verdict of one turn or of the warm-up, and speeds that contradict their ratio."""

    def generator(*speeds):
        results = [Mock(**{"generation_strategy_result.decode_tokens_per_second": each}) for each in speeds]
        return Mock(generate=Mock(side_effect=results))

    monkeypatch.setattr("runs.conversation.autoregressive", lambda *_: (generator(10, 10, 20, 10), None))
    for ours, verdict in (
        ([99, 19, 42, 22], "42.0 tokens/s, without drafts 20.0: 2.10 times as fast (1.90-2.20)"),
        ([99, 9.7, 20.2, 10.4], "20.2 tokens/s, without drafts 20.0: turns do not agree which is faster"),
        ([0] * 4, "answers of one token, nothing to compare"),
    ):
        status = Conversation(generator(*ours), None)._comparison(None)
        assert status.startswith(f"without streaming: {verdict}")
