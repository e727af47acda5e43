"""Diagnostics of flow critics: closed forms on paths that are known, and both agents' real critics."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from rlplastic.agents.flashsac import FlashSAC
from rlplastic.agents.flow import FlowCritic
from rlplastic.agents.sac import SAC
from rlplastic.config import FlashSACConfig, FlowCriticConfig, SACConfig
from rlplastic.errors import ConfigurationError
from rlplastic.plasticity import ModuleReader
from rlplastic.plasticity import flow_diagnostics as diagnostics

STEPS, RETURNS = 4, torch.tensor([2.0, -1.0, 0.5])
SOURCE = torch.tensor([[0.3], [-0.3]])
"""Two noises, z and -z, which rows and members share."""


def path(step: diagnostics.Step) -> list[Tensor]:
    points = [SOURCE.expand(2, 2, 3)]
    for index in range(STEPS):
        points.append(step(points[-1], index))
    return points


def straight(z: Tensor, index: int) -> Tensor:
    """The same velocity everywhere: the return."""
    return z + RETURNS / STEPS


def aimed(z: Tensor, index: int) -> Tensor:
    """Towards the return from wherever z is."""
    return z + (RETURNS - z) / (STEPS - index)


def astray(z: Tensor, index: int) -> Tensor:
    """What another copy does: past the return by 1."""
    return z + (RETURNS + 1) / STEPS


def test_the_value_of_a_straight_path_is_off_by_what_is_left_of_it() -> None:
    left = 1 - torch.arange(1, STEPS + 1) / STEPS
    found = diagnostics.value_errors(path(straight), RETURNS)
    torch.testing.assert_close(found, (left * RETURNS.abs().mean()).double())


def test_a_field_that_aims_repairs_all_but_its_last_step_and_one_that_does_not_repairs_nothing() -> None:
    source = SOURCE.expand(2, 2, 3)
    shares = torch.arange(STEPS + 1) / STEPS
    found = diagnostics.recovery(straight, astray, source, STEPS, RETURNS)
    torch.testing.assert_close(found, shares.double(), rtol=1e-5, atol=1e-6)
    found = diagnostics.recovery(aimed, astray, source, STEPS, RETURNS)
    torch.testing.assert_close(found, torch.tensor([0.0] * STEPS + [1.0]).double(), rtol=1e-5, atol=1e-6)


def test_curvature_is_the_mean_change_of_the_velocity_and_straight_paths_have_none() -> None:
    slopes = torch.tensor([1.0, -2.0, 4.0])
    found = diagnostics.path_curvature(path(lambda z, index: z + (0.7 + slopes * index / STEPS) / STEPS))
    expected = slopes.abs().mean() * torch.arange(STEPS) / STEPS
    torch.testing.assert_close(found, expected.double(), rtol=1e-5, atol=1e-6)
    assert float(diagnostics.path_curvature(path(straight)).max()) < 1e-6


def test_variance_of_end_points_is_that_of_their_noises() -> None:
    ends = torch.stack((3 * SOURCE.expand(2, 3), 1 + 0 * SOURCE.expand(2, 3)))  # one member moves noises apart
    found = diagnostics.endpoint_variance(ends)
    torch.testing.assert_close(found, torch.tensor([0.81, 0.0]).double(), rtol=1e-6, atol=1e-9)


def test_a_head_on_frozen_features_gets_to_the_least_squares_loss_and_no_further() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1))
    x, y = torch.randn(40, 3), torch.randn(40, 1)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}

    def loss(network: nn.Module, index: int) -> Tensor:
        return (network(x) - y).square().mean()

    found = diagnostics.feature_plasticity(net, loss, ["2"], updates=1500, rate=0.02)
    features = np.concatenate((net[:2](x).detach().numpy(), np.ones((40, 1))), 1).astype(float)
    _, residual, _, _ = np.linalg.lstsq(features, y.numpy().astype(float), rcond=None)
    assert found.shape == (1501,) and float(found[0]) == pytest.approx(float(loss(net, 0).detach()))
    assert float(found[-1]) == pytest.approx(float(residual[0]) / 40, rel=1e-3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert all(parameter.requires_grad for parameter in net.parameters())
    every = diagnostics.feature_plasticity(net, loss, [""], updates=1500, rate=0.02)
    assert float(every[-1]) < 0.9 * float(found[-1]), "all layers together can say more than frozen features"
    with pytest.raises(ConfigurationError, match="no parameter lies below '1'"):
        diagnostics.feature_plasticity(net, loss, ["1"], 1, 0.1)


def test_a_copys_norms_are_bounded_after_every_step() -> None:
    net = nn.Linear(3, 2)
    seen = []

    def unit_rows(module: nn.Module):
        def project() -> None:
            with torch.no_grad():
                module.weight.div_(module.weight.norm(dim=1, keepdim=True))

        return project

    def loss(network: nn.Module, index: int) -> Tensor:
        seen.append(network.weight.detach().norm(dim=1))
        return network(torch.ones(1, 3)).square().sum()

    diagnostics.feature_plasticity(net, loss, [""], 3, 0.1, unit_rows)
    assert len(seen) == 4
    torch.testing.assert_close(torch.stack(seen[1:]), torch.ones(3, 2))


def test_noise_in_targets_is_uniform_and_costs_a_mean_its_variance() -> None:
    rows = 50

    def train(perturb) -> float:
        """Squared error of the mean of noisy targets, over many critics that are nothing else."""
        return float(perturb(torch.ones(4000, rows).double()).mean(1).sub(1).square().mean())

    found = diagnostics.target_noise(train, [0.0, 0.5, 2.0])
    expected = [magnitude**2 / 3 / rows for magnitude in (0.0, 0.5, 2.0)]
    torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=0.05, atol=1e-12)
    seen = []
    diagnostics.target_noise(lambda perturb: seen.append(perturb(torch.zeros(1000))) or 0.0, [3.0, 1.0])
    torch.testing.assert_close(seen[0], 3 * seen[1])  # the same noise, but for its size
    assert 2.9 < float(seen[0].abs().max()) <= 3


def critics() -> list[tuple[FlowCritic, tuple[bool, ...]]]:
    settings = FlowCriticConfig(steps=STEPS, noises=4)
    common = {"critic_width": 8, "actor_width": 8, "gamma": 0.99}
    agents = [
        (FlashSAC({"policy": 3}, 2, 1, FlashSACConfig(num_blocks=1, **common), settings), (False,)),
        (SAC({"policy": 3}, 2, 1, SACConfig(**common, initial_alpha=1.0), settings), ()),
    ]
    return [(agent.learner.critic, modes) for agent, modes in agents]


@pytest.mark.parametrize("index", [0, 1], ids=["flashsac", "sac"])
def test_real_critics_are_diagnosed_and_drawn(index: int, tmp_path: Path) -> None:
    critic, modes = critics()[index]
    torch.manual_seed(1)
    pairs = torch.randn(5, 3), torch.rand(5, 2)
    field = critic.field.given(*pairs, *modes)
    points = critic.trajectory(field, critic.bank)
    names = {"blocks.0": "linear", "post_norm": "linear"} if modes else None
    reader = ModuleReader(
        critic.field, lambda time: field(critic.bank, torch.full((1, 1), time)), names, units=-2 if modes else -1
    )
    with torch.no_grad():
        norms = diagnostics.feature_norms(reader, [k / STEPS for k in range(STEPS)])
    report = diagnostics.FlowReport(
        value_errors=diagnostics.value_errors(points, torch.zeros(5)),
        recovery=diagnostics.recovery(
            lambda z, k: critic.euler_step(field, z, k, STEPS), lambda z, k: z, critic.bank, STEPS, torch.zeros(5)
        ),
        plasticity={"flow": torch.ones(3), "scalar": torch.zeros(3)},
        noise={"flow": torch.ones(2)},
        magnitudes=[0.0, 1.0],
        norms=norms,
        curvature=diagnostics.path_curvature(points),
    )
    assert report.value_errors is not None and report.recovery is not None and report.curvature is not None
    torch.testing.assert_close(report.recovery[0], report.value_errors[-1])
    assert float(report.recovery[-1]) < 1e-6  # an old copy that stays where it is: the bank's mean is the value
    assert float(report.curvature[0]) == 0 and float(report.curvature[-1]) > 1e-4
    assert diagnostics.endpoint_variance(points[-1]).shape == (2,)
    assert len(norms) == 2 and all(curve.shape == (STEPS,) and float(curve.min()) > 0 for curve in norms.values())
    drawn = diagnostics.figure(report)
    assert isinstance(drawn, Figure)
    titles = [axes.get_title() for axes in drawn.axes]
    assert titles == ["recovery", "features frozen", "noise in targets", "norms of features", "curvature"]
    shown = {line.get_label(): np.asarray(line.get_ydata()) for line in drawn.axes[0].lines}
    np.testing.assert_array_equal(shown["after k steps"], report.value_errors.numpy())
    drawn.savefig(tmp_path / "flow.png")
    assert (tmp_path / "flow.png").stat().st_size > 1000


def test_an_empty_report_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="expected at least one result"):
        diagnostics.figure(diagnostics.FlowReport())
