"""Every intervention, every sentence it owes, every kind of network: generated from `interventions.table`.

A case is applied once, and what was before and after is compared by each sentence. Where a sentence does not apply, the
test is that nothing of what it speaks of has changed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from batches import random_batch
from patient_networks import ACTIONS, DIMS, KINDS, ROWS, agent_of, patient_of
from torch import Tensor, nn

from rlplastic.agents.adam import Adam
from rlplastic.agents.flashsac import FlashSAC
from rlplastic.agents.flow import FlowCritic
from rlplastic.agents.layers import NormBounds
from rlplastic.agents.sac import SAC
from rlplastic.errors import ConfigurationError
from rlplastic.plasticity.interventions import (
    INTERVENTIONS,
    Applied,
    ContinualBackprop,
    Reference,
    churn_reduction,
    l2_init,
    parseval,
    plasticity_injection,
)
from rlplastic.plasticity.interventions.table import SENTENCES, TABLE, markdown, why_not
from rlplastic.plasticity.optimizers import parameters_of, remembered
from rlplastic.plasticity.patient import Patient, restore

State = dict[str, Tensor]


def continual(patient: Patient, key: int) -> Applied | None:
    return ContinualBackprop(patient, rate=0.3, maturity=0).step(patient, key)


def drawn_to_another(patient: Patient, _key: int) -> None:
    reference = Reference(patient)
    for value in reference.weights.values():
        value.add_(0.1)
    l2_init(patient, reference, 0.5)


def injected(patient: Patient, key: int) -> None:
    if not patient.has_running_statistics:
        plasticity_injection(patient, key, Adam)


def churn(patient: Patient, _key: int) -> None:
    torch.autograd.grad(
        churn_reduction(patient, copy.deepcopy(patient.module), patient.states),
        [p for p in patient.module.parameters() if p.requires_grad],
        allow_unused=True,
    )


def orthogonal(patient: Patient, _key: int) -> None:
    parseval(patient)


APPLY: dict[str, Callable[[Patient, int], Applied | None]] = {
    **INTERVENTIONS,
    "continual_backprop": continual,
    "plasticity_injection": injected,
    "l2_init": drawn_to_another,
    "parseval": orthogonal,
    "churn_reduction": churn,
}


@dataclass
class Case:
    """A patient before and after, and what was told of it."""

    agent: FlashSAC | SAC
    patient: Patient
    name: str
    before: State
    places: dict[str, int]
    applied: Applied | None
    after: State
    random_state: Tensor


def tensors(patient: Patient) -> State:
    """Live tensors: the module's, the target's, and what the optimizers remember."""
    found: State = {}
    for owner, module in (("module", patient.module), ("target", patient.target)):
        if module is not None:
            found |= {f"{owner}.{name}": value for name, value in module.named_parameters()}
            found |= {f"{owner}.{name}": value for name, value in module.named_buffers()}
    for name, parameter in patient.module.named_parameters():
        found |= {f"memory.{name}.{slot}": value for slot, value in remembered(patient.optimizer, parameter).items()}
    if patient.temperature is not None:
        log_alpha, optimizer, _ = patient.temperature
        found["alpha.log_alpha"] = log_alpha
        found |= {f"alpha.{slot}": value for slot, value in remembered(optimizer, log_alpha).items()}
    return found


def copied(state: State) -> State:
    return {name: value.detach().clone() for name, value in state.items()}


def ill(kind: str, network: str) -> tuple[FlashSAC | SAC, Patient]:
    """An agent with a target that lags, lagging statistics, and units that every method finds."""
    agent = agent_of(kind)
    patient = patient_of(agent, network)
    named = dict(patient.module.named_parameters())
    with torch.no_grad():
        for layer in patient.hidden:
            for name in layer.incoming:  # unit 1 is dormant
                if name.endswith(("bias", "beta")):
                    named[name][..., 1] = -50
                elif name.endswith("gain"):
                    named[name][..., 1] = 0
            for name in layer.outgoing:  # unit 2 gets no gradient
                named[name][..., 2] = 0
    patient.project()
    return agent, patient


untreated = cache(ill)
"""What nobody changes."""


@cache
def case(name: str, kind: str, network: str, key: int = 1) -> Case | ConfigurationError:
    agent, patient = ill(kind, network)
    live = tensors(patient)
    before, places = copied(live), {entry: value.data_ptr() for entry, value in live.items()}
    random_state = torch.random.get_rng_state()
    try:
        applied = APPLY[name](patient, key)
    except ConfigurationError as error:
        return error
    return Case(agent, patient, name, before, places, applied, copied(tensors(patient)), random_state)


def changed(found: Case, owner: str) -> set[str]:
    return {n for n in found.before if n.startswith(owner) and not torch.equal(found.before[n], found.after[n])}


def touched(found: Case) -> dict[str, Tensor]:
    """Masks of what was edited, by parameter."""
    named = dict(found.patient.module.named_parameters())
    masks = found.applied.touched if found.applied is not None else {}
    return {n: torch.ones_like(named[n], dtype=torch.bool) if m is None else m for n, m in masks.items()}


# What each sentence says, as a check of a case


def in_place(found: Case) -> None:
    assert {n: value.data_ptr() for n, value in tensors(found.patient).items()} == found.places
    assert changed(found, "")


def optimizer(found: Case) -> None:
    masks = touched(found) if found.name != "optimizer_reset" else {}
    for name, parameter in found.patient.module.named_parameters():
        nothing = torch.full_like(parameter, found.name == "optimizer_reset", dtype=torch.bool)
        mask = masks.get(name, nothing)
        for slot, value in remembered(found.patient.optimizer, parameter).items():
            before = found.before[f"memory.{name}.{slot}"]
            if slot == "step":
                assert float(value) == (0 if mask.all() else float(before))
            else:
                assert not value[mask].any()
                assert torch.equal(value[~mask], before[~mask])
    moved = {id(parameter) for parameter in parameters_of(found.patient.optimizer)}
    assert all(id(p) in moved and p.requires_grad for p in found.patient.module.parameters())


def target(found: Case) -> None:
    assert changed(found, "target")
    if found.name == "full_reset":
        assert all(torch.equal(found.after[f"target.{n}"], p) for n, p in found.patient.module.named_parameters())
        return
    for name, mask in touched(found).items():
        mine, theirs = found.after[f"target.{name}"], found.after[f"module.{name}"]
        assert torch.equal(mine[~mask], found.before[f"target.{name}"][~mask])
        if found.name != "shrink_and_perturb":
            assert torch.equal(mine[mask], theirs[mask])
    if found.name == "shrink_and_perturb":
        for name in (name for name in found.patient.head if name.endswith("bias")):  # the same map, the same draw
            lag = found.before[f"module.{name}"] - found.before[f"target.{name}"]
            now = found.after[f"module.{name}"] - found.after[f"target.{name}"]
            torch.testing.assert_close(now, 0.8 * lag, rtol=0, atol=1e-6)


def record(entering: dict[str, Tensor], name: str, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    entering[name] = inputs[0].detach()


def statistics(found: Case) -> None:
    """Those of what enters each batch norm while all of them use the batch's."""
    for module in filter(None, (found.patient.module, found.patient.target)):
        entering: dict[str, Tensor] = {}
        twin = copy.deepcopy(module)
        norms = {name: part for name, part in twin.named_modules() if hasattr(part, "running_mean")}
        for name, part in norms.items():
            part.register_forward_pre_hook(partial(record, entering, name))
        found.patient.outputs(twin, found.patient.states, True)
        for name, x in entering.items():
            norm = module.get_submodule(name)
            torch.testing.assert_close(norm.running_mean, x.mean(-1).expand_as(norm.running_mean), rtol=0, atol=1e-5)
            torch.testing.assert_close(norm.running_var, x.var(-1).expand_as(norm.running_var), rtol=1e-4, atol=1e-6)
        assert entering.keys() == norms.keys() and len(norms) >= 5


