"""The four decision functions, each against cases whose right answer is known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from rlplastic.errors import ConfigurationError
from rlplastic.plasticity import monitor
from rlplastic.plasticity.monitor import (
    AGENT_RESET,
    Evidence,
    Rules,
    act,
    is_ill,
    probe,
    screen,
    unaided_returns,
    verify,
    worst_of,
)
from rlplastic.plasticity.patient import Patient, hidden_layers
from rlplastic.plasticity.probe import Probe
from rlplastic.plasticity.representation import rank_correlation

RULES = Rules(probe_steps=60, probe_functions=1)
RANK, NORM = "plasticity/critic/trunk.3/effective_rank", "plasticity/critic/all/weight_norm"


def probed(*ratios: float) -> Probe:
    """A probe with these members' ratios."""
    return Probe(ratios, ratios, tuple(1.0 for _ in ratios), (0, 1, 1, 1), 2)


def patient_of(dead: bool = False) -> Patient:
    """A small critic; a dead one has no unit in its last layer that is ever on, so only its bias can learn."""

    def fresh(key: int) -> nn.Sequential:
        torch.manual_seed(key)
        return nn.Sequential(nn.Linear(3, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))

    module = fresh(0)
    with torch.no_grad():
        if dead:
            module[2].bias.fill_(-100.0)
    rng = torch.Generator().manual_seed(0)
    return Patient(
        "critic",
        module,
        torch.optim.Adam(module.parameters()),
        fresh,
        states=(torch.randn(512, 3, generator=rng),),
        hidden=hidden_layers(module, "", ()),
        head=("4.weight", "4.bias"),
    )


# Screen


def test_healthy_readings_raise_no_alarm_and_ill_ones_do() -> None:
    """As measured: ranks 9 to 11 of 39 and norms to 2.2 times fresh ones in health, 1.3 and 43 times in illness."""
    fresh = {RANK: 39.0, NORM: 20.0}
    assert screen({RANK: 9.0, NORM: 43.0}, fresh, {}, {}) == []
    found = screen({RANK: 1.3, NORM: 859.0}, fresh, {}, {})
    assert [alarm.metric for alarm in found] == [RANK, NORM]
    assert {alarm.module for alarm in found} == {"critic"}
    assert {alarm.reference for alarm in found} == {"a fresh network"}


def test_the_runs_own_early_phase_is_a_reference_too_where_it_is_stricter() -> None:
    fresh, early = {RANK: 20.0}, {RANK: 18.0}
    (alarm,) = screen({RANK: 7.0}, fresh, early, {})
    assert alarm.reference == "its early phase"
    assert alarm.limit == pytest.approx(monitor.SCREENS["effective_rank"].own * 18.0)
    assert screen({RANK: 7.5}, fresh, early, {}) == []


def test_a_run_that_is_ill_before_it_was_ever_healthy_is_found_by_fresh_networks() -> None:
    early = {RANK: 1.4, NORM: 800.0}
    assert len(screen({RANK: 1.3, NORM: 859.0}, {RANK: 39.0, NORM: 20.0}, early, {})) == 2


def test_after_a_false_alarm_a_metric_must_get_clearly_worse() -> None:
    fresh, tolerated = {RANK: 40.0, NORM: 10.0}, {RANK: 5.0, NORM: 100.0}
    assert screen({RANK: 4.0, NORM: 130.0}, fresh, {}, tolerated) == []
    assert len(screen({RANK: 3.4, NORM: 150.0}, fresh, {}, tolerated)) == 2


def test_a_reading_that_is_not_finite_raises_an_alarm() -> None:
    assert len(screen({NORM: math.nan}, {NORM: 10.0}, {}, {})) == 1


def test_values_that_ran_away_from_the_returns_raise_an_alarm_without_any_reference() -> None:
    bias = "plasticity/critic/all/value_bias"
    assert [screen({bias: value}, {}, {}, {}) for value in (2.7, -9.0, math.nan)] == [[], [], []]
    (alarm,) = screen({bias: 7.5}, {}, {}, {})
    assert (alarm.limit, alarm.reference) == (5.0, "the size of returns")
    assert screen({bias: 7.5}, {}, {}, {bias: 7.0}) == [], "tolerated until it is clearly worse"
    assert len(screen({bias: 10.1}, {}, {}, {bias: 7.0})) == 1


def test_metrics_without_a_rule_or_without_a_reference_raise_none() -> None:
    assert (
        screen({"plasticity/critic/all/dormant": 1.0, NORM: 1e9}, {"plasticity/critic/all/dormant": 0.0}, {}, {}) == []
    )
    assert monitor.rule_of("plasticity/critic/trunk.0/weight_norm") is None


def test_the_worst_of_readings_is_the_smallest_rank_and_the_largest_norm() -> None:
    assert worst_of(RANK, [3.0, 1.0, 2.0]) == 1.0
    assert worst_of(NORM, [3.0, 1.0, 2.0]) == 3.0


# Probe


def test_the_slowest_member_decides_and_nan_counts_as_ill() -> None:
    assert not is_ill(probed(0.7, 1.5), RULES)
    assert is_ill(probed(0.7, 1.6), RULES)
    assert is_ill(probed(0.7, math.nan), RULES)


