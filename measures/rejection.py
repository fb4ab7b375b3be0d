"""What rejection sampling would have accepted in the rounds of a sampled answer.

Rejection sampling (Leviathan et al., arXiv 2211.17192) accepts a drafted token by chance, min(1, p / q),
where p is the token's probability by the model and q by the draft. Over all tokens this is the sum of the
minima of p and q. In this library draft and model share the noise of a position, which accepts fewer tokens.
A replay of the rounds knows both distributions. Nothing decodes so.
"""

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel

from runs.description import Record
from self_speculation import GenerationConfig, Request, Sampler
from self_speculation.backends.runners import eager_runner
from self_speculation.backends.sampling import keep, noise_key
from self_speculation.drafts.registry import DraftContext
from self_speculation.requests.request import config_processors


@torch.inference_mode()
def replay(
    model: PreTrainedModel, config: GenerationConfig, request: Request, tokens: list[int], max_tokens: int
) -> Record:
    """Counts over the rounds of an answer that layers have drafted.

    `num_drafted` and `num_accepted` are those of decoding. `accepted_by_rejection` is the number that
    rejection sampling would have accepted, in expectation, in rounds that begin at the same positions.
    `num_reached` is the number of drafted tokens whose predecessors in the draft were all accepted, `minima`
    the sum over them of the sums of minima.

    Args:
        tokens: the answer, with the end id; nothing drafts the first one.
        max_tokens: the limit of the answer.
    """
    assert not isinstance(request.prompt, str)
    runner = eager_runner(model)
    context = DraftContext(runner, config)
    sampler = Sampler.of(config)
    num_prompt = len(request.prompt)
    ids = torch.tensor([[*request.prompt, *tokens]], device=runner.device)
    processors = LogitsProcessorList(config_processors(config, num_prompt))
    cache = runner.new_cache(num_prompt, ids.shape[1], dtype=config.cache_dtype)
    cache.is_prompt = True
    runner.run(cache, ids[:, :num_prompt], num_logits=0)
    cache.rollback(0)
    cache.is_prompt = False
    counts: Record = dict.fromkeys(("num_drafted", "num_accepted", "num_reached"), 0)
    counts |= dict.fromkeys(("accepted_by_rejection", "minima"), 0.0)
    position = 1
    while position < len(tokens):
        limit = max(0, min(config.num_speculations, max_tokens - position - 1))
        width = min(limit, len(tokens) - position)  # an answer that has ended hides the rest of the draft
        at = num_prompt + position
        inputs = ids[:, at - 1 : at + width]
        accepted = 0
        parts = []
        if width:
            parts.append(context.draft_runner.run(cache, inputs[:, :-1], 0, config.exit_layer, width))
            cache.rollback_draft()
        parts.append(runner.run(cache, inputs, num_logits=width + 1))
        if width:
            draft, target = (
                torch.cat(
                    [
                        processors(ids[:, : at + i], row[None].float())
                        for i, row in enumerate(logits[0, :width])
                    ]
                )
                for logits in (part.logits for part in parts)
            )
            keys = [noise_key(request.seed or 0, position + i) for i in range(width)]
            known = ids[0, at : at + width]
            guesses = sampler(draft, torch.tensor(keys, device=ids.device), is_draft=True)
            accepted = [*(guesses == known).tolist(), False].index(False)
            reached = min(accepted + 1, width)
            p, q = probabilities(sampler, target), probabilities(sampler, draft)
            minima = torch.minimum(p, q).sum(-1)  # [width]
            ratios = (q / p)[torch.arange(width), known].nan_to_num(1.0).clamp(max=1.0)
            survival = torch.cat([ratios.new_ones(1), ratios[:-1]]).cumprod(0)
            counts["accepted_by_rejection"] += float((survival * minima).sum())
            counts["minima"] += float(minima[:reached].sum())
            counts["num_reached"] += reached
        counts["num_drafted"] += limit
        counts["num_accepted"] += accepted
        emitted = min(accepted + 1, len(tokens) - position)
        cache.rollback(width + 1 - emitted)
        position += emitted
    return counts


def probabilities(sampler: Sampler, logits: Tensor) -> Tensor:
    """[n, V] logits -> [n, V] probabilities of the tokens that the sampler draws."""
    likely, ids = (logits.double() / sampler.temperature).softmax(-1).sort(descending=True, stable=True)
    rules = torch.tensor([sampler.numbers], dtype=torch.float64, device=logits.device).expand(len(likely), -1)
    kept = keep(likely, rules, sampler.active)
    return torch.zeros_like(kept).scatter(-1, ids, kept / kept.sum(-1, keepdim=True))
