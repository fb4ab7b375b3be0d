"""Sources of drafts: what they propose and learn. That the output does not depend on them is in
test_equality.py and test_sampling_distribution.py.
"""

import copy
import random
from collections import Counter, defaultdict
from dataclasses import replace

import pytest
from conftest import generate, tiny_llama
from hypothesis import given
from hypothesis import strategies as st

from self_speculation import clock
from self_speculation.clock import TURNS, _Clock, _costs, measure
from self_speculation.config import GenerationConfig
from self_speculation.drafts.costs import Costs, never_falling
from self_speculation.drafts.layers import LayerDrafts
from self_speculation.drafts.policy import (
    AdaptivePolicy,
    Arm,
    DecayedMean,
    FixedThreshold,
    LearnedThreshold,
    LookupPolicy,
    Memory,
)
from self_speculation.drafts.prompt_lookup import NgramIndex
from self_speculation.drafts.table import make_drafter
from self_speculation.model import quantized_layers
from self_speculation.model.lean_layers import lean_head
from self_speculation.model.prepared import prepared

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
    assert cheap.threshold(1) < dear.threshold(1)
    for _ in range(200):  # confident tokens are accepted, others are not
        cheap.learn([0.95, 0.15, 0.95], 1)
    assert cheap.goes_on([0.95, 0.95])
    assert not cheap.goes_on([0.95, 0.15])


def test_lookups_that_do_not_pay_are_left_and_tried_again():
    policy = LookupPolicy(longest=2, draft_step=0.1)
    for _ in range(100):
        policy.learn_layers(num_drafted=4, num_accepted=3)  # 4 tokens at the cost of 1.4 passes
    assert policy.pays(1)
    for _ in range(10):
        policy.learn_lookup(1, 0)
    assert not policy.pays(1)
    assert policy.pays(2)
    for _ in range(100):
        policy.learn_layers(4, 3)
    assert policy.pays(1)


def test_what_cannot_be_drafted_is_refused():
    with pytest.raises(ValueError, match="exit_layer 5: must be between 1 and 4"):
        generate(tiny_llama(fused=True), PROMPT, exit_layer=5, num_speculations=2, draft_weights="int8")
    with pytest.raises(ValueError, match="draft_confidence 'often': must be auto or between 0 and 1"):
        generate(tiny_llama(), PROMPT, exit_layer=2, num_speculations=2, draft_confidence="often")
    with pytest.raises(ValueError, match="prompt_lookup -1: must be between 0"):
        generate(tiny_llama(), PROMPT, exit_layer=2, num_speculations=2, prompt_lookup=-1)


def policy(draft_step=0.1, lengths=8, memory=None, of_copy=None, saved_by_short_head=0.0):
    """Of a model with exits at layers 2 and 4 of 10: a draft step costs as its layers do.

    Args:
        of_copy: cost of a token drafted by a copy of all ten layers; None: there is none.
        saved_by_short_head: where it is more than nothing, each exit has a short head as well.
    """
    copies = {} if of_copy is None else {10: of_copy}
    costs = Costs(
        plain_step=1.0,
        draft_step={2: 2 * draft_step, 4: 4 * draft_step, **copies},
        verifications={exit_layer: [1.0, 1.0 + 0.05 * lengths] for exit_layer in (0, 2, 4, *copies)},
        lengths=[0, lengths],
        probe=0.05,
        saved_by_short_head=saved_by_short_head,
    )
    arms = {"exit 2": Arm(2), "exit 4": Arm(4), "lookup": Arm(priors=[0.3, 0.5, 0.7, 0.9])}
    arms |= {f"exit {layer}": Arm(layer, priors=(0.9,), leaves_layers=False) for layer in copies}
    if saved_by_short_head:
        arms |= {f"{name}, few": replace(arm, like=name) for name, arm in arms.items() if arm.exit_layer}
    return AdaptivePolicy(costs, arms, {2: "exit 2", 4: "exit 4"}, lengths, memory), costs


