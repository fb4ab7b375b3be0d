"""Sources of drafts: what they propose and learn. That the output does not depend on them is in
test_equality.py and test_sampling_distribution.py.
"""

import copy
import random
from collections import Counter

import pytest
import torch
from conftest import generate, tiny_llama
from hypothesis import given
from hypothesis import strategies as st

from self_speculation.decoding.sampling import Sampler
from self_speculation.drafts import table
from self_speculation.drafts.costs import Costs, RoundTimes
from self_speculation.drafts.draft import Draft
from self_speculation.drafts.estimates import DecayedLine, DecayedMean
from self_speculation.drafts.layers import LayerDrafts
from self_speculation.drafts.policy import PLAIN, AdaptivePolicy, Arm, Memory, Plan
from self_speculation.drafts.prompt_lookup import NgramIndex
from self_speculation.drafts.threshold import FixedThreshold, LearnedThreshold
from self_speculation.model.quantized_layers import formats

PROMPT = [5, 9, 4, 7, 7, 3]


def by_scanning(ids, longest, num_tokens):
    """What the index is for, by looking at every place."""
    for n in range(min(longest, len(ids) - 1), 0, -1):
        for start in range(len(ids) - n - 1, -1, -1):
            if ids[start : start + n] == ids[-n:]:
                followed = ids[start + n :]
                while len(followed) < num_tokens:
                    followed = followed + ids[start + n :]
                return n, followed[:num_tokens]
    return 0, []


@given(st.lists(st.integers(0, 3), max_size=30), st.integers(1, 4), st.integers(1, 6), st.integers(1, 8))
def test_the_index_finds_what_a_scan_finds(ids, longest, num_tokens, step):
    """Guards against a run that finds itself, an old place or a short match that is preferred."""
    index = NgramIndex(longest)
    for start in range(0, len(ids), step):
        index.extend(ids[start : start + step])
        assert index.lookup(num_tokens) == by_scanning(ids[: len(index)], longest, num_tokens)


def test_a_repetition_is_guessed_to_its_end():
    index = NgramIndex(3)
    index.extend([1, 2, 3, 1, 2, 3, 1])
    assert index.lookup(7) == (3, [2, 3, 1, 2, 3, 1, 2])


def test_lookups_are_drafted_and_cost_no_layers():
    """Without layers a token decides the next one, so the output soon goes round in a circle."""
    model = tiny_llama(agreement="always", exit_layer=0)
    shared = {"max_steps": 60, "eos": []}
    plain = generate(model, PROMPT, **shared)
    result = generate(model, PROMPT, exit_layer=2, num_speculations=4, prompt_lookup=3, **shared)
    assert result.predicted_tokens == plain.predicted_tokens
    rounds, drafted, accepted = result.drafts_by_source["lookup"]
    assert rounds > 3
    assert drafted <= 4 * rounds
    assert accepted > rounds
    assert sum(counts[0] for counts in result.drafts_by_source.values()) == result.num_verifications
    assert sum(counts[2] for counts in result.drafts_by_source.values()) == result.num_accepted


def test_confidence_ends_drafts():
    """At 1 every draft ends with its first token, at 0 none does."""
    model = tiny_llama()
    shared = {"max_steps": 30, "eos": [], "exit_layer": 2, "num_speculations": 5}
    short = generate(model, PROMPT, draft_confidence="1", **shared)
    assert short.num_drafted <= short.num_verifications
    full = generate(model, PROMPT, draft_confidence="0", **shared)
    assert full.drafted_by_position == generate(model, PROMPT, **shared).drafted_by_position


@pytest.mark.parametrize("sample", [True, False])
@pytest.mark.parametrize("confidence", ["auto", "0.5"])
def test_a_draft_that_may_say_nothing_is_not_confident(confidence, sample):
    """Guards against a confidence that is no number: the only id that the draft knows is forbidden."""
    result = generate(
        copy.deepcopy(tiny_llama()), [0, 5], max_steps=20, eos=[], exit_layer=2, num_speculations=4,
        sample=sample, draft_vocabulary=1, no_repeat_ngram_size=1, draft_confidence=confidence,
    )  # fmt: skip
    assert len({*result.predicted_tokens}) == 20
    assert (result.num_accepted, result.num_drafted) == (0, 18)  # one at a time, and none for the last token