def bounds(found: Case) -> None:
    assert all(float(value) < 1e-5 for value in NormBounds(found.patient.module).deviations().values())
    assert changed(found, "module")


def kept(found: Case) -> None:
    agent, _ = untreated(*kind_of(found))
    now, then = found.agent.state_dict(), agent.state_dict()
    names = [name for name in then if name.startswith(("reward.", "noise.")) or name == "updates"]
    assert names and all(torch.equal(now[name], then[name]) for name in names)


def alpha(found: Case) -> None:
    slots = {"alpha.step", "alpha.exp_avg", "alpha.exp_avg_sq"}
    assert not any(found.after[slot].any() for slot in slots)
    if found.name == "full_reset":
        assert float(found.after["alpha.log_alpha"].exp()) == pytest.approx(found.agent.config.initial_alpha, rel=1e-6)
        assert changed(found, "alpha") == slots | {"alpha.log_alpha"}
    else:
        assert changed(found, "alpha") == slots


def schedule(found: Case) -> None:
    agent, _ = untreated(*kind_of(found))
    assert all(found.agent.learning_rate(i, i / 50) == agent.learning_rate(i, i / 50) for i in range(50))
    assert found.applied is None or found.applied.schedule.startswith("kept")


def randomness(found: Case) -> None:
    again, other = case.__wrapped__(found.name, *kind_of(found)), case(found.name, *kind_of(found), key=2)
    assert isinstance(again, Case) and isinstance(other, Case)
    assert all(torch.equal(again.after[name], value) for name, value in found.after.items())
    assert any(not torch.equal(other.after[name], value) for name, value in found.after.items())
    assert torch.equal(found.random_state, torch.random.get_rng_state())


def references(found: Case) -> None:
    if found.applied is None:  # l2_init has a reference of its own
        return
    reference = Reference(found.patient)
    for name, value in reference.weights.items():
        value.copy_(found.before[f"module.{name}"])
    reference.rebase(found.patient, found.applied)
    masks = touched(found)
    for name, value in reference.weights.items():
        mask = masks.get(name, torch.zeros_like(value, dtype=torch.bool))
        assert torch.equal(value[mask], found.after[f"module.{name}"][mask])
        assert torch.equal(value[~mask], found.before[f"module.{name}"][~mask])
    assert set(found.applied.rebase) == set(masks) != set()


