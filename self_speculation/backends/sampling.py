"""Logits to tokens, by noise that belongs to (seed, position in the output, id).

The token of a position is the id with the largest logit + Gumbel noise (Gumbel-max): a sample of the model's
distribution. A draft adds the same noise to other logits, so it often has the target's token, and no draft
changes the text (Daliri et al., arXiv 2408.07978). Greedy decoding is the same without noise.

Tensors in, tensors out. On a GPU nothing here is read. Each row is computed by itself, in one order of sums.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import make_dataclass
from functools import cached_property, lru_cache
from hashlib import blake2b
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from self_speculation.config import LEAST_TEMPERATURE, SAMPLING_RULES, GenerationConfig
from self_speculation.machine.transfers import on_device

# Rules hardly ever keep more ids than this. A draft samples among this many; a CPU sorts this many first.
_LIKELY = 128


def argmax(scores: Tensor) -> Tensor:
    """[..., V] -> [...] the id of the largest score, as `Tensor.argmax`. NaN is larger than any number."""
    return torch.as_tensor(scores.detach().numpy().argmax(-1)) if _is_for_numpy(scores) else scores.argmax(-1)


def amax(scores: Tensor) -> Tensor:
    """[..., V] -> [...] the largest score, or NaN if one is NaN."""
    return torch.as_tensor(scores.detach().numpy().max(-1)) if _is_for_numpy(scores) else scores.amax(-1)


def _is_for_numpy(scores: Tensor) -> bool:
    """On a CPU torch takes 10 times as long, and 100 times beside busy programs: threads wait."""
    return scores.device.type == "cpu" and scores.dtype == torch.float32


def noise_key(seed: int, position: int) -> int:
    """The key of a position's noise: 64 bits."""
    digest = blake2b(b"%d %d" % (seed, position), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def gumbel_noise(keys: Tensor, ids: Tensor) -> Tensor:
    """Standard Gumbel noise of ids, finite, in fp32: a function of key and id.

    SplitMix64, seeded with the key, makes a sequence of numbers (Steele et al., OOPSLA 2014). Entry `id` of
    the sequence becomes the noise of this id.

    Args:
        keys: [n] by `noise_key`.
        ids: [n or 1, m].

    Returns:
        [n, m]
    """
    x = ids * -0x61C8864680B583EB + keys[:, None]  # int64 wraps around
    x ^= (x >> 30) & (2**34 - 1)
    x *= -0x40A7B892E31B1A47
    x ^= (x >> 27) & (2**37 - 1)
    x *= -0x6B2FB644ECCEEE15
    x >>= 33
    x &= 2**31 - 1
    # -v with 0 < v < 1 in fp32. A small v, whose noise is large, keeps all bits.
    minus_v = x.float().mul_(-(2.0**-31) * (1 - 2.0**-24)).sub_(2.0**-32)
    return minus_v.log1p_().neg_().log_().neg_()


@lru_cache(maxsize=24)
def _noise_of_position(key: int, vocab_size: int) -> Tensor:
    """[V] noise of all ids. That of drafted positions is kept for verification."""
    return gumbel_noise(torch.tensor([key]), torch.arange(vocab_size)[None])[0]


# A field for each rule. Type checkers do not know classes that are made from a table: Any.
_Rules: Any = make_dataclass(
    "_Rules", [(name, float, rule.neutral) for name, rule in SAMPLING_RULES.items()], frozen=True
)


class Sampler(_Rules):
    """A row's value of each of `SAMPLING_RULES`. The default values change no probability. A temperature of 0
    is greedy. Draft and target share a sampler.
    """

    @classmethod
    def of(cls, config: GenerationConfig) -> Sampler:
        if config.greedy:
            return cls(temperature=0.0)  # greedy samplers are equal
        return cls(*(getattr(config, name) for name in SAMPLING_RULES))

    @property
    def greedy(self) -> bool:
        return self.temperature < LEAST_TEMPERATURE

    @cached_property
    def numbers(self) -> list[float]:
        """The values in the order of `SAMPLING_RULES`."""
        return [float(getattr(self, name)) for name in SAMPLING_RULES]

    @cached_property
    def active(self) -> tuple[str, ...]:
        """Names of the temperature and of the rules that filter, in order; (): greedy."""
        if self.greedy:
            return ()
        rules = SAMPLING_RULES.items()
        return tuple(name for name, rule in rules if rule.keep is None or getattr(self, name) != rule.neutral)

    def __call__(self, logits: Tensor, keys: Tensor | None, is_draft: bool = False) -> Tensor:
        """The tokens [...] of positions with logits [..., V], see `sample`."""
        rows = logits.reshape(-1, logits.shape[-1])
        tokens = sample(rows, None if keys is None else keys.flatten(), [self] * len(rows), is_draft)
        return tokens.view(logits.shape[:-1])


def sample(
    logits: Tensor, keys: Tensor | None, samplers: Sequence[Sampler], is_draft: bool = False
) -> Tensor:
    """The tokens [N] of positions with logits [N, V], keys [N] of noise and samplers [N].

    Args:
        keys: None: all samplers are greedy.
        is_draft: where rules filter, sample among the `_LIKELY` most likely.
    """
    groups: dict[tuple[str, ...], list[int]] = {}  # positions with the same rules, of any values
    for position, sampler in enumerate(samplers):
        groups.setdefault(sampler.active, []).append(position)
    active = tuple(name for name in SAMPLING_RULES if any(name in names for names in groups))
    if not active:
        return argmax(logits)
    assert keys is not None
    is_on_cpu = logits.device.type == "cpu"
    if is_on_cpu and len(groups) > 1:  # no row sorts because another one does
        tokens = torch.empty_like(keys)
        for positions in groups.values():
            members = [samplers[position] for position in positions]
            tokens[positions] = sample(logits[positions], keys[positions], members, is_draft)
        return tokens
    # A GPU sums a row in any order: in float32 the last token of the nucleus, and so a seed's output, varies.
    precise = torch.float32 if logits.device.type == "mps" else torch.float64
    numbers = [number for sampler in samplers for number in sampler.numbers]
    rules = on_device(numbers, logits.device, precise).view(len(samplers), -1)
    if not is_on_cpu:
        return sample_by_rules(logits, keys, rules, active, is_draft)
    rows = logits.float()
    scale = rules[:, :1].float()
    if len(active) == 1:
        noise = torch.stack([_noise_of_position(key, rows.shape[1]) for key in keys.tolist()])
        return argmax(noise.add_(rows / scale))
    if is_draft:
        likely, ids = rows.topk(min(_LIKELY, rows.shape[1]))
        return _pick(keep((likely / scale).softmax(-1), rules, active), ids, keys)
    return _sample_likely((rows / scale).softmax(-1), keys, rules, active, is_partial=True)


def sample_by_rules(
    logits: Tensor, keys: Tensor, rules: Tensor, active: tuple[str, ...], is_draft: bool
) -> Tensor:
    """As `sample`, with the rules of rows in a tensor [N, n]. Nothing is read, so a CUDA graph serves all
    values of rules.

    Args:
        active: names of the rules that rows may have, from the temperature on.
    """
    temperature = rules[:, :1]
    is_random = temperature >= LEAST_TEMPERATURE
    scale = temperature.where(is_random, 1.0).float()
    rows = logits.float()
    if len(active) == 1:
        ids = torch.arange(rows.shape[1], device=rows.device)[None]
        return (gumbel_noise(keys, ids).mul_(is_random) + rows / scale).argmax(-1)
    if is_draft:
        likely, ids = rows.topk(min(_LIKELY, rows.shape[1]))
        likely = (likely / scale).softmax(-1)
    else:
        likely, ids = (rows / scale).softmax(-1).sort(descending=True, stable=True)
    best = (gumbel_noise(keys, ids) + keep(likely, rules, active).log()).argmax(-1)
    tokens = ids.gather(-1, best[:, None])[:, 0]
    return tokens.where(is_random[:, 0], rows.argmax(-1))  # different logits may have one probability


def keep(likely: Tensor, rules: Tensor, active: Sequence[str], is_partial: bool = False) -> Tensor:
    """Set probabilities that the rules [n, r] leave out to 0: [n, m] in descending order -> [n, m].

    Args:
        active: names of the rules that rows may have.
        is_partial: there are more than m tokens. A rule that needs the sum of tokens beyond m keeps none.
    """
    total = torch.ones_like(rules[:, :1])
    for at, (name, rule) in enumerate(SAMPLING_RULES.items()):
        if name not in active or rule.keep is None:
            continue
        number = rules[:, at, None]
        has_rule = number != rule.neutral
        likely = rule.keep(likely, number, total).where(has_rule, likely)
        if name != active[-1]:  # a later rule may need the sum
            kept = likely.sum(-1, keepdim=True, dtype=rules.dtype)
            if is_partial:
                kept = kept.where(likely[:, -1:] == 0, math.nan)
            total = kept.where(has_rule, total)
    return likely


def _sample_likely(
    probabilities: Tensor, keys: Tensor, rules: Tensor, active: tuple[str, ...], is_partial: bool
) -> Tensor:
    """Sample [n] tokens from probabilities [n, V], among the tokens that the rules keep.

    Args:
        is_partial: sort the `_LIKELY` most likely tokens alone where they are enough.
    """
    num = _LIKELY
    for at, (name, rule) in enumerate(SAMPLING_RULES.items()):
        if rule.is_count and name in active:
            num = max(num, 1 + int(rules[:, at].max()))
    is_partial = is_partial and num < probabilities.shape[1]
    if is_partial:
        likely, ids = probabilities.topk(num)
    else:
        likely, ids = probabilities.sort(descending=True, stable=True)
    kept = keep(likely, rules, active, is_partial)
    unsure = keys[:0]
    if is_partial:
        end = kept.count_nonzero(-1)[:, None]
        last, after = (likely.gather(-1, at) for at in ((end - 1).clamp(min=0), end.clamp(max=num - 1)))
        # `topk` has no fixed order of equal tokens, and a row may need more. Each row decides alone.
        unsure = (last > after).logical_not().nonzero()[:, 0]
        if len(unsure) == len(keys):
            return _sample_likely(probabilities, keys, rules, active, is_partial=False)
    tokens = _pick(kept, ids, keys)
    if len(unsure):
        tokens[unsure] = _sample_likely(
            probabilities[unsure], keys[unsure], rules[unsure], active, is_partial=False
        )
    return tokens


def _pick(kept: Tensor, ids: Tensor, keys: Tensor) -> Tensor:
    """[n] tokens, one of each row of ids [n, m], by the row's key and probabilities [n, m] in descending
    order. A probability of 0 is never picked.
    """
    most = max(1, int(kept.count_nonzero(-1).max()))  # noise of kept ids only
    kept = kept[:, :most].contiguous()
    ids = ids[:, :most]
    best = argmax(kept.log().add_(gumbel_noise(keys, ids)))
    return ids.gather(-1, best[:, None])[:, 0]


def leading_matches(drafted: Sequence[float], tokens: Sequence[float], lengths: Sequence[int]) -> list[int]:
    """[B] accepted tokens of each draft: the ones before the first difference from the target's tokens.

    Args:
        drafted: [K] ids, row by row.
        tokens: [K + B] ids of the target, row by row: one more than drafted in each row.
        lengths: [B] drafted tokens of each row.
    """
    accepted = []
    start = 0
    for row, length in enumerate(lengths):
        pairs = zip(drafted[start : start + length], tokens[start + row :], strict=False)
        accepted.append(sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)))
        start += length
    return accepted
