"""A patient: refused where it does not fit, copied, rolled back, its statistics re-estimated."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from batches import random_batch
from patient_networks import ACTIONS, DIMS, FLOW, KINDS, ROWS, agent_of, bare_patient, mlp, normal, patient_of
from torch import nn

from rlplastic import seeding
from rlplastic.agents.flashsac import networks as flashsac
from rlplastic.agents.flow import FlowCritic
from rlplastic.agents.heads import Categorical, Scalar
from rlplastic.agents.layers import NormBounds
from rlplastic.agents.patients import patients
from rlplastic.agents.sac import networks as sac
from rlplastic.agents.steps import CriticNoise
from rlplastic.agents.subjects import inputs_of
from rlplastic.errors import ConfigurationError
from rlplastic.plasticity.patient import Hidden, Patient, copy_of, hidden_layers, keyed, reestimate, restore, snapshot

CONSTRUCTIONS: dict[tuple[str, str], Callable[[], nn.Module]] = {
    ("flashsac", "actor"): lambda: flashsac.Actor(4, ACTIONS, 8, 2),
    ("flashsac", "critic"): lambda: flashsac.Critic(6, ACTIONS, 8, 2, Categorical(11, 5.0), 2),
    ("sac", "actor"): lambda: sac.Actor(4, ACTIONS, 8, 2),
    ("sac", "critic"): lambda: sac.Critic(6, ACTIONS, 8, 2, Scalar(), 2),
    ("sac_layer_norm", "actor"): lambda: sac.Actor(4, ACTIONS, 8, 2, True),
    ("sac_layer_norm", "critic"): lambda: sac.Critic(6, ACTIONS, 8, 2, Scalar(), 2, True),
    ("flashsac_flow", "critic"): lambda: flashsac.make_critic(6, ACTIONS, 8, 2, FLOW),
    ("sac_flow", "critic"): lambda: sac.make_critic(6, ACTIONS, 8, 2, FLOW),
}
"""The networks as the agents make them."""


def test_a_patient_whose_optimizer_leaves_a_parameter_out_is_refused() -> None:
    net = mlp(0)
    with pytest.raises(ConfigurationError, match=r"'4\.weight'"):
        Patient("net", net, torch.optim.Adam(net[:3].parameters()), mlp)


def test_names_and_units_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="no parameter 'tail'"):
        bare_patient(head=("tail",))
    with pytest.raises(ConfigurationError, match=r"\[3, 16\] units"):
        bare_patient(hidden=(Hidden("1", ("0.weight",), ("0.weight",)),))


def test_hidden_layers_of_a_sequence_end_at_its_head_or_at_its_readers() -> None:
    net = nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 5), nn.ReLU())
    first = Hidden("0.2", ("0.0.weight", "0.0.bias", "0.1.weight", "0.1.bias"), ("0.3.weight",))
    assert hidden_layers(net, "0.", ()) == (first,)
    second = Hidden("0.4", ("0.3.weight", "0.3.bias"), ("1.weight",))
    assert hidden_layers(net, "0.", ("1.weight",)) == (first, second)


@pytest.mark.parametrize(("kind", "network"), KINDS)
def test_hidden_units_are_where_they_are_said_to_be(kind: str, network: str) -> None:
    """Cutting a unit's outgoing weights, and changing its incoming ones, both leave the outputs as without the unit."""
    patient = patient_of(agent_of(kind), network)
    named = dict(patient.module.named_parameters())
    with torch.no_grad():
        for layer in patient.hidden:
            for name in layer.outgoing:
                named[name].select(patient.lead + 1, 3).zero_()
        before = patient.outputs(patient.module, patient.states, False)
        for layer in patient.hidden:
            for name in layer.incoming:
                # A norm mixes a layer's units: there only gain and bias are the unit's alone.
                normed = kind in ("sac_layer_norm", "flashsac_flow")
                if not normed or ("weight" not in name and name not in ("trunk.0.bias", "trunk.3.bias")):
                    named[name].select(patient.lead, 3).fill_(0.7)
        after = patient.outputs(patient.module, patient.states, False)
    assert torch.equal(before, after)


@pytest.mark.parametrize(("kind", "network"), KINDS)
def test_a_fresh_network_is_as_the_agents_own_was(kind: str, network: str) -> None:
    agent = agent_of(kind, updates=0)
    patient = patient_of(agent, network)
    state = torch.random.get_rng_state()
    fresh, again, other = patient.fresh(1), patient.fresh(1), patient.fresh(2)
    assert torch.equal(state, torch.random.get_rng_state())
    own = patient.module.state_dict()
    assert {n: v.shape for n, v in fresh.state_dict().items()} == {n: v.shape for n, v in own.items()}
    assert all(torch.equal(v, again.state_dict()[n]) for n, v in fresh.state_dict().items())
    weight = patient.head[-1] if patient.head[-1].endswith("weight") else patient.head[0]
    assert not torch.equal(fresh.state_dict()[weight], other.state_dict()[weight])
    assert not torch.equal(fresh.state_dict()[weight], own[weight])
    outputs = [patient.outputs(module, patient.states, True) for module in (fresh, copy.deepcopy(patient.module))]
    assert outputs[0].shape == outputs[1].shape == (patient.members or 1, len(patient.states[0]), outputs[0].shape[-1])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeding.key("fresh", 0, network, 1))
        expected = CONSTRUCTIONS[kind, network]()
    if kind.startswith("flashsac"):
        NormBounds(expected).project()
    assert all(torch.equal(v, again.state_dict()[n]) for n, v in expected.state_dict().items())
    assert all(parameter.requires_grad for parameter in fresh.parameters())
    assert not torch.equal(
        patient.fresh(1).state_dict()[weight], patient_of(agent_of(kind, seed=1), network).fresh(1).state_dict()[weight]
    )