def play(policy, chances, rounds=300, matched=None):
    """Rounds of a model whose exits guess right by these chances; the plans that were made."""
    draws, plans = random.Random(0), []
    ready = {name: [0] for name in policy._arms if name != "lookup"} | {"lookup": [matched]}
    for _ in range(rounds):
        plan = policy.plan(ready, [8])
        chance = chances.get(plan.source, 0)
        accepted = 0
        while accepted < plan.length and draws.random() < chance:
            accepted += 1
        agreement = [chances.get(f"exit {plan.probe}", 0.0)] * (accepted + 1) if plan.probe else []
        policy.learn(
            plan.source, ready.get(plan.source, [0])[0], plan.length, accepted, plan.probe, agreement
        )
        plans.append(plan)
    return plans


@pytest.mark.parametrize(
    ("chances", "best"),
    [
        ({"exit 2": 0.9, "exit 4": 0.92}, "exit 2"),
        ({"exit 2": 0.2, "exit 4": 0.95}, "exit 4"),
        ({"exit 2": 0.05, "exit 4": 0.1}, ""),
    ],
)
def test_the_policy_finds_the_best_exit_or_none(chances, best):
    """A deep exit has to be that much better; where none is good, plain steps are made."""
    late = play(policy()[0], chances)[150:]
    assert sum(plan.source == best for plan in late) > 0.8 * len(late)


def test_longer_drafts_where_more_is_accepted():
    sure = play(policy()[0], {"exit 2": 0.98, "exit 4": 0.98})[-1]
    unsure = play(policy()[0], {"exit 2": 0.6, "exit 4": 0.6})[-1]
    assert sure.length > unsure.length > 0


def test_probing_notices_an_exit_that_has_become_good():
    """Guards against an exit that is never drafted with again, because once it was bad."""
    chooser, costs = policy()
    play(chooser, {"exit 2": 0.0, "exit 4": 0.0})
    plans = play(chooser, {"exit 2": 0.0, "exit 4": 0.95}, rounds=2000)
    assert plans[0].source == ""
    assert plans[-1].source == "exit 4"
    probes = sum(plan.probe > 0 for plan in plans)
    spent = sum(costs.round(4 if plan.source else 0, plan.length) for plan in plans)
    assert 0 < probes * costs.probe < 0.02 * spent


def test_lookups_are_rounds_among_others():
    exits = {"exit 2": 0.5, "exit 4": 0.5}
    assert play(policy()[0], {**exits, "lookup": 0.95}, matched=3)[-1].source == "lookup"
    assert play(policy()[0], {**exits, "exit 2": 0.9, "lookup": 0.0}, matched=3)[-1].source == "exit 2"


def test_the_second_answer_knows_what_the_first_one_learnt():
    """Guards against an answer that begins from nothing: of 30 rounds, most would go into finding out."""

    def good_rounds(plans):
        return sum(plan.source == "exit 4" for plan in plans)

    chances, memory = {"exit 2": 0.0, "exit 4": 0.95}, Memory()
    first = play(policy(memory=memory)[0], chances, rounds=30)
    second = play(policy(memory=memory)[0], chances, rounds=30)
    assert second[0].source == "exit 4"
    assert good_rounds(second) > good_rounds(first)


def test_exits_that_were_never_right_are_not_drafted_with_again():
    """Guards against every answer of a model without early exits paying for the same disappointment."""
    memory = Memory()
    for answer in range(8):
        plans = play(policy(memory=memory)[0], {"exit 2": 0.0, "exit 4": 0.0}, rounds=40)
        if answer:
            assert {plan.source for plan in plans} == {""}


def test_a_model_that_has_changed_its_ways_is_noticed():
    """Guards against a memory that outweighs what the answer at hand shows."""
    memory = Memory()
    for _ in range(20):
        play(policy(memory=memory)[0], {"exit 2": 0.95, "exit 4": 0.95}, rounds=60)
    changed = play(policy(memory=memory)[0], {"exit 2": 0.0, "exit 4": 0.95}, rounds=60)
    assert changed[0].source == "exit 2"
    assert {plan.source for plan in changed[30:]} == {"exit 4"}


