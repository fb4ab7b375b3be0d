"""Logits to probabilities to tokens, and the rule that accepts or rejects drafted tokens.

Knows nothing of models, caches, text or stop conditions: tensors in, tensors out. Nothing here reads a value
back from a GPU, so a whole round of drafting and verification can stay there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import TopKLogitsWarper, TopPLogitsWarper

from self_speculation.config import GenerationConfig
from self_speculation.transfers import on_device

# Dividing large logits by a temperature below this may overflow fp32.
_SMALL = 1e-20
_FP32 = torch.finfo(torch.float32)

# Top-p first looks among this many of the most likely tokens only: it hardly ever keeps more.
_LIKELY = 128


@dataclass(frozen=True)
class SampledTokens:
    """One token for each of n rows of logits, and the distributions that they were drawn from."""

    tokens: Tensor  # [n]
    probabilities: Tensor | None  # [n, V] in fp32; None when greedy


@dataclass(frozen=True)
class Verification:
    """Outcome of verifying k drafted tokens of each row, on the device of the logits."""

    num_accepted: Tensor  # [...] m, 0 <= m <= k: length of the longest valid prefix of the draft
    next_token: Tensor  # [...] the target's own token after the accepted prefix


def top_k_top_p_filtering(
    logits: Tensor,
    top_k: int = 0,
    top_p: float = 1.0,
    filter_value: float = -math.inf,
    min_tokens_to_keep: int = 1,
) -> Tensor:
    """Set all logits to `filter_value` except the `top_k` largest and, of those, the smallest set whose mass
    reaches `top_p`.

    Args:
        logits: [..., V]; not changed.
        top_k: 0 keeps all.
        top_p: 1.0 keeps all.
        min_tokens_to_keep: this many of the largest are always kept.

    Returns:
        [..., V], a new tensor whenever anything is filtered.

    The filters are the ones of transformers, so that ties and edges are decided as `generate` decides them.
    """
    rows = logits.reshape(-1, logits.shape[-1])
    if top_k > 0:
        rows = TopKLogitsWarper(top_k, filter_value, min_tokens_to_keep)(None, rows)
    if top_p < 1.0:
        rows = TopPLogitsWarper(top_p, filter_value, min_tokens_to_keep)(None, rows)
    return rows.reshape(logits.shape)


def nucleus(
    probabilities: Tensor,
    top_p: float | Tensor,
    top_k: int | Tensor = 0,
    most: int = 0,
    may_look: bool | None = None,
) -> Tensor:
    """Top-p: [..., V] probabilities -> the same for the fewest tokens, at least one, that together reach
    `top_p`, scaled to sum to 1, and 0 for all others.

    Args:
        top_p: of all rows, or [..., 1] of each.
        top_k: of all rows, or [..., 1] of each: at most this many tokens have a probability, apart from ties
            for the last place, which are cut off here where nobody may look; 0: not known.
        most: with a `top_k` of each row, the largest of them; 0: some row whose result counts has none.
        may_look: whether a number may be read from the device, to sort less; None: on a CPU. There, sorting a
            large vocabulary takes as long as several layers, and a read costs nothing. On a GPU, a read waits
            for all that the GPU was given to do.
    """
    vocab_size = probabilities.shape[-1]
    may_look = probabilities.device.type == "cpu" if may_look is None else may_look
    most = top_k if isinstance(top_k, int) else most
    number = min(_LIKELY if may_look else most or vocab_size, vocab_size)
    largest, ids = probabilities.topk(number) if number < vocab_size else probabilities.sort(descending=True)
    if number < vocab_size and may_look and bool((largest.sum(-1, keepdim=True) < top_p).any()):
        largest, ids = probabilities.sort(descending=True)
    before = largest.cumsum(-1) - largest  # the mass of what is more likely
    at_least = top_p.clamp(min=_FP32.tiny) if isinstance(top_p, Tensor) else max(top_p, _FP32.tiny)
    is_out = before >= at_least
    if isinstance(top_k, Tensor) and not may_look:  # a row's ties are cut off as they are without neighbours
        is_out |= (torch.arange(largest.shape[-1], device=largest.device) >= top_k) & (top_k > 0)
    largest = largest.masked_fill(is_out, 0.0)
    return torch.zeros_like(probabilities).scatter_(-1, ids, largest / largest.sum(-1, keepdim=True))


def at_least(probabilities: Tensor, min_p: float | Tensor) -> Tensor:
    """Min-p: [..., V] -> without tokens below `min_p` times the largest probability, scaled to sum to 1."""
    kept = probabilities.where(probabilities >= min_p * probabilities.amax(-1, keepdim=True), 0.0)
    return kept / kept.sum(-1, keepdim=True)


def random_numbers(n: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """[n] uniform between 0 and 1, precise enough for `draw`, by a generator of the device or torch's."""
    precise = torch.float32 if device.type == "mps" else torch.float64
    return torch.rand(n, dtype=precise, device=device, generator=generator)


