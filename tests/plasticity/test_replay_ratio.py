"""The published rule against brute force; ours by its properties, and in a loop that a high ratio makes ill."""

from __future__ import annotations

import itertools
import json
import math
import random
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlplastic.errors import ConfigurationError
from rlplastic.plasticity import replay_ratio
from rlplastic.plasticity.measure import LOW_IS_WORSE
from rlplastic.plasticity.replay_ratio import SIGNALS, ContinuousRule, PlateauRule, Rule

LOW, HIGH = 0.25, 4.0
names = st.sampled_from(sorted(SIGNALS))
values = st.floats(-1e6, 1e6)
sequences = st.lists(st.dictionaries(names, values | st.just(math.nan), max_size=4), max_size=60)


# The published rule


@given(st.lists(st.integers(0, 20), max_size=40))
def test_the_published_rule_is_what_brute_force_finds(steps: list[int]) -> None:
    """In units of 0.0004, so that moves of 2 steps are below the tolerance and of 3 above it."""
    fractions = [0.3 + 0.0004 * step for step in steps]
    rule = PlateauRule()
    ratios = [rule.decide({"fau": fraction}).ratio for fraction in fractions]
    moves = [abs(after - before) <= 2 for before, after in itertools.pairwise(steps)]
    first = moves.index(True) + 1 if any(moves) else len(steps)
    assert ratios == [0.5] * first + [2.0] * (len(steps) - first)


def test_the_published_rule_takes_a_move_of_exactly_the_tolerance_for_a_plateau() -> None:
    for move, ratio in {0.25: 2.0, math.nextafter(0.25, 1): 0.5}.items():
        rule = PlateauRule(tolerance=0.25)
        rule.decide({"fau": 0.0})
        assert rule.decide({"fau": -move}).ratio == ratio


def test_the_published_rule_neither_fires_on_a_broken_reading_nor_compares_across_it() -> None:
    rule = PlateauRule()
    for fraction in (0.4, math.nan, 0.4, math.inf, 0.4):
        assert rule.decide({"fau": fraction}).ratio == 0.5
    assert rule.decide({}).ratio == rule.decide({"fau": 0.4}).ratio == 0.5
    assert rule.decide({"fau": 0.4}).ratio == 2.0


# Ours


@given(sequences)
def test_the_ratio_stays_within_its_bounds_and_moves_by_one_step_at_most(readings: list[dict[str, float]]) -> None:
    rule, before = ContinuousRule(LOW, HIGH, step=1.5), LOW
    for reading in readings:
        decision = rule.decide(reading)
        assert LOW <= decision.ratio <= HIGH and decision.ratio == rule.ratio
        assert before / 1.5 - 1e-12 <= decision.ratio <= before * 1.5 + 1e-12
        assert decision.move == (decision.ratio > before) - (decision.ratio < before)
        before = decision.ratio


@given(sequences, st.dictionaries(names, st.tuples(values, values), min_size=1, max_size=4))
def test_worse_readings_never_give_a_higher_ratio(
    past: list[dict[str, float]], pairs: dict[str, tuple[float, float]]
) -> None:
    ratios = []
    for worst in (False, True):
        rule = ContinuousRule(LOW, HIGH)
        for reading in past:
            rule.decide(reading)
        chosen = {n: max(pair) if worst != SIGNALS[n].low_is_worse else min(pair) for n, pair in pairs.items()}
        ratios.append(rule.decide(chosen).ratio)
    assert ratios[1] <= ratios[0]


@given(st.dictionaries(names, values, min_size=1), st.integers(1, 200))
def test_on_constant_signals_it_rises_step_by_step_to_its_bound_and_stays(
    reading: dict[str, float], windows: int
) -> None:
    rule = ContinuousRule(LOW, HIGH)
    ratios = [rule.decide(reading).ratio for _ in range(windows)]
    expected = [min(HIGH, LOW * 1.05**count) for count in range(windows)]
    assert ratios == pytest.approx(expected)
    assert ratios == sorted(ratios)


@given(st.lists(st.floats(1.051, 1.099), max_size=60))
def test_between_calm_and_alarm_nothing_moves(errors: list[float]) -> None:
    rule = ContinuousRule(LOW, HIGH, memory=1)
    with mock.patch.object(replay_ratio, "NOISE", 0.0):
        for _ in range(3):
            rule.decide({"held_out_td_error": 1.0})
        for error in errors:
            decision = rule.decide({"held_out_td_error": error})
            assert (decision.move, decision.ratio) == (0, LOW * 1.05**2)


