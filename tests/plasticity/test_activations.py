"""What readers see, and that they leave no trace."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlplastic.agents.flashsac.networks import Actor, Critic
from rlplastic.agents.heads import Categorical
from rlplastic.agents.layers import BatchNorm
from rlplastic.errors import ConfigurationError
from rlplastic.plasticity.activations import ModuleReader, untouched


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Functional(nn.Module):
    """Activations are calls, one of them a method."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 5), nn.Linear(5, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.first(x))
        return self.head(self.second(hidden).tanh())


def test_activation_modules_are_read_by_path() -> None:
    net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))
    x = normal(7, 3)
    found = ModuleReader(net)(x)
    assert {name: layer.kind for name, layer in found.items()} == {"1": "rectifier", "3": "tanh"}
    assert torch.equal(found["1"].values, net[:2](x))
    assert torch.equal(found["3"].values, net[:4](x))
    assert not found["1"].values.requires_grad


def test_functional_activations_are_read_in_order() -> None:
    net, x = Functional(), normal(7, 3)
    found = ModuleReader(net, functional=True)(x)
    hidden = net.first(x).relu()
    assert [(name, layer.kind) for name, layer in found.items()] == [("relu_0", "rectifier"), ("tanh_1", "tanh")]
    assert torch.equal(found["relu_0"].values, hidden)
    assert torch.equal(found["tanh_1"].values, net.second(hidden).tanh())


class Shared(nn.Module):
    """One activation module serves two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.act = nn.Linear(3, 5), nn.Linear(5, 4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.second(self.act(self.first(x))))


def test_every_layer_of_a_shared_activation_is_read_but_not_the_second_run() -> None:
    net, x = Shared(), normal(7, 3)
    found = ModuleReader(net, lambda x: (net(x), net(2 * x)))(x)
    assert list(found) == ["act", "act@1"]
    assert torch.equal(found["act"].values, net.first(x).relu())
    assert torch.equal(found["act@1"].values, net(x))


@pytest.mark.parametrize("functional", [False, True])
def test_gradients_are_those_of_the_loss_by_each_activation(functional: bool) -> None:
    net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 1))
    x = normal(7, 3)
    found = ModuleReader(net, functional=functional).gradients(lambda: net(x).square().sum())
    h = net[:2](x).detach().requires_grad_()
    expected = torch.autograd.grad(net[2](h).square().sum(), h)[0]
    assert len(found) == 1
    torch.testing.assert_close(next(iter(found.values())).values, expected)


def test_only_the_first_run_of_the_module_counts_and_no_call_of_the_loss() -> None:
    net, x = Functional(), normal(7, 3)

    def loss() -> Tensor:
        squashed = torch.tanh(net(F.relu(x)))
        return (squashed * net(2 * x).detach()).sum()

    found = ModuleReader(net, functional=True).gradients(loss)
    assert list(found) == ["relu_0", "tanh_1"]
    factor = (1 - torch.tanh(net(x.relu())).square()) * net(2 * x)
    torch.testing.assert_close(found["tanh_1"].values, (factor * net.head.weight).detach())


def test_a_layer_the_loss_does_not_reach_has_zero_gradients() -> None:
    net = nn.Sequential(nn.Linear(3, 5), nn.ReLU())

    def loss() -> Tensor:
        net(normal(7, 3))
        return net[0].bias.sum()

    assert torch.equal(ModuleReader(net).gradients(loss)["1"].values, torch.zeros(7, 5))


def test_features_first_ensembles_are_read_as_members_rows_units() -> None:
    critic = Critic(3, 2, 8, 1, Categorical(5, 1.0), 2)
    layers = {"trunk.blocks.0.expand_norm": "rectifier", "trunk.post_norm": "linear"}
    reader = ModuleReader(critic, lambda batch: critic(*batch, False), layers, units=-2)
    batch = normal(11, 3), normal(11, 2)
    found = reader(batch)
    assert found["trunk.blocks.0.expand_norm"].values.shape == (2, 11, 32)
    assert (found["trunk.blocks.0.expand_norm"].values >= 0).all()
    features = critic.trunk(torch.cat((batch[0].T, batch[1].T)), False)
    assert torch.equal(found["trunk.post_norm"].values, features.mT)
    assert reader.norm_inputs(batch)["trunk.input_norm"].shape == (11, 5)
    assert reader.norm_inputs(batch)["trunk.blocks.0.contract_norm"].shape == (2, 11, 8)


def test_dropout_is_off_while_reading() -> None:
    net = nn.Sequential(nn.Dropout(0.9), nn.ReLU())
    assert torch.equal(ModuleReader(net)(normal(5, 4))["1"].values, normal(5, 4).relu())


def test_wrong_requests_say_what_to_do() -> None:
    with pytest.raises(ConfigurationError, match="'nothing'"):
        ModuleReader(nn.ReLU(), layers={"nothing": "rectifier"})
    with pytest.raises(ConfigurationError, match="functional=True"):
        ModuleReader(nn.Linear(2, 2))(torch.ones(1, 2))
    with pytest.raises(ConfigurationError, match="rows, units"):
        ModuleReader(nn.ReLU())(torch.ones(1, 2, 3, 4))


class Noisy(nn.Module):
    """Everything a reader could leave a trace in: statistics, random numbers, a mode, gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(), nn.Linear(4, 1))
        self.register_buffer("calls", torch.tensor([0.0, math.nan]))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.net[1].train()  # statistics move in spite of evaluation mode
        return self.net(x + torch.rand_like(x))