def test_a_threshold_learns_from_what_was_accepted():
    """Guards against a rule that ignores what became of drafts: never accepted, they become short."""
    shared = {"max_steps": 100, "eos": [], "exit_layer": 1, "num_speculations": 6, "draft_confidence": "auto"}
    length = {}
    for agreement in ("never", "always"):
        result = generate(tiny_llama(agreement=agreement, exit_layer=1), PROMPT, **shared)
        length[agreement] = result.num_drafted / result.num_verifications
    assert length["never"] < 1.5
    assert length["always"] > 2 * length["never"]


@pytest.mark.parametrize("weights", ["exact", "int8", "int4"])
@pytest.mark.parametrize("confidence", ["0.2", "0.5", "auto"])
def test_running_ahead_of_a_threshold_changes_nothing(confidence, weights, monkeypatch):
    """As on a GPU: a pass is begun before the threshold is asked. Guards against a pass too many in the
    cache, or in the states that verification goes on from.
    """
    config = {"exit_layer": 2, "num_speculations": 5, "draft_confidence": confidence}
    shared = {"max_steps": 50, "eos": [], "draft_weights": weights, **config}
    model = tiny_llama(fused=True)
    waiting = generate(model, PROMPT, **shared)
    always = property(lambda source: True, lambda source, value: None)
    monkeypatch.setattr(LayerDrafts, "_runs_ahead", always, raising=False)
    ahead = generate(model, PROMPT, **shared)
    assert ahead.predicted_tokens == waiting.predicted_tokens
    assert ahead.drafts_by_source == waiting.drafts_by_source
    assert ahead.drafted_by_position == waiting.drafted_by_position
    # Besides the last rounds, which have no room for more, some ended early.
    assert ahead.num_drafted < 5 * ahead.num_verifications - sum(range(5))


def test_decayed_mean():
    mean = DecayedMean(1.0, weight=2.0)
    assert mean.value == 1.0
    mean.add(4.0)
    assert mean.value == pytest.approx((2 + 4) / 3)
    mean.add(0.0)
    assert mean.value == pytest.approx((2 + 0.95 * 4) / (2 + 0.95 + 1))
    for _ in range(500):
        mean.fade()
    assert mean.value == pytest.approx(1.0)


def test_thresholds():
    assert FixedThreshold(0.5).goes_on([0.1, 0.5])
    assert not FixedThreshold(0.5).goes_on([0.9, 0.4])
    cheap, dear = LearnedThreshold(0.05), LearnedThreshold(0.9)
    assert cheap.threshold < dear.threshold
    for _ in range(200):  # confident tokens are accepted, others are not
        cheap.learn([0.95, 0.15, 0.95], 1)
    assert cheap.goes_on([0.95, 0.95])
    assert not cheap.goes_on([0.95, 0.15])


def test_what_cannot_be_drafted_is_refused():
    with pytest.raises(ValueError, match="exit_layer 5: must be between 1 and 4"):
        generate(tiny_llama(fused=True), PROMPT, exit_layer=5, num_speculations=2, draft_weights="int8")
    with pytest.raises(ValueError, match="draft_confidence 'often': must be auto or between 0 and 1"):
        generate(tiny_llama(), PROMPT, exit_layer=2, num_speculations=2, draft_confidence="often")
    with pytest.raises(ValueError, match="prompt_lookup -1: must be between 0"):
        generate(tiny_llama(), PROMPT, exit_layer=2, num_speculations=2, prompt_lookup=-1)