def draw(weights: Tensor, numbers: Tensor | None = None) -> Tensor:
    """[n, V] weights, none below 0 -> [n] tokens, each drawn with a probability in proportion to its weight.

    The weights of a row lie end to end, and a random point on that line picks the token. That takes one
    random number for a token, where `multinomial` draws one for every entry of the vocabulary.

    Args:
        numbers: [n] from `random_numbers`; None: new ones.
    """
    if numbers is None:
        numbers = random_numbers(len(weights), weights.device)
    upto = weights.cumsum(-1, dtype=numbers.dtype)  # [n, V]
    tokens = torch.searchsorted(upto, numbers[:, None] * upto[:, -1:], right=True)
    return tokens.squeeze(-1).clamp_(max=weights.shape[-1] - 1)


@dataclass(frozen=True)
class Sampler:
    """Turns logits into tokens: greedy, or by temperature, top-k and top-p. Made once per generation.

    Draft and target share one sampler, hence one definition of "the distribution after all processing".
    """

    sample: bool = True
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @classmethod
    def of(cls, config: GenerationConfig) -> Sampler:
        return cls(config.sample, config.temperature, config.top_k, config.top_p, config.min_p)

    @property
    def greedy(self) -> bool:
        return not self.sample or self.temperature == 0

    def probabilities(self, logits: Tensor) -> Tensor:
        """[..., V] logits -> [..., V] probabilities in fp32."""
        logits = logits.float()
        if self.temperature != 1:
            if self.temperature < _SMALL:  # else the largest could become inf, and its softmax NaN
                logits = logits - logits.amax(-1, keepdim=True)
            # fp32 must not take the temperature for 0 or inf.
            logits = logits / min(max(self.temperature, _FP32.tiny), _FP32.max)
        probabilities = top_k_top_p_filtering(logits, self.top_k).softmax(-1)
        if self.top_p < 1:
            probabilities = nucleus(probabilities, self.top_p, self.top_k)
        return at_least(probabilities, self.min_p) if self.min_p else probabilities

    def __call__(self, logits: Tensor, numbers: Tensor | None = None) -> SampledTokens:
        """Pick one token for each row of logits [n, V], with random numbers [n] if they are given."""
        if self.greedy:
            return SampledTokens(logits.argmax(-1), None)
        probabilities = self.probabilities(logits)
        return SampledTokens(draw(probabilities, numbers), probabilities)


class SamplerOfRows:
    """The samplers of B rows that differ, as one: each row of logits [B, ..., V] by its own.

    Greedy rows draw as well, from a distribution that has all of its mass on the most likely token.
    """

    greedy = False

    def __init__(self, samplers: Sequence[Sampler], device: torch.device) -> None:
        self._greedy = on_device([sampler.greedy for sampler in samplers], device).bool()
        # What a greedy row would draw counts for nothing, so it needs no filter.
        samplers = [Sampler() if sampler.greedy else sampler for sampler in samplers]
        temperature = on_device([sampler.temperature for sampler in samplers], device, torch.float32)
        self._is_small, self._temperature = temperature < _SMALL, temperature.clamp(_FP32.tiny, _FP32.max)
        self._top_p = on_device([sampler.top_p for sampler in samplers], device, torch.float32)
        self._top_k = on_device([sampler.top_k for sampler in samplers], device)
        self._has_min_p = any(sampler.min_p for sampler in samplers)
        self._min_p = on_device([sampler.min_p for sampler in samplers], device, torch.float32)
        self._most = max(sampler.top_k for sampler in samplers)
        with_top_p = [sampler.top_k for sampler in samplers if sampler.top_p < 1]
        self._has_top_p, self._most_of_top_p = bool(with_top_p), max(with_top_p, default=0) * all(with_top_p)

    def probabilities(self, logits: Tensor) -> Tensor:
        """As of `Sampler`: [B, ..., V]"""

        def each(of_rows: Tensor) -> Tensor:
            return of_rows.view(-1, *[1] * (logits.dim() - 1))

        logits = logits.float()
        scaled = torch.where(each(self._is_small), logits - logits.amax(-1, keepdim=True), logits)
        scaled = scaled / each(self._temperature)
        if self._most:
            largest = scaled.topk(min(self._most, scaled.shape[-1])).values
            places = each(self._top_k.clamp(1, largest.shape[-1]) - 1).expand(*scaled.shape[:-1], 1)
            is_cut = (scaled < largest.gather(-1, places)) & each(self._top_k > 0)
            scaled = scaled.masked_fill(is_cut, -math.inf)
        probabilities = scaled.softmax(-1)
        if self._has_top_p:
            top_p, top_k = each(self._top_p), each(self._top_k)
            cuts = top_p < 1  # where it is 1, nothing needs to be sorted
            likely = nucleus(probabilities, top_p.where(cuts, 0.0), top_k, self._most_of_top_p)
            probabilities = torch.where(cuts, likely, probabilities)
        if self._has_min_p:
            probabilities = at_least(probabilities, each(self._min_p))
        most_likely = torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        return torch.where(each(self._greedy), most_likely, probabilities)

    def __call__(self, logits: Tensor, numbers: Tensor | None = None) -> SampledTokens:
        """As of `Sampler`, for logits [B, V]."""
        probabilities = self.probabilities(logits)
        return SampledTokens(draw(probabilities, numbers), probabilities)


