"""How to generate and how to load, as data. Nothing heavy is imported: flags are checked without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

GenerationStrategyName = Literal["autoregressive", "self_speculative", "adaptive"]
DraftWeights = Literal["exact", "int8", "int4"]
DtypeName = Literal["auto", "half", "float32", "bfloat16", "float16"]
Parallel = Literal["data", "tensor", "pipeline"]
Quantization = Literal["none", "int8", "int4"]

# The most tokens that a lookup compares. Whatever agrees in so many tokens nearly always agrees in the next.
_MOST_COMPARED = 32

# The most tokens that adaptive decoding drafts in a round.
LONGEST_DRAFT = 16


@dataclass(frozen=True)
class GenerationConfig:
    """How to generate.

    Raises:
        ValueError: a value is out of range; the message starts with the field's name.
    """

    max_steps: int = 512
    """Most new tokens; at least 1."""
    exit_layer: int = -1
    """Layers of the draft (self_speculative) or of the whole generation (autoregressive); -1: full depth."""
    num_speculations: int = -1
    """Tokens drafted per round; self_speculative needs at least 1."""
    generation_strategy: GenerationStrategyName = "autoregressive"
    """How tokens are generated; adaptive: self-speculative with exit layer, draft length and lookups chosen
    round by round."""
    sample: bool = True
    """Draw tokens at random; False: greedy, always the most likely token."""
    temperature: float = 0.6
    """Divides the logits before sampling; 0: greedy."""
    top_k: int = 0
    """Sample among the k most likely tokens; 0: off."""
    top_p: float = 0.9
    """Sample among the fewest most likely tokens whose probabilities reach p; 1: off."""
    no_repeat_ngram_size: int | None = None
    """No n tokens in a row occur twice in prompt and output."""
    stop_words: list[str] | None = None
    """Texts that end the output before themselves; several one after the other, as in: return if."""
    stop_token_ids: list[int] | None = None
    """Token ids, one or several, that end the output, besides the EOS ids of tokenizer and model."""
    draft_weights: DraftWeights = "exact"
    """int8, int4: draft with a copy of the layers in so many bits, exit_layer may then be all of them.
    It takes 1 or 0.63 bytes more for each weight of theirs and 1 or 2 for each of the head. exact: the
    model's own."""
    draft_confidence: str | None = None
    """Stop a draft after a token that it gave a lower probability than this, or, with auto, when another one
    would cost more than it is likely to save; without it, drafts have num_speculations tokens."""
    draft_vocabulary: int | None = None
    """Draft with so many rows of the head: those of the ids that the sweep of --tuned met most, or the first
    ones of the tokenizer, and those of the ids in prompt and output. Without it, a copy in fewer bits and
    adaptive decoding read a quarter where the head is large, other drafts the whole head."""
    prompt_lookup: int = 0
    """Look for up to so many last tokens earlier in prompt and output, and draft what followed; 0: off."""
    reuse_cache: bool = False
    """Keep the keys and values of answers until their place is needed: of a prompt that begins like one of
    them, only the rest is read."""

    def __post_init__(self) -> None:
        def check(field: str, allowed: str, ok: bool) -> None:
            if not ok:
                raise ValueError(f"{field} {getattr(self, field)!r}: {allowed}")

        names = get_args(GenerationStrategyName)
        check("generation_strategy", f"must be one of {', '.join(names)}", self.generation_strategy in names)
        check("max_steps", "must be at least 1", self.max_steps >= 1)
        check(
            "exit_layer",
            "must be -1 (full depth) or at least 1",
            self.exit_layer == -1 or self.exit_layer >= 1,
        )
        check(
            "num_speculations",
            "must be -1 or at least 1",
            self.num_speculations == -1 or self.num_speculations >= 1,
        )
        weights = get_args(DraftWeights)
        check("draft_weights", f"must be one of {', '.join(weights)}", self.draft_weights in weights)
        check("draft_confidence", "must be auto or between 0 and 1", _is_confidence(self.draft_confidence))
        has_ids = self.draft_vocabulary is None or self.draft_vocabulary >= 1
        check("draft_vocabulary", "must be at least 1", has_ids)
        compared = f"must be between 0 (off) and {_MOST_COMPARED}"
        check("prompt_lookup", compared, 0 <= self.prompt_lookup <= _MOST_COMPARED)
        check("temperature", "must be 0 (greedy) or more", 0 <= self.temperature < math.inf)
        check("top_k", "must be 0 (off) or more", self.top_k >= 0)
        check("top_p", "must be between 0 and 1", 0 <= self.top_p <= 1)
        check(
            "no_repeat_ngram_size",
            "must be at least 1",
            self.no_repeat_ngram_size is None or self.no_repeat_ngram_size >= 1,
        )
        check("stop_words", "must not be empty texts", all(self.stop_words or []))
        check("stop_token_ids", "must be 0 or more", all(i >= 0 for i in self.stop_token_ids or []))

    def check_depth(self, num_layers: int) -> None:
        """Refuse what cannot be done with a model of `num_layers`.

        Raises:
            ValueError: an exit layer that it does not have; self-speculation without one or without drafts.
        """
        speculative = self.generation_strategy == "self_speculative"
        most = num_layers if speculative and self.draft_weights != "exact" else num_layers - 1
        between = f"between 1 and {most}, the model has {num_layers} layers"
        if speculative and self.draft_weights == "exact" and self.exit_layer == num_layers:
            between += f"; with draft_weights int8 or int4 it may be {num_layers}"
        if self.is_adaptive:
            for field, default in (("exit_layer", -1), ("num_speculations", -1), ("draft_confidence", None)):
                if (value := getattr(self, field)) != default:
                    raise ValueError(f"{field} {value}: adaptive chooses it, leave it out")
            return
        if speculative and self.exit_layer == -1:
            raise ValueError(f"exit_layer: self_speculative needs one {between}")
        if self.exit_layer > most:
            raise ValueError(
                f"exit_layer {self.exit_layer}: must be {between}"
                + ("" if speculative else "; -1 is full depth")
            )
        if speculative and self.num_speculations < 1:
            raise ValueError("num_speculations: self_speculative needs at least 1")

    @property
    def longest_draft(self) -> int:
        return LONGEST_DRAFT if self.is_adaptive else self.num_speculations

    @property
    def is_adaptive(self) -> bool:
        return self.generation_strategy == "adaptive"

    @property
    def greedy(self) -> bool:
        """Whether tokens are not drawn but picked: the most likely one each time."""
        return not self.sample or self.temperature == 0