def test_what_one_answer_repeats_says_little_of_the_next():
    """Guards against a long answer that counts as much as it has tokens."""
    memory = Memory()

    def answer(num_rounds, accepted):
        chooser, _ = policy(memory=memory)
        for _ in range(num_rounds):
            chooser.learn("lookup", 1, 1, accepted)

    for _ in range(10):
        answer(20, 0)
    known = policy(memory=memory)[0]._means["lookup", 1].value
    answer(1000, 1)
    assert known < policy(memory=memory)[0]._means["lookup", 1].value < known + 0.2


def test_a_copy_is_tried_again_and_costs_little_meanwhile():
    """Guards against a copy in fewer bits that one bad stretch rules out for good: no verification shows what
    it would have guessed. And against trials that nobody limits.
    """
    chooser, costs = policy(of_copy=0.3)
    play(chooser, {"exit 10": 0.0}, rounds=100)
    plans = play(chooser, {"exit 10": 0.0}, rounds=2000)
    trials = [plan for plan in plans if plan.source == "exit 10"]
    assert trials
    assert sum(costs.round(10, plan.length) - costs.round(0, 0) for plan in trials) < 0.02 * 2000
    assert play(chooser, {"exit 10": 0.95}, rounds=2000)[-1].source == "exit 10"


@pytest.mark.parametrize(
    ("chances", "best"),
    [
        ({"exit 2": 0.9, "exit 2, few": 0.88}, "exit 2, few"),
        ({"exit 2": 0.9, "exit 2, few": 0.3}, "exit 2"),
        ({"exit 10": 0.95, "exit 10, few": 0.93}, "exit 10, few"),
        ({"exit 10": 0.95, "exit 10, few": 0.4}, "exit 10"),
        ({}, ""),
    ],
)
def test_the_policy_finds_whether_a_short_head_pays(chances, best):
    """Guards against a short head that is used where the text is not made of its tokens, or not used where it
    is, and against one that is thought to be cheaper than it is.
    """
    memory = Memory()
    for _ in range(2):
        chooser, costs = policy(of_copy=0.4, memory=memory, saved_by_short_head=0.1)
        late = play(chooser, chances, rounds=1000)[500:]
    assert sum(plan.source == best for plan in late) > 0.8 * len(late)
    assert chooser._rounds(1, "exit 10, few")[3] == pytest.approx(costs.round(10, 3) - 0.3)
    assert costs.draft_ratio(2, short_head=True) == pytest.approx(costs.draft_ratio(2) - 0.1)


def test_a_short_head_that_was_bad_is_tried_again():
    """As a copy is. Guards against a text of rare words that rules it out for all that follows."""
    chooser, _ = policy(of_copy=0.4, saved_by_short_head=0.1)
    play(chooser, {"exit 10": 0.95, "exit 10, few": 0.0}, rounds=500)
    late = play(chooser, {"exit 10": 0.95, "exit 10, few": 0.95}, rounds=3000)[-1]
    assert late.source == "exit 10, few"


def test_a_memory_is_as_large_as_there_are_sources():
    """Guards against a process that grows with every answer, and models that share what they learn."""
    model, other = (copy.deepcopy(tiny_llama(fused=True)) for _ in range(2))

    def size():
        (memory,) = prepared(model).learnt.values()
        return len(memory._of_answer), len(memory._of_answers), len(memory._thresholds)

    generate(model, PROMPT, "adaptive", max_steps=20, eos=[])
    at_first = size()
    for seed in range(5):
        generate(model, [seed + 1, *PROMPT], "adaptive", max_steps=20, eos=[])
    assert size() == at_first
    assert not prepared(other).learnt
    generate(model, PROMPT, "adaptive", max_steps=20, eos=[], sample=True)
    assert len(prepared(model).learnt) == 2  # drawn tokens are accepted by other chances