def cooldown(found: Case) -> None:
    assert found.applied is not None and found.applied.cooldown


def rollback(shared: Case) -> None:
    found = case.__wrapped__(shared.name, *kind_of(shared))
    assert found.applied is not None and found.applied.before is not None
    restore(found.patient, found.applied.before)
    assert all(torch.equal(found.before[name], value) for name, value in tensors(found.patient).items())
    twin, _ = ill(*kind_of(found))
    for index in range(2):
        for agent in (found.agent, twin):
            agent.update(random_batch(DIMS, ACTIONS, ROWS, index, 0.8), 0.0)
    theirs = twin.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in found.agent.state_dict().items())


HOLDS: dict[str, Callable[[Case], None]] = {
    "in place": in_place,
    "optimizer": optimizer,
    "target": target,
    "statistics": statistics,
    "bounds": bounds,
    "kept": kept,
    "alpha": alpha,
    "schedule": schedule,
    "randomness": randomness,
    "references": references,
    "cooldown": cooldown,
    "rollback": rollback,
}


def same_for_every_key(found: Case) -> None:
    other = case(found.name, *kind_of(found), key=2)
    assert isinstance(other, Case)
    assert all(torch.equal(other.after[name], value) for name, value in found.after.items())


def parameters_of_target(found: Case) -> set[str]:
    names = dict(found.patient.target.named_parameters()) if found.patient.target is not None else {}
    return changed(found, "target") & {f"target.{name}" for name in names}


def bounded_still(found: Case) -> None:
    """Unbounded networks are not scaled; of bounded ones the norms were never left."""
    if found.patient.unit_rows:
        assert not {n for n in changed(found, "module") if "running" not in n}


def buffers(found: Case) -> set[str]:
    return {name for name in changed(found, "") if "running" in name}


def moved_by_plan(found: Case) -> None:
    """No parameter is named as edited; l2_init moves them all, as any update does."""
    assert found.applied is None or not found.applied.rebase
    if found.name != "l2_init":
        assert not {n for n in changed(found, "module") if "running" not in n}


OWES_NOTHING: dict[str, Callable[[Case], object]] = {
    "in place": lambda found: changed(found, ""),
    "optimizer": lambda found: changed(found, "memory"),
    "target": parameters_of_target,
    "statistics": buffers,
    "bounds": bounded_still,
    "alpha": lambda found: changed(found, "alpha"),
    "randomness": same_for_every_key,
    "references": moved_by_plan,
    "cooldown": lambda found: found.applied,
    "rollback": lambda found: found.applied is not None and found.applied.before is not None,
}
"""Each gives something false where nothing has changed."""


def kind_of(found: Case) -> tuple[str, str]:
    kind = "flashsac" if isinstance(found.agent, FlashSAC) else "sac"
    kind += "_layer_norm" if getattr(found.agent.config, "layer_norm", False) else ""
    flows = isinstance(found.agent.learner.critic, FlowCritic)
    return kind + ("_flow" if flows else ""), found.patient.name


REFUSED = {
    *((("hare_and_tortoise", kind, network)) for kind, network in KINDS if network == "actor"),
    *((("batch_norm_reestimation", kind, network)) for kind, network in KINDS if not kind.startswith("flashsac")),
}
"""No target to return to; no statistics to re-estimate."""


@pytest.mark.parametrize(("kind", "network"), KINDS)
@pytest.mark.parametrize("sentence", SENTENCES)
@pytest.mark.parametrize("name", TABLE)
def test_it_keeps_the_sentence_or_leaves_alone_what_it_speaks_of(
    name: str, sentence: str, kind: str, network: str
) -> None:
    found = case(name, kind, network)
    if (name, kind, network) in REFUSED:
        assert isinstance(found, ConfigurationError)
        return
    assert isinstance(found, Case), found
    if why_not(name, sentence, found.patient) is None:
        HOLDS[sentence](found)
    else:
        assert not OWES_NOTHING[sentence](found)


def test_the_table_has_a_row_for_every_intervention() -> None:
    assert set(TABLE) == set(APPLY)
    assert set(HOLDS) == set(SENTENCES)
    assert all(set(row) <= set(OWES_NOTHING) for row in TABLE.values())


def test_the_documentation_shows_the_table_as_it_is() -> None:
    text = (Path(__file__).parents[2] / "docs" / "plasticity.md").read_text(encoding="utf-8")
    assert markdown() in text


def test_units_that_are_ill_are_found_by_every_method_in_every_network() -> None:
    for kind, network in KINDS:
        for name, unit in (("redo", 1), ("regrama", 2)):
            found = case(name, kind, network)
            assert isinstance(found, Case) and found.applied is not None
            assert all(bool(mask[..., unit].all()) and not mask.all() for mask in found.applied.units.values())