def _is_confidence(text: str | None) -> bool:
    try:
        return text in (None, "auto") or 0 <= float(text) <= 1
    except ValueError:
        return False


@dataclass(frozen=True)
class LoadingOptions:
    """What a model is loaded with, and onto what."""

    model_args: Mapping[str, Any] = field(default_factory=dict)
    """Passed to `from_pretrained`."""
    trust_remote_code: bool = False
    """Execute Python code that the model's repository may bring."""
    seed: int = 42
    """Seed of every random generator."""
    dtype: DtypeName = "auto"
    """Number format; `auto`: the checkpoint's own, but on a CPU weights in 16 bits are multiplied in float32
    (see `fuse`), where they cannot be, they are in float32; others: see `resolve_dtype`."""
    device: str = "auto"
    """See `resolve_device`."""
    parallel: Parallel = "data"
    """`tensor`: a share of every layer on each process of torch.distributed, which is initialised by then;
    `pipeline`: layers on all devices there are, those that find no room there in memory or on disk."""
    quantization: Quantization = "none"
    """Hold the weights of the layers' products in so many bits. Only weights are quantised: a token's result
    does not depend on what else is in the pass."""
    fuse: bool = True
    """Make the layers fused, see `fused_layers`."""
    compile: bool = False
    """Capture the passes of decoding as CUDA graphs."""
