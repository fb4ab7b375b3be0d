"""What adaptive decoding learns of draft sources, and which round it makes next, in simulated rounds."""

import random
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import NamedTuple

import pytest
import torch
from conftest import ADAPTIVE, PROMPT, generate, own_llama, tiny_llama
from helpers import watch
from test_llama_model_utils import mixture

from self_speculation.backends.runner import ModelRunner
from self_speculation.config import LONGEST_DRAFT
from self_speculation.drafts import costs
from self_speculation.drafts.costs import DecayedMean, PassTimes, draft_ratio
from self_speculation.drafts.draft import Draft, DraftCost, Match
from self_speculation.drafts.ngram import NgramDrafts
from self_speculation.drafts.policy import AdaptivePolicy, Plan, SourceStats, _Planner, _Row
from self_speculation.models import model_cache
from self_speculation.weights.kernels import CPUOperators

COPY = "exit 10"
# Estimated cost of a drafted token, in plain steps.
RATIOS = {"exit 2": 0.2, "exit 4": 0.4}


def line(slope, num_tokens):
    """The cost of a pass over so many tokens, in passes over one."""
    return 1.0 + slope * (num_tokens - 1)


def stats(slope=0.02):
    """Nothing is known but the estimated cost of passes."""
    return SourceStats(partial(line, slope))


def policy(learnt=None, copy_takes=None):
    """Of a model with exits at layers 2 and 4 of 10.

    Args:
        copy_takes: estimated cost of a token drafted by a copy of all ten layers; None: there is none.
    """
    costs = {
        **{
            name: DraftCost(lambda num_rows, ratio=ratio: ratio, prior_strength=1.0)
            for name, ratio in RATIOS.items()
        },
        "n-grams": DraftCost(priors=[0.3, 0.5, 0.7, 0.9]),
    }
    if copy_takes is not None:
        costs[COPY] = DraftCost(lambda num_rows: copy_takes, (0.95,), prior_strength=6.0)
    return AdaptivePolicy(costs, learnt or stats())


def drafted_by(sources, lengths, matched=()):
    """A draft whose tokens do not matter."""
    return Draft(sources, None, lengths, matched=matched)


@dataclass
class World:
    """A model and a machine."""

    chances: dict = field(default_factory=dict)  # source -> that a drafted token is right; 0 if missing
    slope: float = 0.02  # cost of each token of a verification, in passes over one
    draft: dict = field(default_factory=dict)  # source -> cost of a drafted token, in plain steps
    finds: float = 0.0  # how often an n-gram matches
    noise: float = 0.05  # scatter of times

    plain_step = 0.04  # seconds

    def draft_step(self, source):
        return self.plain_step * ({**RATIOS, COPY: 0.35} | self.draft).get(source, 0.0)

    def verification(self, num_rows, num_drafted):
        """num_drafted: tokens of all rows together."""
        passes = line(self.slope, num_rows + num_drafted) / line(self.slope, num_rows)
        return self.plain_step * passes


class Round(NamedTuple):
    source: str  # of layers; None: none drafted
    plan: object
    num_tokens: int
    seconds: float  # without noise


def match(number):
    """An n-gram of so many tokens, or None."""
    return number and Match("n-grams", number, [5] * LONGEST_DRAFT)


def play(policy, world, rounds=300, num_rows=1, seed=0, stalled=None):
    """The rounds that a policy makes in a world.

    Args:
        stalled: a source, and the number of a round that takes the machine a thousand seconds.
    """
    draws = random.Random(seed)
    made = []
    seen = Counter()
    for _ in range(rounds):
        found = [draws.choice([1, 2, 3]) if draws.random() < world.finds else None for _ in range(num_rows)]
        planned = policy.plan([*map(match, found)], [8] * num_rows)
        plan = planned or Plan([None] * num_rows, [0] * num_rows)
        accepted = [0] * num_rows
        for row, source in enumerate(plan.source_names):
            assert (plan.lengths[row] > 0) == (source is not None)
            assert source != "n-grams" or found[row] is not None
            while accepted[row] < plan.lengths[row] and draws.random() < world.chances.get(source, 0.0):
                accepted[row] += 1
        (layers,) = {*plan.source_names} - {None, "n-grams"} or {None}
        lengths = [n for n, source in zip(plan.lengths, plan.source_names, strict=True) if source == layers]
        # Drafts of all rows in turn; a pass of few rows costs as much as one of many.
        drafting = 0.0 if layers is None else max(lengths) * world.draft_step(layers)
        times = drafting, world.verification(num_rows, sum(plan.lengths))
        seen[layers] += 1
        scatter = draws.uniform(1 - world.noise, 1 + world.noise)
        if (layers, seen[layers]) == stalled:
            scatter = 1000.0 / sum(times)
        seconds = (times[0] * scatter, times[1] * scatter)
        if planned is not None:
            matched = [number or 0 for number in found]
            policy.learn(drafted_by(plan.source_names, plan.lengths, matched), accepted, seconds)
        made.append(Round(layers, plan, sum(accepted) + num_rows, sum(times)))
    return made


