"""Talk to a model: one prompt, a pipe, or an interactive loop.

    python generate.py --prompt "def fibonacci(n):" --sample False
    echo "Once upon a time" | python generate.py
    python generate.py --chat True

The answer goes to standard output, everything else to standard error.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence

from arguments import (
    GenerateArguments,
    GenerationConfig,
    ModelArguments,
    names_in_compat,
    parse,
    refuse,
    refuse_idle_drafts,
)
from runs.tuning import TuningArguments, tuned

Flags = tuple[ModelArguments, GenerationConfig, GenerateArguments, TuningArguments]


def flags(argv: Sequence[str] | None = None) -> Flags:
    """The command line; a mistake that can be seen without the model ends the program."""
    groups = (ModelArguments, GenerationConfig, GenerateArguments, TuningArguments)
    model_args, config, args, tuning = parse(__doc__ or "", *groups, args=argv)
    config = tuned(config, tuning, argv)
    if args.compare and config.generation_strategy == "autoregressive":
        refuse("--compare True: needs a --generation_strategy to compare, such as self_speculative")
    refuse_idle_drafts(config)
    return model_args, config, args, tuning


if __name__ == "__main__":  # before the imports below, which take seconds
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    flags()

import re
import statistics
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from measures.timed_runs import warm_up
from runs import ranks
from runs.failures import KINDS, reason
from runs.startup import autoregressive, get_ready, know_what_was_written, load_generator, meet, run
from self_speculation import (
    GenerationResult,
    HuggingfaceLlamaGenerator,
    SpeculativeTextStreamer,
    StandardTextStreamer,
)
from self_speculation.model.devices import agreed

_TURNS = 3  # of a comparison: one alone says what the machine did meanwhile
if TYPE_CHECKING:
    from prompt_toolkit import PromptSession


def main(argv: Sequence[str] | None = None) -> int:
    model_args, config, args, tuning = flags(argv)
    if model_args.parallel == "data" and not ranks.is_first():
        return 0  # every rank has a copy of the model, and one answer is enough
    meet(model_args)
    interactive = args.prompt is None and sys.stdin is not None and sys.stdin.isatty()
    if interactive and ranks.num_processes() > 1:
        refuse("--parallel tensor: answers --prompt or a pipe; a conversation is for one process")
    prompt = _one_prompt(args) if ranks.is_first() and not interactive else None
    generator = load_generator(model_args, config)
    know_what_was_written(generator, tuning)
    prompt = agreed(generator.model, prompt)
    if args.chat and not generator.tokenizer.chat_template:
        refuse("--chat True: the model's tokenizer has no chat template")
    talk = Conversation(generator, config, args)
    if interactive:
        return _loop(talk)
    try:
        return 0 if talk.answer(prompt or "") else 130
    except ValueError as error:
        refuse(str(error))


class Conversation:
    """Answers prompts; when chatting, with all that was said before."""

    def __init__(
        self, generator: HuggingfaceLlamaGenerator, config: GenerationConfig, args: GenerateArguments
    ) -> None:
        self._generator = generator
        self._config = config
        self._args = args
        self._messages: list[dict[str, str]] | None = [] if args.chat else None

    def get_ready(self, num_prompt_tokens: int = 0) -> None:
        """Do what comes before a first answer; for longer prompts there may be more to do."""
        get_ready(self._generator, self._config, num_prompt_tokens)

    def answer(self, prompt: str) -> bool:
        """Show the answer and its statistics; False where Ctrl-C ended it.

        Raises:
            ValueError: the prompt leaves no room in the model's context.
        """
        prompt = prompt.replace("\r\n", "\n")  # pasted or read from what Windows wrote
        ids = self._ids(prompt)
        try:
            self.get_ready(len(ids))
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return False
        streamer = self._streamer(ids)
        with _stopped_by_ctrl_c(self._generator.model) as interrupt:
            result = self._generator.generate(
                ids, self._config, streamer=streamer, stopping_criteria=[interrupt]
            )
        if streamer is None:
            print(result.decoded_prediction)
        if self._messages is not None:
            self._messages.append({"role": "user", "content": prompt})
            self._messages.append({"role": "assistant", "content": result.decoded_prediction})
        print(_statistics(result, self._config, interrupt.requested), file=sys.stderr)
        if legend := getattr(streamer, "legend", ""):
            print(f"  {legend}", file=sys.stderr)
        if self._args.compare and not interrupt.requested:
            try:
                print(f"  {self._comparison(ids)}", file=sys.stderr)
            except KeyboardInterrupt:  # the answer is there, and so is the conversation
                print("\n  unwatched: interrupted", file=sys.stderr)
                return False
        return not interrupt.requested

    def _ids(self, prompt: str) -> list[int]:
        if self._messages is None:
            return self._generator.encode(prompt)
        messages = [*self._messages, {"role": "user", "content": prompt}]
        template = self._generator.tokenizer.apply_chat_template
        text = template(messages, add_generation_prompt=True, tokenize=False)
        return self._generator.encode(text, special_tokens=False)  # the template has them

    def _comparison(self, ids: list[int]) -> str:
        """Decode the prompt again by both strategies in turn, showing nothing, and say how fast each was."""
        sides = [(self._generator, self._config), autoregressive(self._generator, self._config)]
        warm_up([("", *side) for side in sides], ids)
        turns = [
            [
                generator.generate(ids, config).generation_strategy_result.decode_tokens_per_second
                for generator, config in sides
            ]
            for _ in range(_TURNS)
        ]
        if not all(map(all, turns)):
            return "unwatched: answers of one token, nothing to compare"
        ours, plain = map(statistics.median, zip(*turns, strict=True))
        ratios = [a / b for a, b in turns]
        return (
            f"unwatched: {ours:.1f} tokens/s, autoregressive {plain:.1f}: "
            f"{statistics.median(ratios):.2f} times as fast ({min(ratios):.2f}-{max(ratios):.2f})"
        )

    def _streamer(self, prompt: list[int]) -> Any:
        if self._args.streamer == "none":
            return None
        kind = SpeculativeTextStreamer if self._args.streamer == "speculative" else StandardTextStreamer
        return kind(self._generator.tokenizer, stop_words=self._config.stop_words, prompt=prompt)


class Interrupt:
    """A stopping criterion that is fulfilled after Ctrl-C."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model, self.wanted, self.requested = model, False, False

    def __call__(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        self.requested = agreed(self._model, self.wanted)
        return torch.full((input_ids.shape[0],), self.requested)  # on the host: nobody has to wait for a GPU


@contextmanager
def _stopped_by_ctrl_c(model: PreTrainedModel) -> Iterator[Interrupt]:
    """The first Ctrl-C ends the answer after the current token; a second one ends the program at once."""
    interrupt = Interrupt(model)

    def handle(*_: Any) -> None:
        interrupt.wanted = True
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, previous)


