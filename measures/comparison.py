"""Compare two generations, and check whether rounding explains their difference."""

import math
from collections.abc import Callable, Sequence

import torch
from transformers import LogitsProcessorList, PreTrainedModel

from runs.description import Record
from self_speculation import GenerationStrategyResult
from self_speculation.backends.cpu_runner import rounds_prompts
from self_speculation.backends.runners import activation_dtype, eager_runner
from self_speculation.backends.sampling import Sampler, gumbel_noise, noise_key
from self_speculation.config import CacheDtypeName

# A pass over k+1 tokens and one over a single token sum in another order. Over 30 layers of a real model
# (SmolLM2-135M, 260 positions) the gap between the two best logits differed between the two by at most 8.3
# eps in fp32, where every sum rounds, and by 2.1 eps in bf16 and fp16, where sums are kept in fp32 and only
# results round; eps relative to the largest logit. The bounds are twice that. Keys and values that round to
# another neighbour differ by an eps of the cache's dtype.
_NEAR_TIE_IN_EPS = {torch.float32: 16.0, torch.bfloat16: 4.0, torch.float16: 4.0}


def with_end(result: GenerationStrategyResult) -> list[int]:
    """Output ids with the end id, if any."""
    return result.predicted_tokens + ([] if result.end_token_id is None else [result.end_token_id])


@torch.inference_mode()
def find_difference(
    model: PreTrainedModel,
    prompt: list[int],
    first: list[int],
    second: list[int],
    processors: Sequence[Callable] = (),
    sampler: Sampler = Sampler(temperature=0.0),  # noqa: B008  # it is frozen
    seed: int = 0,
    cache_dtype: CacheDtypeName = "auto",
) -> Record | None:
    """The first position where two outputs differ, and how far apart the tokens are; None if they are equal.

    `gap` is the full model's best logit minus the logit of the worse token; None: one output has
    ended, or a token is forbidden. Sampled logits are divided by the temperature, plus noise. In a near-tie
    each token is the sampler's if the logit is larger by at most `bound`, which rounding explains.

    Args:
        first, second: output ids with the end id.
        processors, sampler, seed, cache_dtype: of both.
    """
    if first == second:
        return None
    pairs = enumerate(zip(first, second, strict=False))
    position = next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))
    history = torch.tensor([[*prompt, *first[:position]]], device=model.device)
    runner = eager_runner(model)
    cache = runner.new_cache(history.shape[1], history.shape[1], dtype=cache_dtype)
    is_on_cpu = model.device.type == "cpu"
    cache.is_prompt = not is_on_cpu  # the kernels of a card that decode take gigabytes for a long history
    logits = runner.run(cache, history).logits[:, -1]
    logits = LogitsProcessorList(processors)(history, logits.float())  # [1, V]
    keys = torch.tensor([noise_key(seed, position)], device=model.device)
    chosen = [output[position] for output in (first, second) if position < len(output)]
    is_rounded = is_on_cpu and rounds_prompts(model)  # which builds the operators of a CPU
    dtypes = torch.bfloat16 if is_rounded else activation_dtype(model), cache.buffers.dtype
    dtype = max(dtypes, key=lambda each: torch.finfo(each).eps)
    largest = float(logits[logits.isfinite()].abs().max())
    bound = _NEAR_TIE_IN_EPS[dtype] * torch.finfo(dtype).eps * largest
    is_near = len(chosen) == 2
    for token in chosen:
        raised = logits.clone()
        raised[0, token] += bound
        is_near = is_near and int(sampler(raised, keys)) == token
    scores = logits[0]
    if not sampler.greedy:
        ids = torch.arange(logits.shape[1], device=model.device)
        scores = scores / sampler.temperature + gumbel_noise(keys, ids[None])[0]
    gap = float(scores.max() - scores[chosen].min()) if len(chosen) == 2 else math.inf
    return {
        "position": position,
        "gap": gap if math.isfinite(gap) else None,
        "bound": bound,
        "near_tie": is_near,
    }