def test_adaptive_states_what_it_decided():
    result = generate(tiny_llama(agreement="always", exit_layer=1), PROMPT, "adaptive", max_steps=80, eos=[])
    assert set(result.drafts_by_source) <= {"none", "lookup", "exit 1"}
    assert sum(counts[0] for counts in result.drafts_by_source.values()) == result.num_verifications
    with pytest.raises(ValueError, match="exit_layer 2: adaptive chooses it, leave it out"):
        generate(tiny_llama(), PROMPT, "adaptive", exit_layer=2)
    with pytest.raises(ValueError, match="draft_confidence auto: adaptive chooses it, leave it out"):
        generate(tiny_llama(), PROMPT, "adaptive", draft_confidence="auto")


@pytest.mark.parametrize("weights", ["exact", "int4"])
def test_the_clock_plays_rounds(weights):
    """Guards against parts that are not measured, and against costs without a length or an exit. What they
    amount to is the machine's business.
    """
    model = tiny_llama(num_layers=12, fused=True)
    config = GenerationConfig(sample=False, draft_weights=weights)
    measured = measure(model, config, [1, 2, 4], context=100, longest=10, patience=0.0)
    assert list(measured.draft_step) == [1, 2, 4]
    assert measured.lengths == [0, 1, 2, 4, 8, 10]
    assert set(measured.verifications) == {0, 1, 2, 4}
    assert min(measured.plain_step, measured.probe, *measured.draft_step.values()) > 0
    assert measured.round(2, 5) == pytest.approx(5 * measured.draft_step[2] + measured.verification(2, 5))
    assert measured.round(0, 0) == measured.verifications[0][0]
    assert measured.saved_by_short_head == 0


def test_the_clock_plays_both_heads_where_there_is_a_choice(monkeypatch):
    """Guards against a draft with the whole head that is thought to cost what one with a short head does."""
    heads = []

    def make(decoder, exit_layer, draft_weights, draft_vocabulary):
        heads.append((exit_layer, draft_vocabulary))
        return make_drafter(decoder, exit_layer, draft_weights, draft_vocabulary)

    monkeypatch.setattr(clock, "make_drafter", make)
    config = GenerationConfig(sample=False, draft_vocabulary=9)
    shared = {"exit_layers": [1, 2], "context": 50, "longest": 8, "patience": 0.0}
    measure(tiny_llama(), config, **shared)
    assert set(heads) == {(1, 9), (2, 9)}
    heads.clear()
    measure(tiny_llama(), replace(config, generation_strategy="adaptive"), **shared)
    assert set(heads) == {(1, None), (2, None), (2, 9)}


def test_costs_between_what_was_measured():
    """Guards against exits that are given another exit's verification."""
    seconds = {("plain", 0, 0): {0: 1.0}, ("probe", 0, 0): {0: 0.1}}
    for k in (0, 4, 8):
        # ten layers of 0.09 + 0.01 k each, a head of 0.1, and a pass of 0.05 more for a draft of layers
        seconds["verification", 0, k] = {0: 1.0 + 0.1 * k}
        seconds["verification", 4, k] = {0: 1.0 + 0.1 * k - 4 * 0.01 * k + 0.05}
        seconds["draft", 4, k] = {0: 0.46}
    seconds["verification", 2, 4] = {0: 1.4 - 2 * 0.01 * 4 + 0.05}
    seconds["draft", 2, 4] = {0: 0.28}
    costs = _costs(seconds, [2, 3, 4], [0, 4, 8], draws=5)
    assert costs.draft_step == pytest.approx({2: 0.28, 3: 0.37, 4: 0.46})
    assert costs.draws == []  # one turn does not tell how the next would be
    assert costs.verifications[4] == pytest.approx([1.05, 1.29, 1.53])
    assert costs.verifications[2] == pytest.approx([1.05, 1.37, 1.69], abs=0.03)
    assert costs.verification(2, 6) == pytest.approx(
        (costs.verification(2, 4) + costs.verification(2, 8)) / 2
    )


def test_never_falling():
    """Guards against means that are not weighted, and against blocks that are not merged any further."""
    assert never_falling([1, 2, 3], [1, 1, 1]) == [1, 2, 3]
    assert never_falling([1, 4, 2, 3], [1, 1, 1, 1]) == [1, 3, 3, 3]
    assert never_falling([1, 4, 2], [1, 1, 3]) == [1, 2.5, 2.5]
    assert never_falling([3, 2, 1], [1, 1, 1]) == [2, 2, 2]