@pytest.mark.parametrize(("kind", "network"), KINDS)
def test_a_loss_is_that_of_the_agent_and_leaves_everything_as_it_was(kind: str, network: str) -> None:
    agent = agent_of(kind)
    patient = patient_of(agent, network)
    before = {name: value.clone() for name, value in agent.state_dict().items()}
    assert patient.loss is not None
    value, again = (float(patient.loss(copy.deepcopy(patient.module)).detach()) for _ in range(2))
    assert value == again
    assert all(torch.equal(value, before[name]) for name, value in agent.state_dict().items())
    # The agent's own update with the same noise tells the same loss.
    inputs = inputs_of(agent, random_batch(DIMS, ACTIONS, 64, 7, 0.8))
    noise: CriticNoise = torch.zeros(64, ACTIONS)
    if isinstance(agent.learner.critic, FlowCritic):
        of_flow = agent.learner.critic.noise(64, ACTIONS, seeding.generator("cpu", 0, "noise of measurements", 0))
        noise = of_flow._replace(action=torch.zeros_like(of_flow.action))
    agent.updates = 4  # both networks are due
    metrics = agent.move(inputs, torch.zeros(64 * agent.ACTOR_ROWS, ACTIONS), noise, agent.rates(0.0))
    if kind.startswith("flashsac") == (network == "actor"):  # what moves first
        assert value == pytest.approx(float(metrics[f"loss/{network}"]), rel=1e-5)


def test_flashsac_reads_its_bottlenecks_under_batch_statistics() -> None:
    agent = agent_of("flashsac")
    patient = patient_of(agent, "critic")
    layers = patient.reader(patient.module)(patient.states)
    assert list(layers) == [layer.name for layer in patient.hidden]
    assert all(layer.values.shape == (2, 128, 32) for layer in layers.values())
    module = copy.deepcopy(patient.module)
    assert isinstance(module, flashsac.Critic)
    trunk, block = module.trunk, module.trunk.blocks[0]
    x = torch.cat(patient.states, -1).mT
    hidden = block.expand_norm(block.expand(trunk.embed(trunk.input_norm(x, True))), True).relu()
    torch.testing.assert_close(layers["trunk.blocks.0.expand_norm"].values, hidden.mT)


def test_a_copy_shares_nothing_and_behaves_the_same() -> None:
    agent = agent_of("flashsac")
    patient = patient_of(agent, "actor")
    twin = copy_of(patient)
    before = {name: value.clone() for name, value in agent.state_dict().items()}
    assert twin.temperature is not None and patient.temperature is not None
    assert twin.optimizer.parameters[0] is next(twin.module.parameters())  # type: ignore[union-attr]
    for tensors in (twin.module.parameters(), twin.optimizer.state_of(0).values(), [twin.temperature.log_alpha]):  # type: ignore[union-attr]
        for tensor in tensors:
            tensor.detach().add_(1)
    assert all(torch.equal(value, before[name]) for name, value in agent.state_dict().items())
    twin.project()
    assert all(float(value) < 1e-5 for value in NormBounds(twin.module).deviations().values())


@pytest.mark.parametrize("kind", ["flashsac", "sac"])
@pytest.mark.parametrize("network", ["actor", "critic"])
def test_a_roll_back_continues_bit_for_bit(kind: str, network: str) -> None:
    agent, twin = agent_of(kind), agent_of(kind)
    patient = patient_of(agent, network)
    saved = snapshot(patient)
    with torch.no_grad():
        for module in filter(None, (patient.module, patient.target)):
            for tensor in (*module.parameters(), *module.buffers()):
                tensor.add_(0.3)
        for value in patient.optimizer.state_of(0).values():  # type: ignore[union-attr]
            value.add_(1)
    restore(patient, saved)
    for index in range(3):
        for one in (agent, twin):
            one.update(random_batch(DIMS, ACTIONS, ROWS, index, 0.8), 0.0)
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in agent.state_dict().items())


def test_statistics_of_torchs_batch_norm_are_re_estimated_and_its_momentum_and_mode_stay() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1)).eval()
    patient = Patient("net", net, torch.optim.Adam(net.parameters()), mlp, states=(normal(50, 3),))
    reestimate(patient, net)
    entering = net[0](patient.states[0])
    torch.testing.assert_close(net[1].running_mean, entering.mean(0))
    torch.testing.assert_close(net[1].running_var, entering.var(0))
    assert net[1].momentum == 0.1 and not net.training and not net[1].training
    with pytest.raises(ConfigurationError, match="need replay rows"):
        reestimate(replace(patient, states=()), net)


def test_random_states_and_buffers_are_put_back_after_keyed_draws() -> None:
    net = nn.BatchNorm1d(2)
    state, draws = torch.random.get_rng_state(), []
    for _ in range(2):
        with keyed(net, 3):
            draws.append(torch.rand(4))
            net(normal(8, 2))
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(state, torch.random.get_rng_state())
    assert not net.running_mean.any() and net.num_batches_tracked == 0


def test_without_rows_there_are_patients_without_states() -> None:
    for kind in ("flashsac", "sac"):
        found = patients(agent_of(kind))
        assert all(patient.states == () and patient.loss is None for patient in found.values())
        assert list(found) == ["actor", "critic"]