def policy(memory=None, copy_takes=None):
    """Of a model with exits at layers 2 and 4 of 10.

    Args:
        copy_takes: estimated cost of a token drafted by a copy of all ten layers; None: there is none.
    """
    arms = {
        "exit 2": Arm(0.2),
        "exit 4": Arm(0.4, below="exit 2"),
        "lookup": Arm(priors=[0.3, 0.5, 0.7, 0.9]),
    }
    if copy_takes is not None:
        arms["exit 10"] = Arm(copy_takes, (0.9,), trust=6.0)
    return AdaptivePolicy(arms, 8, memory)


# Seconds of a round: those of no token, and of each that is drafted.
TAKES = {
    PLAIN: (1.0, 0.0),
    "exit 2": (1.0, 0.25),
    "exit 4": (1.0, 0.45),
    "lookup": (1.0, 0.05),
    "exit 10": (1.0, 0.35),
}


def seconds(plan, takes=TAKES):
    return takes[plan.source][0] + takes[plan.source][1] * plan.length


def play(policy, chances, rounds=300, matched=None, takes=TAKES):
    """Rounds of a model whose exits guess right by these chances; the plans that were made."""
    draws, plans = random.Random(0), []
    ready = {name: [0] for name in policy._arms if name not in ("lookup", PLAIN)} | {"lookup": [matched]}
    for _ in range(rounds):
        plan = policy.plan(ready, [8])
        chance = chances.get(plan.source, 0)
        accepted = 0
        while accepted < plan.length and draws.random() < chance:
            accepted += 1
        policy.took(plan, 1, seconds(plan, takes) * draws.uniform(0.95, 1.05))
        policy.learn(plan, [ready.get(plan.source, [0])[0]], [plan.length], [accepted])
        plans.append(plan)
    return plans


@pytest.mark.parametrize(
    ("chances", "best"),
    [
        ({"exit 2": 0.9, "exit 4": 0.92}, "exit 2"),
        ({"exit 2": 0.2, "exit 4": 0.95}, "exit 4"),
        ({"exit 2": 0.05, "exit 4": 0.1}, PLAIN),
    ],
)
def test_the_policy_finds_the_best_exit_or_none(chances, best):
    """A deep exit has to be that much better; where none is good, plain steps are made."""
    late = play(policy(), chances, rounds=600)[300:]
    assert sum(plan.source == best for plan in late) > 0.8 * len(late)


def test_longer_drafts_where_more_is_accepted():
    sure = play(policy(), {"exit 2": 0.98, "exit 4": 0.98})[-1]
    unsure = play(policy(), {"exit 2": 0.6, "exit 4": 0.6})[-1]
    assert sure.length > unsure.length > 0


def mostly(plans):
    """The source of most rounds: some are made to see what another one is worth."""
    return Counter(plan.source for plan in plans).most_common(1)[0][0]


def share_lost(plans):
    """Of the time, what drafts took that gave nothing."""
    return sum(seconds(plan) - 1.0 for plan in plans) / sum(map(seconds, plans))


@pytest.mark.parametrize("good", ["exit 4", "exit 10"])
def test_a_source_that_has_become_good_is_noticed(good):
    """Guards against an exit or a copy that is never drafted with again, because once it was bad; and against
    trials that nobody limits.
    """
    chooser = policy(copy_takes=0.3)
    play(chooser, {})
    bad = play(chooser, {}, rounds=2000)
    assert {plan.source for plan in bad} == {PLAIN, "exit 2", "exit 4", "exit 10"}
    assert share_lost(bad) < 0.04
    assert mostly(play(chooser, {good: 0.95}, rounds=3000)[-100:]) == good


def test_what_rounds_take_is_learnt_and_a_bad_moment_is_forgotten():
    """Guards against an estimate that is believed for ever, and against one stall that rules out a source."""
    dear = TAKES | {"exit 2": (1.5, 0.9)}
    sure = {"exit 2": 0.9}
    chooser = policy()
    assert mostly(play(chooser, sure, rounds=300, takes=dear)[-100:]) == PLAIN
    assert mostly(play(chooser, sure, rounds=3000)[-100:]) == "exit 2"
    times = RoundTimes(warm_up=0)
    for _ in range(20):
        times.add("exit 2", 1, 0.2, 4, 2.0)
    usual = times.line("exit 2", 1, 0.2)
    times.add("exit 2", 1, 0.2, 4, 1000.0)
    assert sum(times.line("exit 2", 1, 0.2)) < 2 * sum(usual)
    for _ in range(60):
        times.add("exit 2", 1, 0.2, 4, 2.0)
    assert times.line("exit 2", 1, 0.2) == pytest.approx(usual, rel=0.05)