def turns_of_a_busy_machine(stalled, number=9):
    """Seconds of parts that cost 1 + 0.1 k plain steps, some lengths held up in five turns of nine; the whole
    machine is twice as slow in every other turn.
    """
    chance = random.Random(0)
    seconds = defaultdict(dict)
    for turn in range(number):
        pace = 1.0 + turn % 2
        seconds["plain", 0, 0][turn], seconds["probe", 0, 0][turn] = pace, 0.1 * pace
        for exit_layer, k in [*((0, k) for k in (0, 1, 2, 4, 8)), *((4, k) for k in (1, 2, 4, 8))]:
            held_up = 1.9 if k in stalled and turn % 9 < 5 else 1.0
            cost = (1 + 0.1 * k) * pace * held_up * chance.gauss(1, 0.01)
            seconds["verification", exit_layer, k][turn] = cost
            seconds["draft", exit_layer, k][turn] = 0.4 * pace * chance.gauss(1, 0.01)
    return seconds


def test_noise_of_the_clock_is_not_drawn_as_fact():
    """Guards against one length of a row that is twice as dear as both its neighbours, and against certainty
    where there is none.
    """
    costs = _costs(turns_of_a_busy_machine(stalled={2}), [4], [0, 1, 2, 4, 8], draws=40)
    assert len(costs.draws) == 40
    for each in [costs, *costs.draws]:
        for verifications in each.verifications.values():
            assert list(verifications) == sorted(verifications)
    in_plain_steps = [costs.verification(4, k) / costs.plain_step for k in (1, 2, 4, 8)]
    assert in_plain_steps == pytest.approx([1.1, 1.2, 1.4, 1.8], rel=0.2)

    def spread(costs, k):
        each = [draw.round(4, k) / draw.plain_step for draw in costs.draws]
        return max(each) / min(each)

    quiet = _costs(turns_of_a_busy_machine(stalled=()), [4], [0, 1, 2, 4, 8], draws=40)
    assert spread(quiet, 2) < 1.05 < spread(costs, 2)


def test_what_scatters_is_measured_again(monkeypatch):
    """Guards against parts that are left as the first turns had them, and against quiet ones done again."""
    played = Counter()

    def round(self, exit_layer, num_drafted):
        played[exit_layer, num_drafted] += 1
        noise = self.turn % 3 if (exit_layer, num_drafted) == (0, 4) else 0.0
        self.seconds["draft", exit_layer, num_drafted][self.turn] = 0.5
        self.seconds["verification", exit_layer, num_drafted][self.turn] = 1.0 + noise

    def plain_steps(self, number):  # noqa: ARG001
        self.seconds["plain", 0, 0][self.turn] = 0.01

    monkeypatch.setattr(_Clock, "round", round)
    monkeypatch.setattr(_Clock, "plain_steps", plain_steps)
    measure(tiny_llama(), GenerationConfig(sample=False), [1, 2], 50, 8, 1e9, range(2 * TURNS))
    assert played.pop((0, 4)) == 2 * TURNS
    assert set(played.values()) == {TURNS}


def test_estimated_costs_are_those_of_the_formula():
    model = tiny_llama(num_layers=10, fused=True)
    costs = Costs.estimated(model, 3, "exact")
    head = model.lm_head.weight.numel() / sum(p.numel() for p in model.model.layers[0].parameters())
    assert costs.draft_ratio(3) == pytest.approx((3 + head) / (10 + head))
    assert costs.round(3, 4) == pytest.approx(4 * costs.draft_ratio(3) + 1)
    assert Costs.estimated(model, 3, "int8").draft_ratio(3) == pytest.approx(costs.draft_ratio(3) / 4)
    # Five bits of 32 with scales; of the head 16 where there is a kernel for them, else eight.
    four = Costs.estimated(model, 3, "int4").draft_ratio(3)
    of_head = 2 if "float16" in quantized_layers._possible([lean_head(model)]) else 1
    assert four == pytest.approx((3 * 5 / 32 + head * of_head / 4) / (10 + head))
