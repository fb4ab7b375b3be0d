"""Answer a prompt or a conversation, and print statistics.

Answers go to standard output, everything else to standard error.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from threading import Event

from llguidance import LLMatcher

from runs.description import counted, early_exit_alone
from runs.startup import autoregressive, encode_chat
from runs.status import print_status, work_bar
from self_speculation import (
    GenerationConfig,
    GenerationResult,
    HuggingfaceLlamaGenerator,
    Request,
    SpeculativeTextStreamer,
    StandardTextStreamer,
)
from self_speculation.machine.threads import adjust_threads
from self_speculation.text.grammar import Grammar
from self_speculation.text.grammar_sandbox import LIMITS, grammar_error
from self_speculation.text.texts import Thinking

_TURNS = 3  # of a comparison: a single one would show the noise of the machine


def read_grammar(name: str, text: str) -> Grammar:
    """The grammar of --grammar, whose file has this text; raises ValueError if it cannot be parsed."""
    is_json = name == "json" or name.endswith(".json")
    grammar = Grammar.json_schema(text) if is_json else Grammar.lark(text)
    if problem := LLMatcher.validate_grammar(grammar.definition, limits=LIMITS):
        how = "" if is_json else "read as Lark, as all files but .json are: "
        raise ValueError(f"{how}{grammar_error(problem)}")
    return grammar


@dataclass
class Conversation:
    """Answers prompts; the fields are flags of generate.py."""

    generator: HuggingfaceLlamaGenerator
    config: GenerationConfig
    streamer: str = "standard"
    chat: bool = False
    compare: bool = False
    grammar: Grammar | None = None
    prediction: str | None = None
    template_kwargs: Mapping[str, object] = field(default_factory=dict)
    system: str = ""  # who the model is; an empty text: no such message
    messages: list[dict[str, str]] = field(default_factory=list, init=False)

    def answer(self, prompt: str) -> bool:
        """Print the answer and statistics; False if Ctrl-C ended it.

        Raises:
            ValueError: the prompt leaves no room in the model's context.
        """
        prompt = prompt.replace("\r\n", "\n")  # line breaks of Windows
        ids, thinking = self._encoded(prompt)
        request = Request(ids, grammar=self.grammar, prediction=self.prediction, thinking=thinking)
        streamer: StandardTextStreamer | None = None
        if self.streamer != "none":
            kind = SpeculativeTextStreamer if self.streamer == "speculative" else StandardTextStreamer
            streamer = kind(self.generator.tokenizer)
        # The cache holds the history already.
        config = replace(self.config, reuse_cache=self.chat)
        model = self.generator.model
        adjust_threads(model)  # other programs may have come or gone
        with ctrl_c() as pressed:
            shown = replace(request, stopping_criteria=[lambda *_: pressed.is_set()], streamer=streamer)
            result = self.generator.generate(shown, config)
        interrupted = result.generation_strategy_result.stop_reason == "stopping_criteria"
        if streamer is None:
            print(result.decoded_prediction)
        self.messages.append({"role": "user", "content": prompt})
        self.messages.append({"role": "assistant", "content": result.decoded_prediction})
        if result.num_thinking_tokens:  # whether the model sees it again is up to the template
            self.messages[-1]["reasoning_content"] = result.thinking
        print_status(_statistics(result, self.config))
        if legend := getattr(streamer, "legend", ""):
            print_status(f"  {legend}")
        if self.compare and not interrupted:
            try:
                compared = self._comparison(request)
                print_status(f"  {compared}")
            except KeyboardInterrupt:  # the conversation goes on
                print_status("\n  without streaming: interrupted")
                return False
        return not interrupted

    def _encoded(self, prompt: str) -> tuple[list[int], Thinking | None]:
        """The prompt's token ids; with --chat, the ids of the conversation, and how the answer thinks."""
        if not self.chat:
            return self.generator.encode(prompt), None
        messages = [*self.messages, {"role": "user", "content": prompt}]
        if self.system:
            messages.insert(0, {"role": "system", "content": self.system})
        return encode_chat(self.generator, messages, self.template_kwargs)

    def _comparison(self, request: Request) -> str:
        """Decode the prompt again by both strategies in turn, without output, and compare their speeds."""
        sides = [(self.generator, self.config), autoregressive(self.generator, self.config)]

        what = "comparing with decoding without drafts"
        number = (1 + _TURNS) * len(sides)
        with work_bar(what, number, "answer") as advance:

            def speed(generator: HuggingfaceLlamaGenerator, config: GenerationConfig) -> float:
                took = generator.generate(request, config).generation_strategy_result
                advance(1)
                return took.decode_tokens_per_second

            turns = [[speed(*side) for side in sides] for _ in range(1 + _TURNS)][1:]  # first a warm-up
        if not all(map(all, turns)):
            return "without streaming: answers of one token, nothing to compare"
        ratios = sorted((ours / plain, ours, plain) for ours, plain in turns)
        (low, *_), *_, (high, *_) = ratios
        # Speeds of the turn with the median ratio: medians of both may contradict it.
        ratio, ours, plain = ratios[_TURNS // 2]
        agree = low > 1 or high < 1
        verdict = f"{ratio:.2f} times as fast" if agree else "turns do not agree which is faster"
        speeds = f"{ours:.1f} tokens/s, without drafts {plain:.1f}"
        return f"without streaming: {speeds}: {verdict} ({low:.2f}-{high:.2f})"


@contextmanager
def ctrl_c() -> Iterator[Event]:
    """Set the event at Ctrl-C in this block; a second Ctrl-C ends the program at once."""
    event = Event()

    def press(*_: object) -> None:
        event.set()
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, press)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)


def _statistics(result: GenerationResult, config: GenerationConfig) -> str:
    """Lines with the number of tokens, the speed, and the acceptance of drafts."""
    took = result.generation_strategy_result
    is_interrupted = took.stop_reason == "stopping_criteria"
    ended = "interrupted" if is_interrupted else f"stopped by {took.stop_reason}"
    alone = early_exit_alone(vars(config))
    whose = f"; {alone}" if alone else ""
    thought = f", {result.num_thinking_tokens} of them thinking," if result.num_thinking_tokens else ""
    cached = f", {took.num_cached_tokens} of them cached" if took.num_cached_tokens else ""
    made, read = (counted(n, "token") for n in (result.num_tokens_generated, took.num_prompt_tokens))
    lines = [
        f"{made}{thought} in {result.total_time:.2f} s, {ended}{whose}",
        (f"decode {took.decode_tokens_per_second:.1f} tokens/s, " if took.num_decode_tokens else "")
        + f"prefill {took.prefill_time * 1000:.0f} ms for {read}{cached}",
    ]
    if (drafts := took.draft_stats) and drafts.num_drafted:
        lines.append(
            f"acceptance rate {took.acceptance_rate:.1%} ({drafts.num_accepted} of {drafts.num_drafted}), "
            f"mean accepted length {drafts.mean_accepted_length:.2f}"
        )
        sources = drafts.by_source
        if len(sources) > 1 or config.generation_strategy == "adaptive" or config.draft_weights != "exact":
            lines += [
                f"  {source}: {accepted} of {drafted} in {counted(rounds, 'round')}"
                if drafted
                else f"  without drafts: {counted(rounds, 'round')}"
                for source, (rounds, drafted, accepted) in sources.items()
            ]
    elif config.is_adaptive and took.num_decode_tokens > 0:
        lines.append("no drafts: none was expected to be faster")
    return "\n" + "\n".join(f"  {line}" for line in lines)