@pytest.mark.parametrize("stalled", [(PLAIN, 2), ("exit 2", 2), ("exit 4", 2), ("exit 4", 3)])
def test_a_stall_among_the_first_rounds_rules_out_no_source(stalled, monkeypatch):
    """Guards against a process that is stopped for a while, in a round of a source that is hardly known."""
    chooser, rounds, took = policy(), Counter(), AdaptivePolicy.took

    def slow_once(self, plan, num_rows, seconds):
        rounds[plan.source] += 1
        took(self, plan, num_rows, 1000.0 if (plan.source, rounds[plan.source]) == stalled else seconds)

    monkeypatch.setattr(AdaptivePolicy, "took", slow_once)
    assert mostly(play(chooser, {"exit 2": 0.2, "exit 4": 0.95}, rounds=1000)[-100:]) == "exit 4"


def test_times_begin_as_estimates_in_the_unit_of_what_was_measured():
    """Guards against seconds of one source that are compared with plain steps of another, and against first
    rounds, which may have compiled something.
    """
    times = RoundTimes(warm_up=1)
    assert times.line("exit 2", 1, 0.2) == pytest.approx((1.0, 0.2))
    times.add(PLAIN, 1, 0.0, 0, 60.0)
    assert times.line("exit 2", 1, 0.2) == pytest.approx((1.0, 0.2))
    times.add(PLAIN, 1, 0.0, 0, 0.01)
    assert times.line("exit 2", 1, 0.2) == pytest.approx((0.01, 0.002))
    assert times.line("exit 2", 8, 0.2) == pytest.approx((0.01, 0.002))


def test_a_decayed_line():
    line = DecayedLine()
    assert line.fitted(3.0, 0.5) == pytest.approx((3.0, 0.5))
    for x in (1, 5, 2, 8) * 20:
        line.add(x, 2.0 + 0.25 * x)
    assert line.fitted(3.0, 0.5) == pytest.approx((2.0, 0.25), rel=0.1)
    for x in (1, 5, 2, 8) * 20:
        line.add(x, 9.0 - x)
    assert line.fitted(3.0, 0.5)[1] == 0.0  # more tokens never take less time


def test_lookups_are_rounds_among_others():
    exits = {"exit 2": 0.5, "exit 4": 0.5}
    assert mostly(play(policy(), {**exits, "lookup": 0.95}, matched=3)[-100:]) == "lookup"
    assert mostly(play(policy(), {**exits, "exit 2": 0.9, "lookup": 0.0}, matched=3)[-100:]) == "exit 2"


def test_the_second_answer_knows_what_the_first_one_learnt():
    """Guards against an answer that begins from nothing: of 30 rounds, most would go into finding out."""

    def good_rounds(plans):
        return sum(plan.source == "exit 4" for plan in plans)

    chances, memory = {"exit 2": 0.0, "exit 4": 0.95}, Memory()
    first = play(policy(memory=memory), chances, rounds=30)
    second = play(policy(memory=memory), chances, rounds=30)
    assert second[0].source == "exit 4"
    assert good_rounds(second) > good_rounds(first)


def test_exits_that_were_never_right_are_not_drafted_with_again():
    """Guards against every answer of a model without early exits paying for the same disappointment."""
    memory = Memory()
    for answer in range(8):
        plans = play(policy(memory=memory), {"exit 2": 0.0, "exit 4": 0.0}, rounds=40)
        if answer:
            assert sum(plan.source != PLAIN for plan in plans) <= 4