def speed(made, world, num_rows=1):
    """Time per token of the rounds over the time per token of plain steps."""
    tokens = sum(each.num_tokens for each in made)
    seconds = sum(each.seconds for each in made)
    return tokens / seconds / (num_rows / world.verification(num_rows, 0))


def mostly(made):
    """The source of most rounds; the rest are trials."""
    return Counter(each.source for each in made).most_common(1)[0][0]


def test_drafts_are_longer_where_more_is_accepted():
    """Guards against one length for all, of layers that draft and of n-grams."""

    def length(**world):
        late = play(policy(), World(**world))[-100:]
        return sum(sum(each.plan.lengths) for each in late) / 100

    assert length(chances={"exit 2": 0.98, "exit 4": 0.98}) > length(chances={"exit 2": 0.75}) + 1 > 2
    assert length(chances={"n-grams": 0.95}, finds=1.0) > length(chances={"n-grams": 0.6}, finds=1.0)


@pytest.mark.parametrize("good", ["exit 2", "exit 4", COPY])
@pytest.mark.parametrize("bad_rounds", [300, 2300])
def test_a_source_that_has_become_good_is_noticed(good, bad_rounds):
    """Guards against an exit or a copy that is never drafted with again because once it was bad, in two
    tokens or in thousands; against trials that nobody limits.
    """
    chooser = policy(copy_takes=0.3)
    bad = play(chooser, World(), bad_rounds)
    assert speed(bad[300:] or bad, World()) > (0.99 if bad_rounds > 300 else 0.95)
    assert mostly(play(chooser, World({good: 0.95}), 2 * bad_rounds, seed=1)[-100:]) == good


def test_a_model_that_has_changed_its_ways_is_noticed():
    """Guards against statistics that outweigh the answer at hand."""
    learnt = stats()
    play(policy(learnt), World({"exit 2": 0.95, "exit 4": 0.95}), 1200)
    changed = play(policy(learnt), World({"exit 4": 0.95}), 100)
    assert mostly(changed[50:]) == "exit 4"