def _one_prompt(args: GenerateArguments) -> str:
    """--prompt, or all of standard input without the line break that `echo` and editors add at the end."""
    try:
        if args.prompt is not None:
            args.prompt.encode()
            return args.prompt
        prompt = sys.stdin.read().removesuffix("\n") if sys.stdin is not None else ""
        prompt.encode()
    except UnicodeError:
        refuse("the prompt is not valid UTF-8")
    if not prompt:
        refuse('the prompt is empty: standard input has no text; --prompt "" stands for the BOS token alone')
    return prompt


# What a line that begins with a slash does; everything else is a prompt, of one line or several.
_COMMANDS = {"/help": "lists commands and keys", "/exit": "leaves"}
_KEYS = """Ctrl-D   sends the prompt; leaves where there is none
Enter    begins another line of the prompt; after a command, runs it
Ctrl-C   stops an answer"""


def _loop(talk: Conversation) -> int:
    """Read prompts of several lines; Ctrl-D sends one, and leaves when there is none."""
    talk.get_ready()
    session = _session()
    print(
        "Type a prompt, Ctrl-D sends it. Ctrl-C stops an answer; /exit leaves, /help tells more.",
        file=sys.stderr,
    )
    while True:
        try:
            prompt = _ask(session)
        except KeyboardInterrupt:
            continue
        except EOFError:
            return 0
        if _is_command(prompt):
            if prompt.strip() == "/exit":
                return 0
            print(_command(prompt.strip()), file=sys.stderr)
            continue
        try:
            talk.answer(prompt)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
        except KINDS as error:
            if (why := reason(error)) is None:
                raise
            print(f"\nerror: {why}", file=sys.stderr)  # in the middle of an answer