def test_a_model_that_has_changed_its_ways_is_noticed():
    """Guards against a memory that outweighs what the answer at hand shows."""
    memory = Memory()
    for _ in range(20):
        play(policy(memory=memory), {"exit 2": 0.95, "exit 4": 0.95}, rounds=60)
    changed = play(policy(memory=memory), {"exit 2": 0.0, "exit 4": 0.95}, rounds=60)
    assert changed[0].source == "exit 2"
    assert mostly(changed[30:]) == "exit 4"


def test_what_one_answer_repeats_says_little_of_the_next():
    """Guards against a long answer that counts as much as it has tokens."""
    memory = Memory()

    def answer(num_rounds, accepted):
        chooser = policy(memory=memory)
        for _ in range(num_rounds):
            chooser.learn(Plan("lookup", 1), [1], [1], [accepted])

    for _ in range(10):
        answer(20, 0)
    known = policy(memory=memory)._means["lookup", 1].value
    answer(1000, 1)
    assert known < policy(memory=memory)._means["lookup", 1].value < known + 0.2


def test_a_memory_is_as_large_as_there_are_sources():
    """Guards against a process that grows with every answer, and models that share what they learn."""
    model, other = (copy.deepcopy(tiny_llama(fused=True)) for _ in range(2))

    def size():
        (memory,) = table._LEARNT[model].values()
        return len(memory._of_answer), len(memory._of_answers)

    generate(model, PROMPT, "adaptive", max_steps=20, eos=[])
    at_first = size()
    for seed in range(5):
        generate(model, [seed + 1, *PROMPT], "adaptive", max_steps=20, eos=[])
    assert size() == at_first
    assert other not in table._LEARNT
    generate(model, PROMPT, "adaptive", max_steps=20, eos=[], sample=True)
    assert len(table._LEARNT[model]) == 2  # drawn tokens are accepted by other chances


def test_adaptive_states_what_it_decided():
    result = generate(tiny_llama(agreement="always", exit_layer=1), PROMPT, "adaptive", max_steps=80, eos=[])
    assert set(result.drafts_by_source) <= {"none", "lookup", "exit 1"}
    assert sum(counts[0] for counts in result.drafts_by_source.values()) == result.num_verifications
    with pytest.raises(ValueError, match="exit_layer 2: adaptive chooses it, leave it out"):
        generate(tiny_llama(), PROMPT, "adaptive", exit_layer=2)
    with pytest.raises(ValueError, match="draft_confidence auto: adaptive chooses it, leave it out"):
        generate(tiny_llama(), PROMPT, "adaptive", draft_confidence="auto")


def test_a_sampled_draft_without_its_distribution_cannot_be_made():
    """Guards against drafted tokens that are accepted whatever they are: without q nothing can be judged."""
    tokens = torch.zeros(2, 3, dtype=torch.long)
    shared = {"sources": ["x", "x"], "tokens": tokens, "lengths": [3, 3]}
    assert Draft(Sampler(sample=False), probabilities=None, **shared)
    for q in (None, torch.ones(2, 2, 9)):
        with pytest.raises(ValueError, match="needs the distribution of each of its tokens"):
            Draft(Sampler(), probabilities=q, **shared)


def test_estimated_costs_are_those_of_the_formula():
    model = tiny_llama(num_layers=10, fused=True)
    costs = Costs.estimated(model, 3, "exact")
    head = model.lm_head.weight.numel() / sum(p.numel() for p in model.model.layers[0].parameters())
    assert costs.draft_ratio(3) == pytest.approx((3 + head) / (10 + head))
    assert costs.round(3, 4) == pytest.approx(4 * costs.draft_ratio(3) + 1)
    assert Costs.estimated(model, 3, "int8").draft_ratio(3) == pytest.approx(costs.draft_ratio(3) / 4)
    # Five bits of 32 with scales; of the head 16 where there is a kernel for them, else eight.
    four = Costs.estimated(model, 3, "int4").draft_ratio(3)
    of_head = formats("int4", model.device, model.dtype).of_head.bytes_per_weight
    assert four == pytest.approx((3 * 5 / 32 + head * of_head / 4) / (10 + head))
