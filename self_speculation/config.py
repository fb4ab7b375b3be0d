"""Settings of generation and of loading. Imports nothing heavy: scripts check flags without torch."""

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

# The longest n-gram of `prompt_lookup`: longer ones are followed by the same token nearly always.
_LONGEST_NGRAM = 32

# The longest draft of adaptive decoding.
LONGEST_DRAFT = 16


@dataclass(frozen=True)
class GenerationConfig:
    """How to generate.

    Raises:
        ValueError: a value is out of range; the message starts with the field's name.
    """

    max_steps: int = 512
    """The most new tokens; at least 1."""
    exit_layer: int = -1
    """Layers of the draft (self_speculative) or of the whole generation (autoregressive); -1: full depth."""
    num_speculations: int = -1
    """Tokens drafted per round; self_speculative needs at least 1."""
    generation_strategy: GenerationStrategyName = "autoregressive"
    """How to decode; adaptive: self-speculative, picks exit layer, draft length and n-grams in each round."""
    sample: bool = True
    """Sample tokens; False: greedy, always the most likely token."""
    temperature: float = 0.6
    """Divides the logits before sampling; 0: greedy."""
    top_k: int = 0
    """Sample among the k most likely tokens; 0: off."""
    top_p: float = 0.9
    """Sample among the fewest most likely tokens whose probabilities reach p; 1: off."""
    no_repeat_ngram_size: int | None = None
    """No n-gram of this size occurs twice in prompt and output."""
    stop_words: list[str] | None = None
    """Texts; the output ends before the first of them. Several follow one another, as in: return if."""
    stop_token_ids: list[int] | None = None
    """Token ids that end the output, besides the EOS ids of tokenizer and model."""
    draft_weights: DraftWeights = "exact"
    """int8, int4: draft with a copy of the layers in so many bits; exit_layer may then be all of them. Extra
    memory: 1 or 0.63 bytes per layer weight, 1 or 2 per head weight. exact: draft with the model itself."""
    draft_confidence: str | None = None
    """End a draft after a token whose own probability is below this, or, with auto, when another token would
    cost more time than it is expected to save; default: drafts have num_speculations tokens."""
    draft_vocabulary: int | None = None
    """Draft with this many rows of the head: the most frequent ids of the sweep of --tuned, or the first ids
    of the tokenizer, and the ids of prompt and output. Default: a quarter of a large head for a copy in fewer
    bits and adaptive decoding, otherwise the whole head."""
    prompt_lookup: int = 0
    """Find the last tokens, up to this many, earlier in prompt and output; draft what followed; 0: off."""
    reuse_cache: bool = False
    """Keep the keys and values of finished requests: only the part of a prompt after the longest common
    prefix is computed."""

    def __post_init__(self) -> None:
        def check(field: str, allowed: str, ok: bool) -> None:
            if not ok:
                raise ValueError(f"{field} {getattr(self, field)!r}: {allowed}")

        names, weights = get_args(GenerationStrategyName), get_args(DraftWeights)
        n = self.no_repeat_ngram_size
        check("generation_strategy", f"must be one of {', '.join(names)}", self.generation_strategy in names)
        check("max_steps", "must be at least 1", self.max_steps >= 1)
        is_layer = self.exit_layer == -1 or self.exit_layer >= 1
        check("exit_layer", "must be -1 (full depth) or at least 1", is_layer)
        is_length = self.num_speculations == -1 or self.num_speculations >= 1
        check("num_speculations", "must be -1 or at least 1", is_length)
        check("draft_weights", f"must be one of {', '.join(weights)}", self.draft_weights in weights)
        check("draft_confidence", "must be auto or between 0 and 1", _is_confidence(self.draft_confidence))
        has_ids = self.draft_vocabulary is None or self.draft_vocabulary >= 1
        check("draft_vocabulary", "must be at least 1", has_ids)
        matched = f"must be between 0 (off) and {_LONGEST_NGRAM}"
        check("prompt_lookup", matched, 0 <= self.prompt_lookup <= _LONGEST_NGRAM)
        check("temperature", "must be 0 (greedy) or more", 0 <= self.temperature < math.inf)
        check("top_k", "must be 0 (off) or more", self.top_k >= 0)
        check("top_p", "must be between 0 and 1", 0 <= self.top_p <= 1)
        check("no_repeat_ngram_size", "must be at least 1", n is None or n >= 1)
        check("stop_words", "must not be empty texts", all(self.stop_words or []))
        check("stop_token_ids", "must be 0 or more", all(i >= 0 for i in self.stop_token_ids or []))

    def check_depth(self, num_layers: int) -> None:
        """Check the settings against the number of layers.

        Raises:
            ValueError: an exit layer that the model does not have; self_speculative without an exit layer or
                num_speculations; settings that adaptive picks itself.
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
        return not self.sample or self.temperature == 0


def _is_confidence(text: str | None) -> bool:
    try:
        return text in (None, "auto") or 0 <= float(text) <= 1
    except ValueError:
        return False


@dataclass(frozen=True)
class LoadingOptions:
    """How to load a model."""

    model_args: Mapping[str, Any] = field(default_factory=dict)
    """Passed to `from_pretrained`."""
    trust_remote_code: bool = False
    """Execute Python code of the model's repository."""
    seed: int = 42
    """Seed of all random generators."""
    dtype: DtypeName = "auto"
    """`auto`: the checkpoint's dtype, but a CPU computes 16-bit weights with float32 activations (see `fuse`)
    or, if it cannot, in float32; others: see `resolve_dtype`."""
    device: str = "auto"
    """See `resolve_device`."""
    parallel: Parallel = "data"
    """`tensor`: split every layer over the processes of torch.distributed, which must be initialised;
    `pipeline`: spread the layers over all devices, and the rest over memory and disk."""
    quantization: Quantization = "none"
    """Quantise the weights of the layers. Activations are not quantised, so a token's result does not depend
    on other tokens of the pass."""
    fuse: bool = True
    """Fuse the layers, see `fused_layers`."""
    compile: bool = False
    """Compile the passes of decoding, see `compiled_runner`."""
