"""Models that think: templates like those of known families, tags of every kind, given outputs."""

import copy
import functools
from dataclasses import replace

from conftest import tiny_llama
from tokenizers import AddedToken

from self_speculation import HuggingfaceLlamaGenerator, Request, make_strategy

_TURNS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "assistant: {% if keep %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{% endif %}"
    "{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.role }}: {{ m.content }}{% endif %}{{ '\n' }}{% endfor %}"
)
_OFF = "{{ '<think>\n\n</think>\n\n' }}"
# The model opens the thinking; an empty thought turns it off.
QWEN3 = (
    _TURNS + "{% if tools %}<tool_call>{{ '\n' }}{% endif %}assistant: "
    "{% if not enable_thinking | default(true) %}" + _OFF + "{% endif %}"
)
# The prompt opens it, always.
R1 = _TURNS + "assistant: {{ '<think>\n' }}"
# Off by a variable, or by a word in the system's message; knows efforts.
SMOLLM3 = (
    _TURNS + "{% if reasoning_effort is defined %}effort {{ reasoning_effort + '\n' }}{% endif %}assistant: "
    "{% if not enable_thinking | default(true) or '/no_think' in messages[0].content %}"
    + _OFF
    + "{% endif %}"
)
TAGS = ["<think>", "</think>"]


@functools.cache
def thinking_tokenizer(tokenizer, template=QWEN3, kind="added"):
    """A copy whose tags are special tokens, added ones that are not special, or spelled by several tokens."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    if kind != "spelled":
        special = kind == "special"
        tokenizer.add_tokens([AddedToken(tag, normalized=False, special=special) for tag in TAGS])
    return tokenizer


class Told:
    """A logits processor: the output begins with given ids, where nothing forbids them."""

    def __init__(self, num_prompt, ids):
        self._num_prompt = num_prompt
        self._ids = ids

    def __call__(self, input_ids, scores):
        position = input_ids.shape[1] - self._num_prompt
        if position < len(self._ids):
            scores = scores.clone()
            scores[:, self._ids[position]] += 1000
        return scores


class Teller(HuggingfaceLlamaGenerator):
    """Every output begins with `text`, and goes on as a random tiny Llama does."""

    def __init__(self, tokenizer, strategy="autoregressive", text="", **model):
        model = tiny_llama(vocab_size=len(tokenizer) + 8, **model)  # heads are often padded
        super().__init__(tokenizer, model, make_strategy(strategy))
        self.text = text

    def tokenize(self, given, generation_config, started=None):
        given = given if isinstance(given, Request) else Request(given)
        ids = self.tokenizer.encode(self.text, add_special_tokens=False)
        processors = [Told(len(self.encode(given.prompt)), ids)]
        return super().tokenize(replace(given, logits_processors=processors), generation_config, started)