def trace(module: nn.Module) -> list[object]:
    """All that must stay: tensors as bytes, since NaN is not equal to itself."""
    tensors = [*module.parameters(), *module.buffers(), *(p.grad for p in module.parameters() if p.grad is not None)]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in module.modules()]
    return [
        [tensor.detach().numpy().tobytes() for tensor in tensors],
        [id(tensor) for tensor in tensors],
        [m.training for m in module.modules()],
        [p.requires_grad for p in module.parameters()],
        hooks,
        torch.get_rng_state().numpy().tobytes(),
        torch.is_grad_enabled(),
    ]


@pytest.mark.parametrize("functional", [False, True])
def test_reading_a_noisy_module_leaves_no_trace(functional: bool) -> None:
    module, x = Noisy(), normal(6, 3)
    module(x).sum().backward()
    module.net[3].eval()  # a mode of its own
    before = trace(module)
    reader = ModuleReader(module, functional=functional)
    reader(x)
    assert trace(module) == before
    reader.norm_inputs(x)
    assert trace(module) == before
    reader.gradients(lambda: module(x).sum())
    assert trace(module) == before


def test_a_reader_that_fails_leaves_no_trace_either() -> None:
    module = Noisy()

    def fails(x: Tensor) -> None:
        module(x)
        raise RuntimeError("on purpose")

    before = trace(module)
    reader = ModuleReader(module, fails)
    for read in (reader, reader.norm_inputs, lambda x: reader.gradients(lambda: fails(x))):
        with pytest.raises(RuntimeError, match="on purpose"):
            read(normal(6, 3))
        assert trace(module) == before


@pytest.mark.parametrize("statistics", [False, True])
def test_running_statistics_of_bounded_networks_are_put_back(statistics: bool) -> None:
    actor = Actor(3, 2, 8, 1)
    actor(normal(9, 3), True)
    names = {name: "rectifier" for name, part in actor.named_modules() if isinstance(part, BatchNorm)}
    before = trace(actor)
    ModuleReader(actor, lambda x: actor(x, statistics), names, units=-2)(normal(9, 3))
    assert trace(actor) == before


def test_untouched_covers_several_modules() -> None:
    first, second = Noisy(), Noisy()
    before = trace(first), trace(second)
    with untouched(first, second, training=False):
        first(second.net[0](normal(6, 3))[:, :3])
        second(normal(6, 3))
        second.train()
    assert (trace(first), trace(second)) == before