def test_the_ratio_of_two_small_areas_is_no_illness() -> None:
    """As FlashSAC's critic measured, which must be left alone, and plain SAC's, which was ill."""
    assert not is_ill(Probe((2.2,), (0.117,), (0.053,), (0, 1, 1, 1), 2), RULES)
    assert is_ill(Probe((2.3,), (0.275,), (0.12,), (0, 1, 1, 1), 2), RULES)


def test_a_dead_critic_is_ill_and_a_fresh_one_is_not() -> None:
    found = probe({"healthy": patient_of(), "ill": patient_of(dead=True)}, 1, RULES)
    assert found["healthy"].worst < 1.2
    assert found["ill"].worst > 1.5


# Act


def test_the_first_intervention_that_suffices_is_chosen_and_the_patient_is_not_touched() -> None:
    patient = patient_of(dead=True)
    before = {name: value.clone() for name, value in patient.module.state_dict().items()}
    ill = probe({"critic": patient}, 1, RULES)["critic"]
    ladder = ("optimizer_reset", "batch_norm_reestimation", "full_reset")
    rules = Rules(probe_steps=60, probe_functions=1, ladder=ladder)
    chosen, attempts, cost = act(patient, ill, 7, rules)
    assert chosen == "full_reset"
    assert [attempt.intervention for attempt in attempts] == list(rules.ladder)
    assert attempts[0].remark == "no weight changes" and attempts[0].ratio == ill.worst
    assert attempts[1].ratio is None and "does not apply" in attempts[1].remark
    assert attempts[2].ratio is not None and attempts[2].ratio <= rules.healthy
    assert cost == 2 * 60, "one copy and one fresh network on one function"
    assert all(torch.equal(value, before[name]) for name, value in patient.module.state_dict().items())


def test_what_was_dropped_before_is_passed_over() -> None:
    rules = Rules(probe_steps=60, probe_functions=1, ladder=("last_layer_reset", "full_reset"))
    chosen, attempts, _ = act(patient_of(dead=True), probed(9.0), 7, rules, ["last_layer_reset"])
    assert chosen == "full_reset" and attempts[0].remark == "its branch was dropped before"


def test_a_reset_of_the_agent_is_tried_on_the_ill_network_as_its_full_reset() -> None:
    rules = Rules(probe_steps=60, probe_functions=1, ladder=("full_reset", AGENT_RESET))
    patient, ill = patient_of(dead=True), probed(9.0)
    _, (alone,), _ = act(patient, ill, 7, rules)
    chosen, attempts, _ = act(patient, ill, 7, rules, ["full_reset"])
    assert chosen == AGENT_RESET and attempts[1].ratio == alone.ratio


def test_nothing_is_chosen_where_nothing_suffices() -> None:
    patient = patient_of(dead=True)
    ill = probed(9.0)
    chosen, attempts, cost = act(patient, ill, 7, Rules(probe_steps=5, ladder=("optimizer_reset",)))
    assert chosen is None and cost == 0 and len(attempts) == 1


def test_an_unknown_intervention_on_the_ladder_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="'prayer' is no intervention"):
        Rules(ladder=("prayer",))


# Verify


class Judged:
    """Returns, what the network from before knows of them, and the verdict on critics with given values."""

    def __init__(self, knowledge: float = 0.1) -> None:
        rng = torch.Generator().manual_seed(0)
        self.returns = torch.randn(1000, generator=rng).double() * 3 + 5
        self.frozen = self.returns + knowledge * torch.randn(1000, generator=rng) * 3
        self.noise = torch.randn(1000, generator=rng)

    def verdict(self, twin: Tensor, branch: Tensor, ratios: Sequence[float] = (1.0,)) -> monitor.Verdict:
        return verify(Evidence(twin, branch, self.returns, self.frozen, "held-out episodes"), probed(*ratios), RULES)


def test_a_branch_that_says_what_its_twin_says_is_accepted_for_learning_faster_but_not_better() -> None:
    case = Judged()
    verdict = case.verdict(case.returns, case.returns)
    assert verdict.accepted and not verdict.better and verdict.objections == ()
    assert not case.verdict(case.returns, case.returns, (1.0, 1.3)).accepted, "unless its probe is ill"


def test_a_constant_critic_is_rejected_even_beside_a_worthless_twin() -> None:
    case = Judged()
    constant = torch.full_like(case.returns, float(case.returns.mean()))
    for twin in (case.returns, constant, 1000 * case.noise):
        verdict = case.verdict(twin, constant)
        assert not verdict.accepted
        assert "it gives all transitions the same value" in verdict.objections


def test_a_critic_scaled_by_two_is_rejected_by_the_frozen_target() -> None:
    """Its ranks are perfect, and the returns say little where its twin is as far below them as it is above."""
    case = Judged()
    twin = case.returns / 1.5
    case.frozen = twin + 0.01 * case.noise
    verdict = case.verdict(twin, 2 * twin)
    assert verdict.branch.rank_correlation == pytest.approx(1.0)
    assert "it is further from the frozen target" in verdict.objections
    assert "it orders transitions worse by their returns" not in verdict.objections