def by_the_equations(values: list[float], sign: int) -> list[float]:
    """With memory 4, levels are weighted sums over all that has been."""
    ratios, ratio, reference = [], LOW, 0.0
    for now in range(len(values)):
        weights = [0.25 * 0.75 ** (now - then) if then else 0.75**now for then in range(now + 1)]
        level = math.fsum(weight * value for weight, value in zip(weights, values[: now + 1], strict=True))
        noise = 0.0
        for seen, (before, after) in enumerate(itertools.pairwise(values[:now]), start=1):
            noise += ((after - before) ** 2 / 2 - noise) / min(seen, 16)
        allowed, change = 3 * math.sqrt(noise / 7), 0.0
        if not now:
            reference = level
        elif sign * (level - reference) > 0:
            change = max(sign * (level - reference) - allowed, 0) / reference
            reference = 0.75 * reference + 0.25 * level if ratio == LOW else reference
        elif sign * (level - reference) < -allowed:
            reference = level + sign * allowed
        if now:
            ratio = max(LOW, ratio / 1.1) if change > 0.2 else min(HIGH, ratio * 1.1) if change < 0.05 else ratio
        ratios.append(ratio)
    return ratios


@given(st.lists(st.floats(0.3, 3.0), min_size=2, max_size=60), st.sampled_from([1, -1]))
def test_it_moves_as_the_equations_say(values: list[float], sign: int) -> None:
    name = "held_out_td_error" if sign > 0 else "effective_rank"
    rule = ContinuousRule(LOW, HIGH, 1.1, 0.05, 0.2, memory=4)
    assert [rule.decide({name: value}).ratio for value in values] == pytest.approx(by_the_equations(values, sign))


def ratios_on(errors: list[float], rule: ContinuousRule) -> list[float]:
    return [rule.decide({"held_out_td_error": error}).ratio for error in errors]


def test_a_level_that_stays_worse_is_accepted_only_where_the_ratio_is_at_its_least() -> None:
    rule = ContinuousRule(0.5, 2.0, memory=2)
    assert ratios_on([1.0] * 50, rule)[-1] == 2.0
    falling = ratios_on([1.5] * 31, rule)
    assert falling[-1] == 0.5 and falling == sorted(falling, reverse=True)
    later = ratios_on([1.5] * 60, rule)
    assert later[0] == 0.5 and later[-1] == 2.0, "the least ratio did not mend it, so updates are not to blame"


def test_while_a_signal_keeps_getting_worse_the_ratio_stays_low() -> None:
    """As the published rule waits for early losses to end."""
    rule = ContinuousRule(0.5, 2.0)
    ranks = [60 * 0.9**window for window in range(20)]
    early = [rule.decide({"effective_rank": rank}).ratio for rank in ranks]
    late = [rule.decide({"effective_rank": ranks[-1]}).ratio for _ in range(80)]
    assert max(early) < 0.6 and late[-1] > 1.9


def test_one_signal_that_gets_worse_outweighs_all_that_do_not() -> None:
    rule = ContinuousRule(0.5, 2.0, step=2.0)
    steady = {"fau": 0.4, "gradient_dormant": 0.0, "held_out_td_error": 1.0}
    assert [rule.decide(steady).ratio for _ in range(2)] == [0.5, 1.0]
    decision = rule.decide(steady | {"gradient_dormant": 0.1})
    assert (decision.ratio, decision.move) == (0.5, -1)
    assert decision.reason == "gradient_dormant is 20.0% worse than its reference, above alarm"
    assert decision.worse == pytest.approx({"fau": 0.0, "gradient_dormant": 0.2, "held_out_td_error": 0.0})


def test_a_signal_that_is_not_available_neither_moves_the_ratio_nor_its_average() -> None:
    rule = ContinuousRule(0.5, 2.0)
    assert rule.decide({}).reason == "no signal can be compared yet"
    rule.decide({"fau": 0.4})
    state = rule.state_dict()
    for missing in ({}, {"fau": math.nan}, {"fau": math.inf}):
        decision = rule.decide(missing)
        assert (decision.move, decision.worse) == (0, {}) and rule.state_dict() == state


def next_error(error: float, ratio: float) -> float:
    """Of a critic that overfits with the square of the ratio above 1, and takes windows to do so."""
    return error + 0.3 * (1 + max(ratio - 1, 0) ** 2 - error)


