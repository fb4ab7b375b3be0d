"""Are two generations the same, and if not, could rounding have made the difference?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from scipy.stats import chi2_contingency
from torch.func import functional_call
from transformers import LogitsProcessorList, PreTrainedModel

from self_speculation import GenerationStrategyResult
from self_speculation.model.fused_layers import activation_dtype

# A pass over k+1 tokens and one over a single token sum in another order. Over 30 layers of a real model
# (SmolLM2-135M, 260 positions) the gap between the two best logits differed between the two by at most 8.3
# eps in fp32, where every sum rounds, and by 2.1 eps in bf16 and fp16, where sums are kept in fp32 and only
# results round; eps relative to the largest logit. The bounds are twice that.
_NEAR_TIE_IN_EPS = {torch.float32: 16.0, torch.bfloat16: 4.0, torch.float16: 4.0}

# Times that a token has to be expected in a sample to be counted by itself in a chi-square test.
_RARE = 5


def near_tie_bound(model: PreTrainedModel, largest: Any) -> Any:
    """The largest gap between two logits that rounding may turn round, by the largest logit."""
    dtype = activation_dtype(model)
    return _NEAR_TIE_IN_EPS[dtype] * torch.finfo(dtype).eps * largest


def with_end(result: GenerationStrategyResult) -> list[int]:
    """Ids of an answer, with the one that ended it."""
    return result.predicted_tokens + ([] if result.end_token_id is None else [result.end_token_id])


@dataclass(frozen=True)
class Difference:
    """Where two outputs part, and what the full model thinks there."""

    position: int  # of the first token that differs
    best_tokens: tuple[int, int]
    best_logits: tuple[float, float]
    gap: float | None  # best logit minus that of the worse of the two tokens; None: one output has ended
    bound: float  # a gap of at most this is a near-tie

    @property
    def near_tie(self) -> bool:
        """Rounding could have made either choice."""
        return self.gap is not None and self.gap <= self.bound


@torch.inference_mode()
def find_difference(
    model: PreTrainedModel,
    prompt: list[int],
    first: list[int],
    second: list[int],
    processors: Sequence[Callable] = (),
) -> Difference | None:
    """The first position at which two outputs differ; None when they are equal.

    Args:
        first, second: ids, with the id that ended the output where one did.
        processors: the logits processors that both went through.
    """
    if first == second:
        return None
    pairs = enumerate(zip(first, second, strict=False))
    position = next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))
    history = torch.tensor([[*prompt, *first[:position]]], device=model.device)
    # [1, V], by transformers alone; in float32 where that is what widened weights are multiplied in.
    fp32_activations = activation_dtype(model) != model.dtype
    logits = (
        _exact_logits(model, history, 1) if fp32_activations else model(history, logits_to_keep=1).logits[0]
    )
    logits = LogitsProcessorList(processors)(history, logits.float())[0]  # [V]
    best = logits.topk(2)
    chosen = [output[position] for output in (first, second) if position < len(output)]
    scale = float(logits[logits.isfinite()].abs().max())
    return Difference(
        position=position,
        best_tokens=(int(best.indices[0]), int(best.indices[1])),
        best_logits=(float(best.values[0]), float(best.values[1])),
        gap=float(best.values[0] - logits[chosen].min()) if len(chosen) == 2 else None,
        bound=near_tie_bound(model, scale),
    )


class SameDistribution(NamedTuple):
    """A chi-square test that two samples of tokens come from one distribution."""

    p_value: float
    num_kinds: int  # of tokens that were told apart; rare ones count as one


def same_distribution(first: Sequence[int | None], second: Sequence[int | None]) -> SameDistribution:
    """Test two samples.

    Tokens expected fewer than `_RARE` times in a sample are counted as one; None stands for "ended before".
    """
    a, b = Counter(first), Counter(second)
    share = min(len(first), len(second)) / (len(first) + len(second))
    common = [token for token in a.keys() | b.keys() if (a[token] + b[token]) * share >= _RARE]
    table = [[counts[token] for token in common] for counts in (a, b)]
    rest = [len(first) - sum(table[0]), len(second) - sum(table[1])]
    if any(rest):
        table = [[*row, other] for row, other in zip(table, rest, strict=True)]
    num_kinds = len(table[0])
    return SameDistribution(float(chi2_contingency(table).pvalue) if num_kinds > 1 else 1.0, num_kinds)


@dataclass(frozen=True)
class Judged:
    """Tokens of greedy outputs against the model's choices after the same tokens, computed in fp32."""

    equal: int = 0
    near_ties: int = 0
    wrong: int = 0  # others: rounding does not explain them

    def __add__(self, other: Judged) -> Judged:
        return Judged(self.equal + other.equal, self.near_ties + other.near_ties, self.wrong + other.wrong)


def judge_greedy(model: PreTrainedModel, prompt: list[int], output: list[int]) -> Judged:
    """Every token of a greedy output, however decoded; what a near-tie is depends on the model's dtype."""
    ids = torch.tensor([[*prompt, *output]], device=model.device)
    logits = _exact_logits(model, ids[:, :-1], len(output))
    chosen = logits.gather(1, ids[0, len(prompt) :, None])[:, 0]
    gap = logits.amax(-1) - chosen  # [n]
    bound = near_tie_bound(model, logits.abs().amax(-1))
    equal, allowed = int((gap == 0).sum()), int((gap <= bound).sum())
    return Judged(equal, allowed - equal, len(output) - allowed)


@torch.inference_mode()
def _exact_logits(model: PreTrainedModel, ids: torch.Tensor, num_positions: int) -> torch.Tensor:
    """[1, T] ids -> [n, V] logits in fp32 of the last n positions, by the layers of transformers.

    One layer at a time has its weights in fp32: there is no room for a copy of all.
    """
    base: Any = model.base_model
    hidden = base.embed_tokens(ids).float()  # [1, T, H]
    rotary = base.rotary_emb(hidden, position_ids=torch.arange(ids.shape[1], device=ids.device)[None])
    for layer in base.layers:
        hidden = _in_fp32(layer, hidden, attention_mask=None, position_embeddings=rotary)
    return _in_fp32(model.get_output_embeddings(), _in_fp32(base.norm, hidden[0, -num_positions:]))


def _in_fp32(module: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
    weights = {name: weight.float() for name, weight in module.named_parameters()}
    return functional_call(module, weights, args, kwargs)
