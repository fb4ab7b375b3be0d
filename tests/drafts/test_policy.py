"""What adaptive decoding learns of its sources, and which round it makes next."""

import copy
import random
from collections import Counter

import pytest
from conftest import generate, tiny_llama

from self_speculation.drafts import table
from self_speculation.drafts.costs import Costs, RoundTimes
from self_speculation.drafts.estimates import DecayedLine, DecayedMean
from self_speculation.drafts.policy import PLAIN, AdaptivePolicy, Arm, Memory, Plan
from self_speculation.model.quantized_layers import formats

PROMPT = [5, 9, 4, 7, 7, 3]


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


def test_no_round_takes_no_time():
    """Guards against a division by zero: by a line through noise, a plain step may take nothing at all."""
    times = RoundTimes()
    for drafted, seconds in 40 * [(2, 0.2), (4, 1.0)]:
        times.add("exit", 1, 0.2, drafted, seconds)
    assert times.line("exit", 1, 0.2)[0] > 0.0


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


def test_short_answers_take_turns_at_trials():
    """Guards against trials that begin anew with each answer: a source late in the order was never tried."""
    memory, tried = Memory(), Counter()
    for _ in range(60):
        plans = play(policy(memory, copy_takes=0.35), {"exit 2": 0.05, "exit 4": 0.05}, rounds=40)
        tried.update({plan.source for plan in plans[8:]})
    assert tried[PLAIN] == 60  # the best here
    assert all(tried[source] > 5 for source in ("exit 2", "exit 4", "exit 10"))


def test_drafts_that_gain_nothing_are_given_up():
    """Guards against a batch that goes on drafting at a loss: it took a plain step, which it had hardly ever
    made, to be as much slower than it is as its drafts are than estimated.
    """
    takes = {**TAKES, "exit 10": (1.0, 1.1), "exit 2": (1.0, 0.6), "exit 4": (1.0, 0.9)}
    plans = play(policy(copy_takes=0.35), {"exit 10": 0.95}, rounds=75, takes=takes)
    assert sum(plan.source == PLAIN for plan in plans[25:]) > 40