def test_a_copy_of_the_target_is_no_better_than_its_twin() -> None:
    """By its own target its error would be next to nothing; by common targets it is what its twin is."""
    case = Judged()
    target = case.frozen
    twin = target + 0.02 * case.noise
    verdict = case.verdict(twin, target)
    assert not verdict.better
    assert abs(verdict.gain) < 0.1


def test_an_ill_critics_frozen_target_does_not_bind_what_replaces_it() -> None:
    """It overestimates returns by orders of magnitude, as measured: then only returns and ranks judge."""
    case = Judged()
    case.frozen = 500 + 150 * case.noise.double()
    ill = 530 + 150 * case.noise.double() + 20 * case.returns
    new = case.returns * 0.5 + case.noise
    verdict = case.verdict(ill, new)
    assert not verdict.frozen_counts
    assert verdict.accepted and verdict.better and verdict.gain > 0.9


def test_an_ill_critic_has_no_say_at_the_end_of_returns_that_were_cut_either() -> None:
    """It says millions of what follows, so returns that end in it would be its own values."""
    case = Judged()
    wild = 1e6 * case.noise.double()
    twin, branch = wild, case.returns + case.noise
    cut = Evidence(twin, branch, case.returns + 0.05 * wild, wild, "held-out episodes")
    assert "it orders transitions worse by their returns" in verify(cut, probed(1.0), RULES).objections
    verdict = verify(replace(cut, unaided=case.returns), probed(1.0), RULES)
    assert verdict.accepted and verdict.better and not verdict.frozen_counts


def test_a_healthy_critics_word_counts_at_the_end_of_returns_that_were_cut() -> None:
    case = Judged()
    evidence = Evidence(case.returns, case.returns, case.returns, case.frozen, "held-out episodes")
    verdict = verify(replace(evidence, unaided=case.returns + 0.2 * case.noise), probed(1.0), RULES)
    assert verdict.frozen_counts and verdict.branch.return_error == 0.0


def test_returns_without_a_critic_are_exact_where_rewards_are_constant_and_have_the_mean_that_they_end_in() -> None:
    discount = 0.99 ** torch.tensor([1.0, 3.0, 40.0, 300.0])
    constant = unaided_returns(2 * (1 - discount) / 0.01, discount)
    torch.testing.assert_close(constant, torch.full((4,), 200.0), rtol=1e-5, atol=0)
    rng = torch.Generator().manual_seed(0)
    reward, discount = torch.randn(500, generator=rng), torch.rand(500, generator=rng)
    discount[:50] = 0
    returns = unaided_returns(reward, discount)
    torch.testing.assert_close(returns[:50], reward[:50])
    torch.testing.assert_close(returns, reward + discount * returns.mean(), rtol=1e-4, atol=1e-5)


def test_a_branch_that_forgot_the_order_of_returns_is_rejected() -> None:
    case = Judged()
    verdict = case.verdict(case.returns + case.noise, case.returns.mean() + case.noise.double())
    assert not verdict.accepted
    assert "it orders transitions worse by their returns" in verdict.objections


def test_a_twin_that_orders_transitions_by_chance_has_no_order_to_lose() -> None:
    """As measured on Walker2d: an ill critic at -0.02 and a fresh one at -0.08, errors of 1,000,000 and 3."""
    case = Judged()
    case.frozen = 1e6 * case.noise.double()
    ill = 1e6 * torch.randn(1000, generator=torch.Generator().manual_seed(1)).double()
    twin = ill - 1e6 * float(rank_correlation(ill, case.returns)) * (case.returns - case.returns.mean()) / 3
    fresh = case.noise.double() - 0.1 * (case.returns - case.returns.mean())
    verdict = case.verdict(twin, fresh)
    assert abs(verdict.twin.rank_correlation) < 0.09 < -verdict.branch.rank_correlation
    assert verdict.accepted and verdict.better
    knowing = case.verdict(twin + 1e6 * case.returns, fresh)
    assert "it orders transitions worse by their returns" in knowing.objections


def test_a_branch_that_is_not_finite_is_rejected() -> None:
    case = Judged()
    verdict = case.verdict(case.returns, torch.full_like(case.returns, math.nan))
    assert not verdict.accepted and "it is further from the returns" in verdict.objections


def test_a_treated_policy_must_be_worth_as_much_by_the_frozen_target() -> None:
    case = Judged()
    evidence = Evidence(case.returns, case.returns, case.returns, case.frozen, "held-out episodes", (5.0, 4.9))
    assert verify(evidence, probed(1.0), RULES).accepted
    worse = Evidence(case.returns, case.returns, case.returns, case.frozen, "held-out episodes", (5.0, 4.0))
    assert verify(worse, probed(1.0), RULES).objections == ("its policy is worth less by the frozen target",)
    of_an_ill_critic = replace(worse, frozen=1e6 * case.frozen)
    assert verify(of_an_ill_critic, probed(1.0), RULES).accepted, "which is no judge of policies either"