@pytest.mark.parametrize(
    ("noise", "most", "mean", "worst"), [(0.0, 1.8, 1.4, 1.4), (0.05, 1.8, 1.4, 1.5), (0.3, 3.0, 2.0, 4.4)]
)
def test_where_a_high_ratio_raises_the_error_it_settles_below(
    noise: float, most: float, mean: float, worst: float
) -> None:
    rng = random.Random(0)
    rule, error, ratios, errors = ContinuousRule(0.5, 8.0), 1.0, [], []
    for _ in range(2000):
        ratios.append(rule.decide({"held_out_td_error": error * (1 + noise * rng.gauss(0, 1))}).ratio)
        error = next_error(error, ratios[-1])
        errors.append(error)
    late = ratios[500:]
    assert min(late) > 0.6 and max(late) < most and 1.0 < sum(late) / len(late) < mean
    assert max(errors) < worst, "fixed at its bound the error would go to 50"
    assert ratios_on([1.0] * 100, ContinuousRule(0.5, 8.0))[-1] == 8.0, "and nothing else keeps it low"


@pytest.mark.parametrize("noise", [0.05, 0.4])
def test_noise_alone_does_not_bring_it_down(noise: float) -> None:
    rng = random.Random(1)
    ratios = ratios_on([1 + noise * rng.gauss(0, 1) for _ in range(1000)], ContinuousRule(0.5, 2.0))
    assert min(ratios[100:]) > 1.7


def test_a_change_beyond_the_noise_brings_it_down() -> None:
    rng = random.Random(2)
    rule = ContinuousRule(0.5, 2.0)
    assert ratios_on([1 + 0.4 * rng.gauss(0, 1) for _ in range(100)], rule)[-1] == 2.0
    assert ratios_on([2 + 0.4 * rng.gauss(0, 1) for _ in range(60)], rule)[-1] < 0.7


# Both


@pytest.mark.parametrize("make", [PlateauRule, lambda: ContinuousRule(0.5, 2.0)], ids=["plateau", "continuous"])
@given(readings=st.lists(st.fixed_dictionaries({"fau": st.floats(0, 1) | st.just(math.nan)}), max_size=30))
def test_a_rule_continues_from_its_state_as_if_never_interrupted(make: type[Rule], readings: list[dict]) -> None:
    whole, halves = make(), make()
    for index, reading in enumerate(readings):
        if index == len(readings) // 2:
            state = json.loads(json.dumps(halves.state_dict(), allow_nan=False))
            halves = make()
            halves.load_state_dict(state)
            assert halves.ratio == whole.ratio
        assert halves.decide(reading) == whole.decide(reading)


def test_directions_are_those_of_the_metrics() -> None:
    measured = [signal for signal in SIGNALS.values() if signal.source != "td_error"]
    assert all(signal.low_is_worse == (signal.metric in LOW_IS_WORSE) for signal in measured)


@pytest.mark.parametrize(
    "numbers",
    [{"low": 0.0}, {"low": 3.0}, {"step": 1.0}, {"alarm": 0.01}, {"memory": 0.5}, {"high": math.nan}],
    ids=str,
)
def test_numbers_that_contradict_each_other_are_refused(numbers: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match="do not go together"):
        ContinuousRule(**({"low": 0.5, "high": 2.0} | numbers))


def test_after_an_edit_of_the_network_the_next_reading_is_the_reference_and_the_ratio_stays() -> None:
    rule, fresh = ContinuousRule(low=0.5, high=2.0), ContinuousRule(low=0.5, high=2.0)
    for _ in range(3):
        rule.decide({"weight_norm": 1.0})
    ratio = rule.ratio
    rule.rebase()
    decision = rule.decide({"weight_norm": 50.0})
    assert ratio > 0.5 and (decision.ratio, decision.move, decision.worse) == (ratio, 0, {})
    fresh.decide({"weight_norm": 50.0})
    assert rule.decide({"weight_norm": 51.0}).worse == fresh.decide({"weight_norm": 51.0}).worse != {}


def test_the_published_rule_does_not_compare_across_an_edit_and_stays_where_it_fired() -> None:
    rule = PlateauRule()
    rule.decide({"fau": 0.5})
    rule.rebase()
    assert rule.decide({"fau": 0.5}).ratio == rule.low and rule.decide({"fau": 0.5}).ratio == rule.high
    rule.rebase()
    assert rule.decide({"fau": 0.9}).ratio == rule.high