@pytest.mark.parametrize(
    "worlds", [pytest.param(24, id="few"), pytest.param(400, id="many", marks=pytest.mark.slow)]
)
def test_nothing_is_worse_than_plain_steps(worlds):
    """Whatever is accepted, and whatever passes cost: up to twice and down to half of what was estimated.
    Guards against drafts at a loss, and against short answers that each pay for the same trials.
    """
    draws = random.Random(3)
    found = []
    for number in range(worlds):
        num_rows = draws.choice([1, 1, 2, 4, 8])
        estimated = draws.choice([0.005, 0.02, 0.05, 0.15])
        copy_takes = draws.choice([0.3, 0.5, 0.7, 1.0])
        world = World(
            {
                "exit 2": draws.choice([0, 0.3, 0.8]),
                "exit 4": draws.choice([0, 0.5, 0.9]),
                COPY: draws.choice([0.3, 0.5, 0.7, 0.9, 0.95]),
                "n-grams": draws.choice([0.1, 0.5, 0.9]),
            },
            slope=estimated * draws.choice([0.5, 1, 2]),
            draft={"exit 2": draws.choice([0.15, 0.25]), "exit 4": draws.choice([0.3, 0.5])}
            | {COPY: copy_takes * draws.choice([0.7, 1, 1.5])},
            finds=draws.choice([0, 0.2, 0.6]),
            noise=draws.choice([0.05, 0.2]),
        )
        learnt = stats(estimated)
        for answer in range(4):
            play(policy(learnt, copy_takes), world, 50, num_rows, number + answer)
        found.append(speed(play(policy(learnt, copy_takes), world, 300, num_rows, number), world, num_rows))
    assert min(found) > 0.98
    assert sum(each < 0.98 for each in found) <= worlds // 20
    assert sorted(found)[worlds // 2] > 1.1


@pytest.mark.parametrize("stalled", [(None, 1), ("exit 4", 1), ("exit 4", 2), ("exit 4", 400)])
def test_a_stall_rules_out_no_source(stalled):
    """Guards against a process that stands still for a while, also while a source is hardly known."""
    world = World({"exit 2": 0.2, "exit 4": 0.95})
    assert mostly(play(policy(), world, 1000, stalled=stalled)[-100:]) == "exit 4"


def test_times_are_learnt_and_forgotten():
    """Guards against an estimate that is believed for ever, and against times of a slow hour."""
    sure = {"exit 2": 0.9, "exit 4": 0.9}
    chooser = policy()
    assert mostly(play(chooser, World(sure, draft=sure))[-100:]) is None
    assert mostly(play(chooser, World(sure), 3000)[-100:]) == "exit 2"


def test_times_belong_to_a_number_of_threads():
    """Guards against drafts that are priced by passes with more threads, and against times that are lost."""
    threads = [2]
    sure = {"exit 2": 0.9, "exit 4": 0.9}
    chooser = policy(SourceStats(partial(line, 0.02), lambda: threads[0]))
    assert mostly(play(chooser, World(sure), 100)[-50:]) == "exit 2"
    threads[0] = 1
    assert mostly(play(chooser, World(sure, draft=sure), 100)[-50:]) is None
    threads[0] = 2
    assert mostly(play(chooser, World(sure), 10)) == "exit 2"


def test_times_of_rows_and_lengths_that_are_not_known_are_estimated():
    """Guards against seconds of one source that are compared with plain steps of another, and against noise
    that makes the longest draft look the cheapest.
    """
    times = PassTimes(partial(line, 0.1))

    def estimate(num_rows):
        return 0.2 * line(0.1, num_rows)

    def known(num_rows):
        passes = times.verify_seconds(num_rows)
        drafts = times.draft_seconds(num_rows, {"x": estimate})
        return [*(passes(num_rows * n) for n in (1, 2, 3)), drafts("x", num_rows)]

    assert known(1) == pytest.approx([1.0, 1.1, 1.2, 0.2])
    times.add_verification(1, 1, 0.01)
    assert known(1) == pytest.approx([0.01, 0.011, 0.012, 0.002])
    assert known(8) == pytest.approx([0.017, 0.025, 0.033, 0.0034])
    for _ in range(40):
        times.add_drafts("x", 1, [1, 1], 0.008, estimate)  # twice as dear
    assert times.draft_seconds(1, {"x": estimate})("x", 1) == pytest.approx(0.004, rel=0.1)
    assert known(8)[3] == pytest.approx(0.0068, rel=0.1)
    for _ in range(40):
        times.add_verification(1, 1, 0.01)
        times.add_verification(1, 9, 0.005)
    assert 0.0 < known(1)[0] <= min(known(1)[:3])


def test_noise_of_passes_that_cost_hardly_more_is_no_slope():
    """Guards against long drafts that seem dear on a GPU, after short ones in rounds of uneven length."""
    times = PassTimes(partial(line, 0.002))
    noise = random.Random(0)
    for number in range(400):
        num_tokens = 1 + 2 * (number % 4 > 0)
        times.add_verification(1, num_tokens, 0.02 * line(0.002, num_tokens) * noise.gauss(1.0, 0.08))
    passes = times.verify_seconds(1)
    assert passes(17) < 1.1 * passes(1)


def test_ngrams_go_before_a_copy_row_by_row():
    """Guards against one source for all rows."""
    chooser = policy(copy_takes=0.05)
    shared = {"slope": 0.005, "draft": {COPY: 0.05}}
    world = World({COPY: 0.8, "n-grams": 0.95}, finds=0.5, **shared)
    alone = World({COPY: 0.8}, **shared)
    made = play(chooser, world, 400, num_rows=4)
    ready = [match(3), None, None, None]
    plan = next(p for p in (chooser.plan(ready, [8, 8, 8, 0]) for _ in range(9)) if p.trial is None)
    assert plan.source_names == ["n-grams", COPY, COPY, None]
    made_alone = play(policy(copy_takes=0.05), alone, 400, num_rows=4)
    assert speed(made, world, 4) > speed(made_alone, alone, 4) + 0.1


def test_the_row_that_is_most_likely_right_drafts_most():
    """Guards against one length for all rows, and against a row that drafts because another one does: eight
    rows that verify three tokens cost 2.6 steps, where one that does costs 1.2.
    """
    plan = policy(stats(0.15)).plan([match(3), match(1), *[None] * 6], [8] * 8)
    assert plan.source_names == ["n-grams", *[None] * 7]
    assert 2 <= plan.lengths[0] < 8
    assert not any(plan.lengths[1:])
    plan = policy(stats()).plan([match(3), match(2), *[None] * 6], [8] * 8)
    assert plan.lengths[0] > plan.lengths[1] > 0


@pytest.mark.parametrize("slope", [0.001, 0.02, 0.15])
@pytest.mark.parametrize("source", [None, "exit 2", COPY])
def test_a_plan_is_the_best_of_all(slope, source):
    """Guards against a token that is left out although it pays, and one that does not. Compared are plans
    with any number of tokens in any of three rows; the margin is for estimates, here they are right.
    """
    planner = _Planner(partial(line, slope), lambda *_: 0.3)
    planner.MARGIN = 1.0
    draws = random.Random(0)
    for _ in range(20):
        rows = [_Row(n, Match("n-grams", 3, [5] * n), draws.random()) for n in draws.choices(range(4), k=3)]
        p_accept = draws.random() if source else 0.0
        plan = planner.best_plan(source, p_accept, rows)

        def rate(lengths):
            """Of a round."""
            tokens = 3
            expected = 3.0
            num_passes = 0
            for length, (_, _, p_match) in zip(lengths, rows, strict=True):  # noqa: B023
                expected += sum(max(p_match, p_accept) ** i for i in range(1, length + 1))  # noqa: B023
                tokens += length
                num_passes = num_passes if p_match > p_accept else max(num_passes, length)  # noqa: B023
            return expected / (0.3 * num_passes + line(slope, tokens))

        possible = [range(n + 1 if p_match > p_accept or source else 1) for n, _, p_match in rows]
        assert plan.rate == pytest.approx(rate(plan.lengths))
        assert plan.rate > 0.97 * max(map(rate, product(*possible)))


def test_a_trial_is_one_token_of_one_row():
    """Guards against layers that are never tried where a text tells what follows, and against trials in which
    rows that gain nothing take part.
    """
    chooser = policy()
    plans = [chooser.plan([match(3), None], [8, 8]) for _ in range(200)]
    trials = [plan for plan in plans if plan.trial is not None]
    assert {plan.source_names[1] for plan in trials} == {"exit 2", "exit 4"}
    assert {plan.lengths[1] for plan in trials} == {1}
    assert {(plan.trial, plan.source_names[0]) for plan in trials} == {(1, "n-grams")}
    assert {tuple(plan.source_names) for plan in plans} == {
        ("n-grams", None),
        *map(tuple, (p.source_names for p in trials)),
    }
    alone = [chooser.plan([match(3)], [8]) for _ in range(200)]
    assert {"exit 2", "exit 4"} <= {plan.source_names[plan.trial] for plan in alone if plan.trial is not None}


@pytest.mark.parametrize("num_rows", [1, 8])
def test_trials_cost_less_than_a_hundredth(num_rows):
    """Guards against trials that nobody limits. The world is the worst one: no draft is ever right."""
    world = World(slope=0.1)
    made = play(policy(stats(0.1), copy_takes=0.3), world, 1000, num_rows)
    trials = [each for each in made if each.plan.trial is not None]
    assert len(trials) >= 10
    plain = world.verification(num_rows, 0)
    assert 0.0 < sum(each.seconds / plain - 1.0 for each in trials) < 10.0


def test_a_round_without_drafts_is_a_plain_step(monkeypatch):
    """Guards against a plan and a verification in each round, which take 8 % of a small model's, and against
    rounds that are not counted.
    """
    model = tiny_llama(agreement="never")
    model_cache.kept(model).pop(SourceStats, None)
    monkeypatch.setattr(NgramDrafts, "find", lambda *_: None)
    plans = watch(monkeypatch, AdaptivePolicy, "plan")
    shared = {"max_steps": 200, "eos": (), "seed": 0, "sample": True, "temperature": 0.9}
    found = generate(model, PROMPT, **shared, **ADAPTIVE)
    rounds = found.draft_stats.rounds
    assert sum(n * kind.emitted for kind, n in rounds.items()) == found.num_decode_tokens == 199
    assert rounds.total() == len(plans)
    assert 0 < sum(plan is not None for _, plan in plans) < len(plans) / 4
    assert found.predicted_tokens == generate(model, PROMPT, **shared).predicted_tokens


def test_what_is_looked_up_is_planned_while_a_plan_without_drafts_holds():
    """Guards against n-grams that wait until it is time to plan layers again."""
    chooser = policy()
    play(chooser, World(), 300)
    while chooser.plan([None], [8]) is not None:
        pass
    assert chooser.plan([match(3)], [8]).source_names == ["n-grams"]


def test_a_token_after_a_rejected_one_is_not_judged():
    """Guards against a source that seems worse with longer drafts."""
    chooser = policy(copy_takes=0.3)
    expected = DecayedMean(0.95, prior_strength=6.0)
    chooser.learn(drafted_by([COPY], [4]), [1], None)
    for is_right in (1.0, 0.0):
        expected.add(is_right)
    assert chooser._acceptance(COPY, 0).value == expected.value


def test_what_is_learnt_is_as_large_as_there_are_sources():
    """Guards against a process that grows with every answer, models that share what they learn, and rounds
    that the result does not count.
    """
    model, other = (own_llama(fused=True) for _ in range(2))
    for seed in range(6):
        result = generate(model, [seed + 1, *PROMPT], "adaptive", max_steps=20, eos=[])
        drafts = result.draft_stats
        assert {*drafts.by_source} <= {"none", "n-grams", "exit 1"}
        assert sum(counts.rounds for counts in drafts.by_source.values()) == drafts.num_verifications
    (learnt,) = model_cache.kept(model)[SourceStats].values()
    assert {*learnt.used_at} <= {None, "exit 1"}
    assert len(learnt.acceptance) <= 1 + 5  # an exit, and tokens that an n-gram matched
    assert SourceStats not in model_cache.kept(other)
    generate(model, PROMPT, "adaptive", max_steps=20, eos=[], sample=True)
    assert len(model_cache.kept(model)[SourceStats]) == 2  # sampled tokens have another acceptance


def head_in_layers(model):
    return model.lm_head.weight.numel() / sum(p.numel() for p in model.model.layers[0].parameters())


@pytest.mark.parametrize(
    ("variant", "slower", "four"), [("AVX512_BF16", 1.0, 1.2), ("AVX_VNNI", 1.2, 1.45), ("AVX2", 1.25, 1.7)]
)
def test_estimated_costs_are_those_of_the_formula(variant, slower, four, monkeypatch):
    """Guards against first plans that take torch's kernel for as fast as memory."""
    monkeypatch.setattr(costs, "cpu_operators", lambda: CPUOperators(variant))
    model = tiny_llama(num_layers=10, fused=True)
    head = head_in_layers(model)
    assert draft_ratio(model, 3, "exact") == pytest.approx((3 + head) / (10 + head))
    weights = slower * 5 / 32  # with scales
    assert draft_ratio(model, 3, "int4") == pytest.approx((3 + head) * weights / (10 + head))
    grows = costs.relative_pass_cost(ModelRunner(model), "int4")
    assert (grows(1), grows(4)) == (1.0, pytest.approx(four / slower))


def test_a_copy_on_a_gpu_costs_half_a_step(monkeypatch):
    """Guards against an estimate by bytes: torch's kernel takes half the time of 16 bits, not a third."""
    model = own_llama(10).bfloat16()
    monkeypatch.setattr(type(model), "device", torch.device("cuda"), raising=False)
    monkeypatch.setattr("self_speculation.backends.copies.has_kernel", lambda *_: True)
    head = head_in_layers(model)
    assert draft_ratio(model, 10, "int4") == pytest.approx(95 / 187)
    assert draft_ratio(model, 3, "exact") == pytest.approx((3 + head) / (10 + head))


def test_drafts_of_a_mixture_read_some_of_its_experts():
    """Guards against drafts that seem to read all experts, and so nothing for the head."""
    model = mixture("mixtral", num_local_experts=8)
    layer = model.model.layers[0]
    head = model.lm_head.weight.nbytes
    experts = sum(weight.nbytes for weight in layer.mlp.experts.parameters())
    read = sum(weight.nbytes for weight in layer.parameters()) - 0.75 * experts
    assert draft_ratio(model, 1, "exact") == pytest.approx((read + head) / (4 * read + head))