def joint_sampler(samplers: Sequence[Sampler], device: torch.device) -> Sampler | SamplerOfRows:
    """One sampler for rows of which each has its own; that of all where they agree."""
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
    """Pick the next token at one position, or at every position.

    Args:
        logits: [B, T, V]; not changed.
        token_idx: the position to decode, negative ones counted from the end; None decodes all T.
        sample: False (or temperature 0) takes the most likely token.

    Returns:
        Greedy: the tokens, [B] of one position or [B, T] of all, and None. Sampled: the tokens, [B, 1] or
        [B, T], and a row of probabilities for each of them, [B, V] or [B * T, V].
    """
    if token_idx is not None:
        logits = logits[:, token_idx]
    choice = Sampler(sample, temperature, top_k, top_p)(logits.reshape(-1, logits.shape[-1]))
    tokens = choice.tokens.reshape(logits.shape[:-1])
    if choice.probabilities is not None and token_idx is not None:
        tokens = tokens[:, None]
    return tokens, choice.probabilities


def verify_draft(
    draft_tokens: Tensor,
    draft_probabilities: Tensor | None,
    target_logits: Tensor,
    sampler: Sampler | SamplerOfRows,
    lengths: Tensor | None = None,
    numbers: Tensor | None = None,
) -> Verification:
    """Accept the longest valid prefix of a draft and pick one more token, so that the output is what the
    target alone would give; for B rows, or for one.

    Greedy: a drafted token is valid if it is the target's argmax. Sampling: x ~ q is valid with
    probability min(1, p(x)/q(x)); at the first rejection the next token comes from norm(max(0, p - q)), after
    k acceptances from p (Leviathan et al., arXiv 2211.17192, algorithm 1; Chen et al., arXiv 2302.01318,
    theorem 1).

    Args:
        draft_tokens: [B, k] or [k], k >= 0.
        draft_probabilities: q, [B, k, V] or [k, V], exactly what the tokens were drawn from; None when
            greedy.
        target_logits: [B, k + 1, V] or [k + 1, V], processed; row i is the target's for the position of draft
            token i.
        sampler: the sampler that drew the draft.
        lengths: [B] how many of a row's k tokens are its draft, the rest being padding; None: all.
        numbers: [B, k + 1] random numbers, those of the acceptances and that of the next token; None: new
            ones.
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
    # With q = 0 after the last draft token, "all accepted: draw from p" is the residual rule again.
    q = torch.zeros_like(p)  # [B, k+1, V]
    if draft_probabilities is not None:
        q[..., :k, :] = draft_probabilities
    if lengths is not None:
        padding = torch.arange(k + 1, device=q.device) >= lengths[..., None]
        q.masked_fill_(padding[..., None], 0.0)
    x = draft_tokens[..., None]  # [B, k, 1]
    q_x, p_x = (of_all[..., :k, :].gather(-1, x)[..., 0] for of_all in (q, p))
    num_accepted = _prefix_length(numbers[..., :k] * q_x < p_x, lengths)

    place = num_accepted[..., None, None]
    p_next, q_next = (torch.take_along_dim(of_all, place, -2)[..., 0, :] for of_all in (p, q))  # [B, V]
    residual = (p_next - q_next).clamp(min=0)
    residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, p_next)
    next_token = draw(residual.view(-1, residual.shape[-1]), numbers[..., k].reshape(-1))
    return Verification(num_accepted, next_token.view(num_accepted.shape))


def _prefix_length(accepted: Tensor, lengths: Tensor | None) -> Tensor:
    """[..., k] booleans -> [...] how many come before the first False, but no more than the length; int64."""
    before = accepted.long().cumprod(-1).sum(-1)
    return before if lengths is None else torch.minimum(before, lengths)
