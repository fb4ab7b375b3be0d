"""Logits to probabilities to tokens, and the accept rule of drafted tokens.

Tensors in, tensors out. Nothing here reads a value back from a GPU, unless `nucleus` is told so.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import TopKLogitsWarper, TopPLogitsWarper

from self_speculation.config import LEAST_TEMPERATURE, SAMPLING_RULES, GenerationConfig
from self_speculation.transfers import on_device

# Top-p hardly ever keeps more tokens. A draft has no others; on a CPU they are sorted first.
_LIKELY = 128


@dataclass(frozen=True)
class SampledTokens:
    """One token for each of n rows of logits, and the distributions that they were sampled from."""

    tokens: Tensor  # [n]
    probabilities: Tensor | None  # [n, V] in fp32; None when greedy


@dataclass(frozen=True)
class Verification:
    """Outcome of verifying k drafted tokens of each row, on the device of the logits."""

    num_accepted: Tensor  # [...] m, 0 <= m <= k: length of the longest valid prefix of the draft
    next_token: Tensor  # [...] the token after the accepted prefix


def top_k_top_p_filtering(
    logits: Tensor,
    top_k: int = 0,
    top_p: float = 1.0,
    filter_value: float = -math.inf,
    min_tokens_to_keep: int = 1,
) -> Tensor:
    """Keep the `top_k` largest logits and, of those, the smallest set whose mass reaches `top_p`.

    Uses the filters of transformers.

    Args:
        logits: [..., V]; not changed.
        top_k: 0 keeps all.
        top_p: 1.0 keeps all.
        filter_value: replaces the other logits.
        min_tokens_to_keep: the least number of logits to keep.
    """
    rows = logits.reshape(-1, logits.shape[-1])
    if top_k > 0:
        rows = TopKLogitsWarper(top_k, filter_value, min_tokens_to_keep)(None, rows)
    if top_p < 1.0:
        rows = TopPLogitsWarper(top_p, filter_value, min_tokens_to_keep)(None, rows)
    return rows.reshape(logits.shape)


def nucleus(
    probabilities: Tensor, top_p: float, allow_sync: bool | None = None, is_draft: bool = False
) -> Tensor:
    """Top-p of [..., V] probabilities: keep the fewest tokens, at least one, that together reach `top_p`, and
    scale them to sum to 1. Of equally likely tokens it keeps those with the lowest ids.

    Args:
        is_draft: keep none but the `_LIKELY` most likely tokens, so that no vocabulary is sorted. The output
            is exact: a draft may have any distribution that it states.
        allow_sync: whether to read from the device, to sort less; None: on a CPU only. There a read costs
            nothing, and sorting a large vocabulary takes as long as several layers.
    """
    rows = probabilities.reshape(-1, probabilities.shape[-1])
    allow_sync = rows.device.type == "cpu" if allow_sync is None else allow_sync
    is_partial = (allow_sync or is_draft) and rows.shape[1] > _LIKELY
    largest, ids = rows.topk(_LIKELY) if is_partial else rows.sort(descending=True, stable=True)
    # The mass of more likely tokens. A GPU sums a row in any order: in float32 the last token of
    # the nucleus, and so the output of a seed, would vary.
    before = largest.cumsum(-1, dtype=_precise(rows.device)).sub_(largest)
    left_out = before >= max(top_p, torch.finfo(torch.float32).tiny)
    shares = largest.masked_fill(left_out, 0.0)
    kept = torch.zeros_like(rows).scatter_(-1, ids, shares / shares.sum(-1, keepdim=True))
    if is_partial and not is_draft:
        end = left_out.logical_not().sum(-1, keepdim=True)
        is_sure = largest.gather(-1, end - 1) > largest.gather(-1, end.clamp(max=_LIKELY - 1))
        # `topk` orders equal tokens anyhow, and some rows need more. Each row is decided by itself.
        if len(unsure := is_sure.logical_not().nonzero()[:, 0]):
            kept[unsure] = nucleus(rows[unsure], top_p, allow_sync=False)
    return kept.view(probabilities.shape)


def random_numbers(n: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """[n] uniform between 0 and 1, precise enough for `draw`."""
    return torch.rand(n, dtype=_precise(device), device=device, generator=generator)


def _precise(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def draw(weights: Tensor, numbers: Tensor | None = None) -> Tensor:
    """[n, V] weights -> [n] tokens, drawn in proportion to their weights by `random_numbers`; None: new ones.

    Inverts the cumulative sum: one random number for a token, where `multinomial` takes one for every entry
    of the vocabulary.
    """
    if numbers is None:
        numbers = random_numbers(len(weights), weights.device)
    upto = weights.cumsum(-1, dtype=numbers.dtype)  # [n, V]
    tokens = torch.searchsorted(upto, numbers[:, None] * upto[:, -1:], right=True)
    return tokens.squeeze(-1).clamp_(max=weights.shape[-1] - 1)


@dataclass(frozen=True)
class Sampler:
    """Turns logits into tokens: greedy, or by `SAMPLING_RULES`. By default no rule changes probabilities.
    Draft and target share it.
    """

    sample: bool = True
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @classmethod
    def of(cls, config: GenerationConfig) -> Sampler:
        return cls(config.sample, **{name: getattr(config, name) for name in SAMPLING_RULES})

    @property
    def greedy(self) -> bool:
        return not self.sample or self.temperature < LEAST_TEMPERATURE

    def probabilities(self, logits: Tensor, is_draft: bool = False) -> Tensor:
        """[..., V] logits -> [..., V] probabilities in fp32; one-hot when greedy. Those of a draft may lack
        tokens that are not likely, see `nucleus`.
        """
        logits = logits.float()
        if self.greedy:
            return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        if self.temperature != 1:
            logits = logits / self.temperature
        probabilities = top_k_top_p_filtering(logits, self.top_k).softmax(-1)
        if self.top_p < 1:
            probabilities = nucleus(probabilities, self.top_p, is_draft=is_draft)
        if self.min_p:
            least = self.min_p * probabilities.amax(-1, keepdim=True)
            probabilities = probabilities.where(probabilities >= least, 0.0)
            probabilities = probabilities / probabilities.sum(-1, keepdim=True)
        return probabilities

    def __call__(
        self, logits: Tensor, numbers: Tensor | None = None, is_draft: bool = False
    ) -> SampledTokens:
        """Sample one token for each row of logits [n, V], with random numbers [n] if given."""
        if self.greedy:
            return SampledTokens(logits.argmax(-1), None)
        probabilities = self.probabilities(logits, is_draft)
        return SampledTokens(draw(probabilities, numbers), probabilities)

    def confidence(self, sampled: SampledTokens, logits: Tensor) -> Tensor:
        """[n] probabilities of tokens sampled from logits [n, V]. Greedy: of the plain softmax."""
        probabilities = logits.float().softmax(-1) if self.greedy else sampled.probabilities
        assert probabilities is not None
        # NaN where processors forbid every token.
        return probabilities.gather(-1, sampled.tokens[:, None])[:, 0].nan_to_num(0.0)


class SamplerOfRows(Sampler):
    """Samples each row of logits [B, ..., V] with its own sampler. Rows with equal samplers go together."""

    __eq__, __hash__ = object.__eq__, object.__hash__  # settings are those of the rows

    def __init__(self, samplers: Sequence[Sampler], device: torch.device) -> None:
        super().__init__()
        rows: defaultdict[Sampler, list[int]] = defaultdict(list)
        for row, sampler in enumerate(samplers):
            rows[Sampler(False) if sampler.greedy else sampler].append(row)
        self._rows = {sampler: on_device(own, device) for sampler, own in rows.items()}

    def probabilities(self, logits: Tensor, is_draft: bool = False) -> Tensor:
        probabilities = torch.empty_like(logits, dtype=torch.float32)
        for sampler, rows in self._rows.items():
            own = sampler.probabilities(logits.index_select(0, rows), is_draft)
            probabilities.index_copy_(0, rows, own)
        return probabilities

    def confidence(self, sampled: SampledTokens, logits: Tensor) -> Tensor:
        confidence = torch.empty(len(logits), device=logits.device)
        for sampler, rows in self._rows.items():
            assert sampled.probabilities is not None
            own = SampledTokens(sampled.tokens[rows], sampled.probabilities[rows])
            confidence.index_copy_(0, rows, sampler.confidence(own, logits[rows]))
        return confidence


def joint_sampler(samplers: Sequence[Sampler], device: torch.device) -> Sampler:
    """One sampler for all rows."""
    first = samplers[0]
    alike = all(sampler == first or (sampler.greedy and first.greedy) for sampler in samplers)
    return first if alike else SamplerOfRows(samplers, device)


def decode_next_token(
    logits: Tensor,
    token_idx: int | None = None,
    sample: bool = False,
    temperature: float = 0.7,
    top_k: int = 50,
    top_p: float = 0.95,
) -> tuple[Tensor, Tensor | None]:
    """Sample the next token at one position, or at every position.

    Args:
        logits: [B, T, V]; not changed.
        token_idx: the position; negative ones count from the end; None: all T positions.
        sample: False (or temperature 0) takes the most likely token.

    Returns:
        Greedy: tokens [B] of one position or [B, T] of all, and None. Sampled: tokens [B, 1] or [B, T], and
        their distributions [B, V] or [B * T, V].
    """
    if token_idx is not None:
        logits = logits[:, token_idx]
    sampled = Sampler(sample, temperature, top_k, top_p)(logits.reshape(-1, logits.shape[-1]))
    tokens = sampled.tokens.reshape(logits.shape[:-1])
    if sampled.probabilities is not None and token_idx is not None:
        tokens = tokens[:, None]
    return tokens, sampled.probabilities


def verify_draft(
    draft_tokens: Tensor,
    draft_probabilities: Tensor | None,
    target_logits: Tensor,
    sampler: Sampler,
    lengths: Tensor | None = None,
    numbers: Tensor | None = None,
) -> Verification:
    """Accept the longest valid prefix of a draft and pick one more token; the output has the distribution of
    the target.

    Greedy: a drafted token is valid if it is the target's argmax. Sampling: x ~ q is valid with
    probability min(1, p(x)/q(x)); after a rejection the next token comes from norm(max(0, p - q)), after k
    acceptances from p (Leviathan et al., arXiv 2211.17192, algorithm 1; Chen et al., arXiv 2302.01318,
    theorem 1).

    Args:
        draft_tokens: [B, k] or [k], k >= 0.
        draft_probabilities: q, [B, k, V] or [k, V], that the tokens were sampled from; None when greedy, or
            if k is 0.
        target_logits: [B, k + 1, V] or [k + 1, V], processed; position i is that of draft token i.
        sampler: draft and target share it.
        lengths: [B] draft lengths, the other tokens are padding; None: k.
        numbers: [B, k + 1] random numbers for the k acceptances and the next token; None: new ones.

    Raises:
        ValueError: sampled tokens without their distribution.
    """
    k = draft_tokens.shape[-1]
    if sampler.greedy:
        target_tokens = target_logits.argmax(-1)  # [B, k+1]
        num_accepted = _prefix_length(draft_tokens == target_tokens[..., :k], lengths)
        return Verification(num_accepted, target_tokens.gather(-1, num_accepted[..., None])[..., 0])

    if numbers is None:
        shape = target_logits.shape[:-1]
        numbers = random_numbers(shape.numel(), target_logits.device).view(shape)
    p = sampler.probabilities(target_logits)  # [B, k+1, V]
    # q is 0 after the last draft token, so the residual there is p itself.
    q = torch.zeros_like(p)  # [B, k+1, V]
    if k:
        if draft_probabilities is None or draft_probabilities.shape[-2] != k:
            raise ValueError("a sampled draft needs the distribution of each of its tokens")
        q[..., :k, :] = draft_probabilities
    if lengths is not None:
        padding = torch.arange(k + 1, device=q.device) >= lengths[..., None]
        q.masked_fill_(padding[..., None], 0.0)
    x = draft_tokens[..., None]  # [B, k, 1]
    q_x, p_x = (each[..., :k, :].gather(-1, x)[..., 0] for each in (q, p))
    num_accepted = _prefix_length(numbers[..., :k] * q_x < p_x, lengths)

    index = num_accepted[..., None, None]
    p_next, q_next = (each.take_along_dim(index, -2)[..., 0, :] for each in (p, q))  # [B, V]
    residual = (p_next - q_next).clamp(min=0)
    # The sum is 0 where rounding makes p at most q everywhere, and NaN where q is: then p decides.
    residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, p_next)
    next_token = draw(residual.view(-1, residual.shape[-1]), numbers[..., k].reshape(-1))
    return Verification(num_accepted, next_token.view(num_accepted.shape))


def _prefix_length(accepted: Tensor, lengths: Tensor | None) -> Tensor:
    """[..., k] booleans -> [...] number of True before the first False, at most the length."""
    before = accepted.long().cumprod(-1).sum(-1)
    return before if lengths is None else torch.minimum(before, lengths)
