"""Logits to tokens, by noise that belongs to (seed, position in the output, id).

The token of a position is the id with the largest logit + Gumbel noise (Gumbel-max): a sample of the model's
distribution. A draft adds the same noise to other logits, so it often has the target's token, and no draft
changes the text (Daliri et al., arXiv 2408.07978). Greedy decoding is the same without noise.

Tensors in, tensors out. On a GPU nothing here is read. Each row is computed by itself, in one order of sums.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from itertools import takewhile

import torch
from torch import Tensor

from self_speculation.config import LEAST_TEMPERATURE, SAMPLING_RULES, GenerationConfig

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


def _noise_of_all(keys: Tensor, vocab_size: int) -> Tensor:
    """[n] keys -> [n, V] noise of all ids. A CPU keeps the noise of drafted positions for verification."""
    if keys.device.type == "cpu":
        return torch.stack([_noise_of_position(key, vocab_size) for key in keys.tolist()])
    return gumbel_noise(keys, torch.arange(vocab_size, device=keys.device)[None])


@lru_cache(maxsize=24)
def _noise_of_position(key: int, vocab_size: int) -> Tensor:
    return gumbel_noise(torch.tensor([key]), torch.arange(vocab_size)[None])[0]


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
        made = cls(config.sample, **{name: getattr(config, name) for name in SAMPLING_RULES})
        return cls(False) if made.greedy else made  # greedy ones are equal

    @property
    def greedy(self) -> bool:
        return not self.sample or self.temperature < LEAST_TEMPERATURE

    @property
    def filters(self) -> bool:
        """Whether a rule leaves tokens out."""
        return bool(self.top_k or self.top_p < 1 or self.min_p)

    @property
    def rules(self) -> list[float]:
        """[4] temperature, top_k, top_p and min_p, for `RowSampler`."""
        if self.greedy:
            return [0.0, 1.0, math.inf, 0.0]
        top_p = self.top_p if self.top_p < 1 else math.inf
        return [self.temperature, self.top_k or math.inf, top_p, self.min_p]

    def __call__(self, logits: Tensor, keys: Tensor | None, is_draft: bool = False) -> Tensor:
        """The tokens [...] of positions with logits [..., V] and keys [...] of noise (None when greedy).

        Args:
            is_draft: where rules filter, sample among the `_LIKELY` most likely.
        """
        if self.greedy:
            return argmax(logits)
        assert keys is not None
        rows = logits.reshape(-1, logits.shape[-1]).float()
        row_keys = keys.flatten()
        if not self.filters:
            tokens = argmax(_noise_of_all(row_keys, rows.shape[1]).add_(rows / self.temperature))
        elif is_draft:
            likely, ids = rows.topk(min(_LIKELY, rows.shape[1]))
            tokens = _pick(self.keep((likely / self.temperature).softmax(-1)), ids, row_keys)
        else:
            probabilities = (rows / self.temperature).softmax(-1)
            tokens = self._sample_likely(probabilities, row_keys, is_partial=rows.device.type == "cpu")
        return tokens.view(keys.shape)

    def keep(self, likely: Tensor) -> Tensor:
        """Set probabilities that the rules leave out to 0: [..., m] in descending order -> [..., m].

        Top-k keeps all that are equal to the last one, as transformers does.
        """
        if 0 < self.top_k < likely.shape[-1]:
            likely = likely.where(likely >= likely[..., self.top_k - 1, None], 0.0)
        if self.top_p < 1:
            # A GPU sums a row in any order: in float32 the last token of the nucleus, and so the output of a
            # seed, would vary.
            precise = torch.float32 if likely.device.type == "mps" else torch.float64
            upto = likely.cumsum(-1, dtype=precise)
            most = max(self.top_p, torch.finfo(torch.float32).tiny) * (upto[..., -1:] if self.top_k else 1.0)
            likely = likely.where(upto - likely < most, 0.0)
        if self.min_p:
            likely = likely.where(likely >= self.min_p * likely[..., :1], 0.0)
        return likely

    def _sample_likely(self, probabilities: Tensor, keys: Tensor, is_partial: bool) -> Tensor:
        """Sample [n] tokens from probabilities [n, V], among the tokens that the rules keep.

        Args:
            is_partial: sort the `_LIKELY` most likely tokens alone where they are enough. A GPU would have
                to read whether they are.
        """
        num = max(_LIKELY, self.top_k + 1)
        is_partial = is_partial and num < probabilities.shape[1]
        if is_partial:
            likely, ids = probabilities.topk(num)
        else:
            likely, ids = probabilities.sort(descending=True, stable=True)
        kept = self.keep(likely)
        unsure = keys[:0]
        if is_partial:
            end = kept.count_nonzero(-1)[:, None]
            last, after = (likely.gather(-1, at) for at in ((end - 1).clamp(min=0), end.clamp(max=num - 1)))
            # `topk` has no fixed order of equal tokens, and a row may need more. Each row decides alone.
            unsure = (last > after).logical_not().nonzero()[:, 0]
            if len(unsure) == len(keys):
                return self._sample_likely(probabilities, keys, is_partial=False)
        tokens = _pick(kept, ids, keys)
        if len(unsure):
            tokens[unsure] = self._sample_likely(probabilities[unsure], keys[unsure], is_partial=False)
        return tokens


@dataclass(frozen=True)
class RowSampler:
    """As `Sampler`, with the rules of each row in a tensor, so that a CUDA graph of it serves all settings.

    Args:
        filters: a row has a rule that leaves tokens out.
    """

    filters: bool

    @classmethod
    def of(cls, samplers: Sequence[Sampler]) -> RowSampler | None:
        """None: all rows are greedy."""
        if all(sampler.greedy for sampler in samplers):
            return None
        return cls(any(sampler.filters for sampler in samplers))

    def __call__(self, logits: Tensor, keys: Tensor, rules: Tensor, is_draft: bool) -> Tensor:
        """The tokens [n] of positions with logits [n, V], keys [n] of noise and rules [n, 4], see
        `Sampler.rules`.

        Args:
            is_draft: where rules filter, sample among the `_LIKELY` most likely.
        """
        temperature = rules[:, :1]
        is_random = temperature > 0
        scale = temperature.where(is_random, 1.0).float()
        size = logits.shape[1]
        rows = logits.float()
        if not self.filters:
            ids = torch.arange(size, device=logits.device)[None]
            return (gumbel_noise(keys, ids).mul_(is_random) + rows / scale).argmax(-1)
        if is_draft:
            likely, ids = rows.topk(min(_LIKELY, size))
            likely = (likely / scale).softmax(-1)
        else:
            likely, ids = (rows / scale).softmax(-1).sort(descending=True, stable=True)
        kept = self._keep(likely, *rules[:, 1:].split(1, 1))
        best = (gumbel_noise(keys, ids) + kept.log()).argmax(-1)
        tokens = ids.gather(-1, best[:, None])[:, 0]
        return tokens.where(is_random[:, 0], rows.argmax(-1))  # different logits may have one probability

    def _keep(self, likely: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
        """As `Sampler.keep`."""
        least = likely.gather(-1, top_k.clamp(max=likely.shape[-1]).long() - 1)
        likely = likely.where(likely >= least, 0.0)
        upto = likely.cumsum(-1, dtype=torch.float64)
        most = top_p.clamp(min=torch.finfo(torch.float32).tiny) * upto[:, -1:].where(top_k.isfinite(), 1.0)
        likely = likely.where(upto - likely < most, 0.0)
        return likely.where(likely >= min_p.float() * likely[:, :1], 0.0)


def _pick(kept: Tensor, ids: Tensor, keys: Tensor) -> Tensor:
    """[n] tokens, one of each row of ids [n, m], by the row's key and probabilities [n, m] in descending
    order. A probability of 0 is never picked.
    """
    if kept.device.type == "cpu":  # noise of kept ids only
        most = max(1, int(kept.count_nonzero(-1).max()))
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