def _session() -> PromptSession[str]:
    """What reads prompts from a terminal: commands act on Enter, prompts on Ctrl-D."""
    from prompt_toolkit import PromptSession  # a quarter of a second that other uses save
    from prompt_toolkit.application import get_app
    from prompt_toolkit.filters import Condition
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.output import create_output

    keys = KeyBindings()

    @keys.add("c-d")
    def _(event: KeyPressEvent) -> None:
        if event.current_buffer.text.strip():
            event.current_buffer.validate_and_handle()
        else:
            event.app.exit(exception=EOFError)

    @keys.add("enter", filter=Condition(lambda: _is_command(get_app().current_buffer.text)))
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    return PromptSession(multiline=True, key_bindings=keys, output=create_output(always_prefer_tty=True))


def _ask(session: PromptSession[str]) -> str:
    """The next prompt; without the keys that were typed before it was asked for."""
    from prompt_toolkit.input.typeahead import clear_typeahead

    clear_typeahead(session.input)  # those that came together with the last ones
    termios.tcflush(sys.stdin, termios.TCIFLUSH)
    return session.prompt(">>> ", prompt_continuation="... ")


def _is_command(text: str) -> bool:
    return re.fullmatch(r"\s*/\w*\s*", text) is not None


def _command(name: str) -> str:
    """What is said to a command that does not leave."""
    if name not in _COMMANDS:
        return f"{name}: no such command, there are {', '.join(_COMMANDS)}"
    return "\n".join([*(f"{name:<8} {what}" for name, what in _COMMANDS.items()), _KEYS])


def _statistics(result: GenerationResult, config: GenerationConfig, interrupted: bool) -> str:
    took = result.generation_strategy_result
    reason = "interrupted" if interrupted else f"stopped by {took.stop_reason}"
    is_adaptive = config.generation_strategy == "adaptive"
    early = config.generation_strategy == "autoregressive" and config.exit_layer != -1
    whose = f"; by the early exit at layer {config.exit_layer} alone, not by the full model" if early else ""
    lines = [
        f"{result.num_tokens_generated} tokens in {result.total_time:.2f} s, {reason}{whose}",
        f"decode {took.decode_tokens_per_second:.1f} tokens/s, "
        f"prefill {took.prefill_time * 1000:.0f} ms for {took.num_prompt_tokens} tokens",
    ]
    if took.num_drafted:
        lines.append(
            f"acceptance rate {took.acceptance_rate:.1%} ({took.num_accepted} of {took.num_drafted}), "
            f"mean accepted length {took.mean_accepted_length:.2f}"
        )
        sources = took.drafts_by_source or {}
        if is_adaptive or config.draft_weights != "exact" or len(sources) > 1:
            lines += [
                f"  {source}: {accepted} of {drafted} in {rounds} rounds"
                for source, (rounds, drafted, accepted) in sources.items()
            ]
    return "\n" + "\n".join(f"  {line}" for line in lines)


__getattr__ = names_in_compat(__name__)


if __name__ == "__main__":
    run(main)
