"""Each intervention against its paper, on a bare torch network; what all of them owe is in the table's test."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from patient_networks import agent_of, bare_patient, mlp, normal, patient_of
from torch import Tensor, nn

from rlplastic.agents.adam import Adam
from rlplastic.agents.patients import patients
from rlplastic.errors import ConfigurationError
from rlplastic.plasticity import units
from rlplastic.plasticity.interventions import (
    INTERVENTIONS,
    ContinualBackprop,
    Reference,
    batch_norm_reestimation,
    churn_reduction,
    full_reset,
    hare_and_tortoise,
    l2_init,
    last_layer_reset,
    optimizer_reset,
    parseval,
    plasticity_injection,
    redo,
    regrama,
    shrink_and_perturb,
)
from rlplastic.plasticity.interventions.resets import turned
from rlplastic.plasticity.patient import Patient, restore
from rlplastic.plasticity.probe import probe
from rlplastic.plasticity.weights import row_angles


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def train(patient: Patient, steps: int, goal: Callable[[Tensor], Tensor] = lambda x: x.sum(-1, keepdim=True)) -> None:
    """A supervised loop as anyone writes it."""
    assert isinstance(patient.optimizer, torch.optim.Optimizer)
    for _ in range(steps):
        patient.optimizer.zero_grad()
        (patient.module(*patient.states) - goal(patient.states[0])).square().mean().backward()
        patient.optimizer.step()


def with_loss(patient: Patient) -> Patient:
    return replace(patient, loss=lambda net: (net(*patient.states) - 1).square().mean())


# Whole tensors


def test_a_full_reset_is_the_fresh_network_and_its_target_a_copy_buffers_included() -> None:
    patient = bare_patient(target=True)
    assert patient.target is not None
    for module, scale in ((patient.module, 1.0), (patient.target, 2.0)):
        module.register_buffer("scale", torch.tensor(scale))
    train(patient, 3)
    full_reset(patient, 7)
    assert patient.target.get_buffer("scale") == 1
    for name, value in weights(mlp(7)).items():
        assert torch.equal(weights(patient.module)[name], value)
        assert torch.equal(weights(patient.target)[name], value)


def test_a_last_layer_reset_touches_the_head_alone() -> None:
    patient = bare_patient()
    before = weights(patient.module)
    last_layer_reset(patient, 7)
    for name, value in weights(patient.module).items():
        assert torch.equal(value, weights(mlp(7))[name] if name.startswith("4.") else before[name])
    with pytest.raises(ConfigurationError, match="head"):
        last_layer_reset(replace(patient, head=()), 7)


def test_shrink_and_perturb_is_its_formula_for_network_and_target() -> None:
    patient = bare_patient(target=True)
    assert patient.target is not None
    network, target, fresh = weights(patient.module), weights(patient.target), weights(mlp(7))
    shrink_and_perturb(patient, 7, shrink=0.6, perturb=0.3)
    for name in network:
        torch.testing.assert_close(weights(patient.module)[name], 0.6 * network[name] + 0.3 * fresh[name])
        torch.testing.assert_close(weights(patient.target)[name], 0.6 * target[name] + 0.3 * fresh[name])


def test_unit_rows_turn_by_the_angle_of_the_factors_towards_the_fresh_row() -> None:
    agent = agent_of("flashsac")
    patient = patient_of(agent, "critic")
    before = weights(patient.module)
    shrink_and_perturb(patient, 7, shrink=0.8, perturb=0.2)
    fresh = weights(patient.fresh(7))
    for name in patient.unit_rows:
        after = weights(patient.module)[name]
        torch.testing.assert_close(row_angles(after, before[name]), torch.full(after.shape[:-1], 0.2449786631).double())
        if after.shape[-1] > 1:  # what is left to the fresh row is the rest of the angle
            left = row_angles(before[name], fresh[name]) - math.atan2(0.2, 0.8)
            torch.testing.assert_close(row_angles(after, fresh[name]), left, rtol=0, atol=1e-5)


def test_rows_turn_in_their_plane_and_keep_their_norms() -> None:
    rows = turned(torch.tensor([[3.0, 0.0, 0.0]]), torch.tensor([[5.0, 0.0, 2.0]]), math.pi / 6)
    torch.testing.assert_close(rows, torch.tensor([[3 * math.cos(math.pi / 6), 0.0, 1.5]]))


def test_the_hare_returns_to_the_tortoise_which_is_the_average_in_closed_form() -> None:
    patient = bare_patient()
    start = weights(patient.module)
    tortoise = Reference(patient)
    trace = [start]
    for _ in range(4):
        train(patient, 1)
        tortoise.follow(patient, 0.1)
        trace.append(weights(patient.module))
    hare_and_tortoise(patient, 0, tortoise.weights)
    for name, value in weights(patient.module).items():
        terms = [0.9**4 * start[name], *(0.1 * 0.9 ** (4 - i) * trace[i][name] for i in range(1, 5))]
        torch.testing.assert_close(value, torch.stack(terms).sum(0))
    with pytest.raises(ConfigurationError, match="no target"):
        hare_and_tortoise(patient, 0)


def test_an_optimizer_reset_makes_the_next_moves_those_of_a_new_optimizer() -> None:
    patient, other = bare_patient(), bare_patient()
    train(patient, 20)
    optimizer_reset(patient, 0)
    other.module.load_state_dict(patient.module.state_dict())
    train(patient, 5)
    train(other, 5)
    for name, value in weights(patient.module).items():
        torch.testing.assert_close(value, weights(other.module)[name], rtol=0, atol=1e-7)


def test_nothing_to_re_estimate_is_said() -> None:
    with pytest.raises(ConfigurationError, match="no batch norm"):
        batch_norm_reestimation(bare_patient(), 0)


def test_a_refused_intervention_has_changed_nothing() -> None:
    agent = agent_of("flashsac")
    before = {name: value.clone() for name, value in agent.state_dict().items()}
    for patient in patients(agent).values():
        with pytest.raises(ConfigurationError, match="replay rows"):
            full_reset(patient, 1)
    assert all(torch.equal(value, before[name]) for name, value in agent.state_dict().items())
    narrow = bare_patient(fresh=lambda key: mlp(key, width=8))
    kept = weights(narrow.module)
    for name in ("redo", "shrink_and_perturb", "full_reset"):
        with pytest.raises(ConfigurationError, match=r"0\.weight"):
            INTERVENTIONS[name](narrow, 1)
    assert all(torch.equal(value, kept[name]) for name, value in weights(narrow.module).items())


# Single units


def test_redo_replaces_dormant_units_and_leaves_the_outputs_as_they_were() -> None:
    patient = bare_patient()
    with torch.no_grad():
        for index, dead in ((0, [1, 5]), (2, [2])):
            patient.module[index].bias.fill_(1)  # none is dormant by itself
            patient.module[index].bias[dead] = -100
    before, outputs = weights(patient.module), patient.module(*patient.states)
    dormant = [units.dormant_ratio(patient.module[:end](*patient.states)) for end in (2, 4)]
    applied = redo(patient, 7)
    fresh, after = weights(mlp(7)), weights(patient.module)
    assert applied.units["1"].nonzero().flatten().tolist() == [1, 5]
    assert applied.units["3"].nonzero().flatten().tolist() == [2]
    assert [float(ratio) for ratio in dormant] == [2 / 16, 1 / 16]
    assert torch.equal(patient.module(*patient.states), outputs)  # they gave nothing, and give nothing
    assert torch.equal(after["0.weight"][[1, 5]], fresh["0.weight"][[1, 5]])
    assert torch.equal(after["0.bias"][[1, 5]], fresh["0.bias"][[1, 5]])
    assert not after["2.weight"][:, [1, 5]].any() and not after["4.weight"][:, 2].any()
    rest = [i for i in range(16) if i not in (1, 5)]
    assert torch.equal(after["2.weight"][2, rest], fresh["2.weight"][2, rest])
    assert torch.equal(after["0.weight"][rest], before["0.weight"][rest])
    assert float(units.dead_fraction(patient.module[:2](*patient.states))) == 0


def test_redo_scores_members_apart() -> None:
    patient = patient_of(agent_of("sac"), "critic")
    with torch.no_grad():
        dict(patient.module.named_parameters())["trunk.0.bias"][1, 4] = -100
    mask = redo(patient, 7).units["trunk.1"]
    assert mask.shape == (2, 8)
    assert mask[1, 4] and not mask[0, 4]


def test_where_no_unit_is_found_nothing_is_done() -> None:
    patient = bare_patient()
    train(patient, 2)
    before, memory = weights(patient.module), copy.deepcopy(patient.optimizer.state_dict())  # type: ignore[union-attr]
    applied = redo(patient, 7, tau=-1)
    assert not applied.cooldown and not applied.touched
    assert all(torch.equal(value, before[name]) for name, value in weights(patient.module).items())
    now = patient.optimizer.state_dict()["state"]  # type: ignore[union-attr]
    assert all(torch.equal(now[i][slot], memory["state"][i][slot]) for i in now for slot in now[i])


def test_regrama_does_not_find_the_units_again_that_it_replaced() -> None:
    patient = with_loss(bare_patient())
    with torch.no_grad():
        patient.module[4].weight[:, [3, 9]] = 0
    applied = regrama(patient, 7)
    assert applied.units["3"].nonzero().flatten().tolist() == [3, 9]
    torch.testing.assert_close(weights(patient.module)["4.weight"][:, 3], 0.1 * weights(mlp(7))["4.weight"][:, 3])
    assert not any(mask.any() for mask in regrama(patient, 8).units.values())
    redo(patient, 9, tau=math.inf)  # zero outgoing weights are found at once
    assert all(mask.all() for mask in regrama(patient, 10).units.values())


def test_units_need_what_they_are_scored_by() -> None:
    with pytest.raises(ConfigurationError, match="states"):
        redo(bare_patient(states=()), 0)
    with pytest.raises(ConfigurationError, match="loss"):
        regrama(bare_patient(), 0)
    with pytest.raises(ConfigurationError, match="hidden"):
        ContinualBackprop(bare_patient(hidden=()))


def test_continual_backprop_keeps_account_as_a_plain_loop_does() -> None:
    patient = bare_patient(rows=32)
    decay, rate, maturity = 0.9, 0.02, 5
    method = ContinualBackprop(patient, decay=decay, rate=rate, maturity=maturity)
    utility, age, account = [[0.0] * 16 for _ in range(2)], [[0] * 16 for _ in range(2)], [0.0, 0.0]
    total = 0
    for step in range(40):
        train(patient, 1)
        before = weights(patient.module)
        expected: list[list[int]] = []
        for layer, (end, leaving) in enumerate(((2, "2.weight"), (4, "4.weight"))):
            h = patient.module[:end](*patient.states).detach()
            for i in range(16):
                contribution = float(h[:, i].abs().mean() * before[leaving][:, i].abs().sum())
                utility[layer][i] = decay * utility[layer][i] + (1 - decay) * contribution
                age[layer][i] += 1
            mature = [i for i in range(16) if age[layer][i] > maturity]
            account[layer] += rate * len(mature)
            chosen = sorted(mature, key=lambda i: utility[layer][i])[: int(account[layer])]
            account[layer] -= len(chosen)
            for i in chosen:
                utility[layer][i], age[layer][i] = 0.0, 0
            expected.append(sorted(chosen))
        applied = method.step(patient, key=3)
        for name, mine in (("1", utility[0]), ("3", utility[1])):
            assert method.state_dict()[f"utility.{name}"].tolist() == pytest.approx(mine, rel=1e-4), step
        assert (applied is None) == (not any(expected)), step
        if applied is not None:
            found = [applied.units[name].nonzero().flatten().tolist() for name in ("1", "3")]
            assert found == expected, step
            total += sum(map(len, found))
            assert not weights(patient.module)["4.weight"][:, found[1]].any()
    assert total == pytest.approx(2 * 16 * rate * (40 - maturity), abs=3)


def test_continual_backprop_continues_bit_for_bit_and_never_draws_twice_the_same() -> None:
    whole, half = bare_patient(rows=32), bare_patient(rows=32)
    settings = {"rate": 0.05, "maturity": 0}
    first, second = ContinualBackprop(whole, **settings), ContinualBackprop(half, **settings)
    drawn = []
    for step in range(20):
        if step == 10:
            saved = {name: value.clone() for name, value in second.state_dict().items()}
            second = ContinualBackprop(half, **settings)
            second.load_state_dict(saved)
        for patient, method in ((whole, first), (half, second)):
            train(patient, 1)
            applied = method.step(patient, key=1)
            if patient is whole and applied is not None:
                drawn += [tuple(row.tolist()) for row in weights(whole.module)["0.weight"][applied.units["1"]]]
    assert all(torch.equal(value, weights(half.module)[name]) for name, value in weights(whole.module).items())
    assert len(drawn) > 10 and len(set(drawn)) == len(drawn)


# What acts in every update


def test_l2_init_decays_towards_its_reference_geometrically_and_leaves_moments_alone() -> None:
    patient = bare_patient()
    reference = Reference(patient)
    train(patient, 3)
    start, memory = weights(patient.module), copy.deepcopy(patient.optimizer.state_dict()["state"])  # type: ignore[union-attr]
    for _ in range(5):
        l2_init(patient, reference, 0.1)
    for name, value in weights(patient.module).items():
        anchor = reference.weights[name]
        torch.testing.assert_close(value, anchor + 0.9**5 * (start[name] - anchor), rtol=1e-5, atol=1e-7)
    now = patient.optimizer.state_dict()["state"]  # type: ignore[union-attr]
    assert all(torch.equal(now[i][slot], memory[i][slot]) for i in now for slot in now[i])


def test_a_reference_starts_anew_where_an_intervention_edited() -> None:
    patient = bare_patient()
    reference = Reference(patient)
    train(patient, 3)
    old = {name: value.clone() for name, value in reference.weights.items()}
    reference.rebase(patient, last_layer_reset(patient, 7))
    for name, value in reference.weights.items():
        assert torch.equal(value, weights(patient.module)[name] if name.startswith("4.") else old[name])
    twin = Reference(bare_patient(key=5))
    twin.load_state_dict(reference.state_dict())
    assert all(torch.equal(value, reference.weights[name]) for name, value in twin.weights.items())


def test_parseval_is_zero_for_orthonormal_rows_or_columns_and_its_formula_elsewhere() -> None:
    patient = bare_patient()
    with torch.no_grad():
        for index in (0, 2):  # 16 x 3 has orthonormal columns, 16 x 16 both
            nn.init.orthogonal_(patient.module[index].weight)
        assert float(parseval(patient)) == pytest.approx(0, abs=1e-5)
        patient.module[2].weight.mul_(2)
        assert float(parseval(patient)) == pytest.approx(16 * 9, rel=1e-5)
        assert float(parseval(patient, scale=4)) == pytest.approx(3 * 9, rel=1e-4)


def test_parseval_is_the_mean_over_members() -> None:
    patient = patient_of(agent_of("sac"), "critic")
    expected = []
    for member in range(2):
        total = 0.0
        for name in ("trunk.0.weight", "trunk.2.weight"):
            weight = dict(patient.module.named_parameters())[name][member].detach()
            total += float((weight @ weight.T - torch.eye(8)).square().sum())
        expected.append(total)
    assert float(parseval(patient).detach()) == pytest.approx(sum(expected) / 2, rel=1e-5)


def test_churn_is_the_mean_square_of_what_an_update_changed_elsewhere() -> None:
    def linear(key: int) -> nn.Linear:
        return nn.Linear(3, 1).requires_grad_(key >= 0)

    net = linear(0)
    patient = Patient("net", net, torch.optim.SGD(net.parameters(), 0.1), linear)
    previous = copy.deepcopy(net)
    shift = torch.tensor([[0.1, -0.2, 0.3]])
    with torch.no_grad():
        net.weight.add_(shift)
    x = normal(50, 3)
    term = churn_reduction(patient, previous, (x,))
    term.backward()
    change = x @ shift.T
    torch.testing.assert_close(term.detach(), change.square().mean())
    torch.testing.assert_close(net.weight.grad, 2 * (change * x).mean(0, keepdim=True))
    assert previous.weight.grad is None and net.training


# Plasticity injection


@pytest.mark.parametrize("kind", ["bare", "sac", "sac_layer_norm"])
def test_injection_changes_no_output_and_only_the_learner_trains(kind: str) -> None:
    old = bare_patient(target=True) if kind == "bare" else patient_of(agent_of(kind), "critic")
    state = torch.random.get_rng_state()
    new = plasticity_injection(old, 7, Adam)
    assert torch.equal(state, torch.random.get_rng_state()) and old.target is not None and new.target is not None
    for before, after in ((old.module, new.module), (old.target, new.target)):
        assert torch.equal(old.outputs(before, old.states, True), new.outputs(after, new.states, True))
    trains = [name for name, parameter in new.module.named_parameters() if parameter.requires_grad]
    assert trains and all(name.startswith("learner.") for name in trains)
    frozen = {name: value.clone() for name, value in new.module.named_parameters() if name not in trains}
    kept = weights(old.module)
    loss = new.outputs(new.module, new.states, True).square().mean()
    optimizer = new.optimizer
    assert isinstance(optimizer, Adam)
    optimizer.step(list(torch.autograd.grad(loss, optimizer.parameters)), 1e-3)
    assert not torch.equal(old.outputs(old.module, old.states, True), new.outputs(new.module, new.states, True))
    assert all(torch.equal(value, dict(new.module.named_parameters())[name]) for name, value in frozen.items())
    assert all(torch.equal(value, weights(old.module)[name]) for name, value in kept.items())


def test_an_injected_network_can_be_probed_and_treated_further() -> None:
    new = plasticity_injection(bare_patient(), 7, Adam)
    assert probe(new, new.states, 1, steps=5).ratio == pytest.approx(1, abs=0.5)
    frozen = new.module.frozen[0].weight.clone()
    applied = redo(new, 3, tau=math.inf)
    assert set(applied.units) == {"learner.1", "learner.3"} and torch.equal(frozen, new.module.frozen[0].weight)
    full_reset(new, 4)
    assert applied.before is not None
    restore(new, applied.before)
    with pytest.raises(ConfigurationError, match="batch norms"):
        plasticity_injection(patient_of(agent_of("flashsac"), "critic"), 1, Adam)


# Anyone's loop


def test_a_bare_supervised_loop_is_measured_cured_and_rolled_back() -> None:
    patient = bare_patient(rows=512)
    with torch.no_grad():
        patient.module[2].bias.fill_(-100)  # a dead layer: nothing but the mean can be learnt
    before = probe(patient, patient.states, 0, steps=100)
    train(patient, 50)
    errors = {}
    for name in ("optimizer_reset", "redo", "full_reset"):
        applied = INTERVENTIONS[name](patient, 1)
        after = probe(patient, patient.states, 0, steps=100, reference=before)
        train(patient, 300)
        with torch.no_grad():
            error = patient.module(*patient.states) - patient.states[0].sum(-1, keepdim=True)
            errors[name] = float(error.square().mean())
        assert (after.ratio < 0.9 * before.ratio) == (name != "optimizer_reset")
        assert applied.before is not None and isinstance(applied.evidence()["optimizer"], str)
        restore(patient, applied.before)
    assert errors["optimizer_reset"] > 2 > 0.2 > max(errors["redo"], errors["full_reset"])
