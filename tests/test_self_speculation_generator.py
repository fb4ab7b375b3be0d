"""Drafts and batches change nothing: ids are those of a row alone without drafts; greedy, of transformers."""

import re
from unittest.mock import Mock

import pytest
import torch
from conftest import PROMPT, ROOT, generate, ids_of, mixed_drafts, tiny_llama
from transformers import LlamaConfig, LlamaForCausalLM

from self_speculation import GenerationConfig, Request, SelfSpeculativeGenerationStrategy
from self_speculation.engine.scheduler import Scheduler


@pytest.mark.parametrize(
    ("agreement", "rounds", "drafted", "accepted"),
    [("never", 15, (14, 50), [0, 0, 0, 0]), ("always", 3, (3, 12), [3, 3, 3, 3])],
)
def test_counts_of_drafts(agreement, rounds, drafted, accepted):
    """Guards against miscounted drafts, and against drafts beyond the length limit: of 16 tokens one comes
    from the prompt and the rest from rounds of 1 or 5.
    """
    drafts = {"exit_layer": 2, "num_speculations": 4, "max_steps": 16}
    result = generate(tiny_llama(agreement=agreement), PROMPT, eos=[], **drafts)
    drafts = result.draft_stats
    assert (drafts.num_verifications, drafts.mean_accepted_length) == (rounds, 15 / rounds)
    assert (drafts.num_drafts, drafts.num_drafted) == drafted
    assert (drafts.num_accepted, drafts.accepted_by_position) == (sum(accepted), accepted)
    assert result.acceptance_rate == sum(accepted) / drafts.num_drafted


def test_autoregressive_results():
    """Guards against zeros that read as rejected drafts, and against a rate that counts the first token."""
    result = generate(tiny_llama(), PROMPT, max_steps=30, eos=[])
    assert result.acceptance_rate is result.draft_stats is None
    assert result.prefill_time > 0
    assert result.num_decode_tokens == 29
    assert result.decode_tokens_per_second == pytest.approx(29 / result.decode_time)


def test_tokens_after_an_end_id_inside_an_accepted_draft_do_not_count():
    """Guards against counts that include accepted tokens after the end of the output."""
    model = tiny_llama(agreement="always", initializer_range=0.5)
    ids = ids_of(model, max_steps=5)
    end = next(i for i in range(2, 5) if ids[i] not in ids[:i])
    result = generate(model, PROMPT, max_steps=9, eos=[ids[end]], exit_layer=2, num_speculations=8)
    assert result.predicted_tokens == ids[:end]
    assert (result.draft_stats.num_verifications, result.draft_stats.num_accepted) == (1, end)
    assert result.num_decode_tokens == end


def counting_model():
    """Its first layer counts on: the best token after n is n + 1. The whole model says 0 after 5."""
    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 16}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=2)).eval()
    for parameter in model.model.layers.parameters():
        parameter.data *= parameter.ndim == 1  # norms
    model.model.embed_tokens.weight.data = torch.eye(16)
    model.lm_head.weight.data = torch.eye(16).roll(1, 0)
    mlp = model.model.layers[1].mlp
    mlp.gate_proj.weight.data[0, 5] = mlp.up_proj.weight.data[0, 5] = 1  # finds a 5
    mlp.down_proj.weight.data[15, 0] = 1  # and makes it a 15
    return model


class WatchedRound(SelfSpeculativeGenerationStrategy):
    """Keeps the ids and the number of cached positions of each row, before and after a round."""

    def decode_round(self, decoding):
        self.ids = []
        self.cached = []
        for do in (lambda _: None, super().decode_round):
            do(decoding)
            self.ids.append([sequence.all_ids for sequence in decoding.batch.sequences])
            self.cached.append([[length] for length in decoding.cache.lengths(1)])


def test_the_worked_round_of_the_page():
    """Guards against a page that shows another round than the code does."""
    page = (ROOT / "docs" / "how-it-works.md").read_text()
    (shown,) = (part for part in page.split("\n\n") if "\n| ids " in part)
    lines = [line.strip("| ").split("|") for line in shown.splitlines() if line.startswith("| ")]
    table = {name.strip(): [[int(id_) for id_ in row.split()] for row in rows] for name, *rows in lines[1:]}
    model = counting_model()
    strategy = WatchedRound()
    streamers = [Mock(), Mock()]
    config = GenerationConfig(max_steps=9, sample=False, exit_layer=1, num_speculations=3)
    scheduler = Scheduler(strategy, model, config, batch_size=2)
    for row, (ids, streamer) in enumerate(zip(table["ids"], streamers, strict=True)):
        scheduler.add_request(row, Request(ids[:-1], streamer=streamer))
    scheduler.step()
    before, after = strategy.ids
    cached, cached_after = strategy.cached
    drafts = [[int(put.args[0]) for put in each.put.mock_calls if put.kwargs] for each in streamers]
    texts = torch.tensor([[*ids, *draft][-4:] for ids, draft in zip(before, drafts, strict=True)])
    assert table == {
        "ids": before,
        "cached positions": cached,
        "draft": drafts,
        "the whole model after each token": model(texts).logits.argmax(-1).tolist(),
        "accepted": [[len(new) - len(old) - 1] for old, new in zip(before, after, strict=True)],
        "cached positions after the round": cached_after,
        "ids after the round": after,
    }


def test_the_round_that_the_page_writes_has_the_ids_of_the_generator():
    """Guards against a round in the page that no longer runs, or that gives other ids, greedy or sampled. The
    page compares the ids.
    """
    page = (ROOT / "docs" / "how-it-works.md").read_text()
    round_of_one_row, comparison = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert "assert output ==" in comparison
    with mixed_drafts("exit 3"):
        exec(round_of_one_row + comparison, {})


def test_a_processor_runs_once_per_row_of_logits():
    """Guards against processors that run again for tokens that they have seen."""
    processor = Mock(spec=[], side_effect=lambda ids, logits: logits)
    model = tiny_llama(agreement="always")
    drafts = {"exit_layer": 2, "num_speculations": 3, "max_steps": 9, "eos": []}
    result = generate(model, PROMPT, logits_processors=[processor], **drafts)
    drafts = result.draft_stats
    assert processor.call_count == 1 + 2 * drafts.num_drafted + drafts.num_verifications
