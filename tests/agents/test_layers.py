"""Layers against torch's own modules and against norms computed in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from rlplastic.agents.flashsac.networks import Actor, Critic
from rlplastic.agents.heads import Categorical
from rlplastic.agents.layers import BatchNorm, NormBounds, ResidualBlock, RMSNorm, Trunk, UnitLinear

ROWS = 17


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter and buffer drawn at random (variances positive)."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            tensor.copy_(torch.randn(tensor.shape, generator=rng))
            if name.endswith("running_var"):
                tensor.abs_().add_(0.1)
    return module


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def torch_batch_norms(norm: BatchNorm) -> list[nn.BatchNorm1d]:
    """One torch module per member with the same parameters and statistics."""
    twins = []
    for member in range(norm.gamma.reshape(-1, norm.gamma.shape[-1]).shape[0]):
        twin = nn.BatchNorm1d(norm.gamma.shape[-1], momentum=norm.momentum, eps=norm.eps)
        with torch.no_grad():
            for ours, theirs in [("gamma", "weight"), ("beta", "bias"), ("running_mean",) * 2, ("running_var",) * 2]:
                source = getattr(norm, ours).reshape(-1, norm.gamma.shape[-1])[member]
                getattr(twin, theirs).copy_(source)
        twins.append(twin)
    return twins


@pytest.mark.parametrize("members", [None, 1, 3])
@pytest.mark.parametrize("batch_statistics", [True, False])
def test_batch_norm_is_torchs_batch_norm_for_every_member(members: int | None, batch_statistics: bool) -> None:
    norm = randomised(BatchNorm(5, members))
    twins = torch_batch_norms(norm)
    x = (3 * normal(len(twins), ROWS, 5) + 2).requires_grad_()
    weights = normal(len(twins), ROWS, 5, seed=2)
    ours = norm((x if members is not None else x[0]).mT, batch_statistics).mT
    expected = torch.stack([twin.train(batch_statistics)(row) for twin, row in zip(twins, x, strict=True)])
    torch.testing.assert_close(ours.reshape(expected.shape), expected, rtol=1e-4, atol=1e-5)
    for name, theirs in [("running_mean",) * 2, ("running_var",) * 2]:
        stacked = torch.stack([getattr(twin, theirs) for twin in twins])
        torch.testing.assert_close(getattr(norm, name).reshape(stacked.shape), stacked, rtol=1e-5, atol=1e-6)
    inputs = [x, norm.gamma, norm.beta]
    gradients = torch.autograd.grad((ours.reshape(expected.shape) * weights).sum(), inputs)
    affine = [parameter for name in ("weight", "bias") for parameter in (getattr(twin, name) for twin in twins)]
    references = torch.autograd.grad((expected * weights).sum(), [x, *affine])
    torch.testing.assert_close(gradients[0], references[0], rtol=1e-3, atol=1e-4)
    count = len(twins)
    for ours_gradient, parts in [(gradients[1], references[1 : 1 + count]), (gradients[2], references[1 + count :])]:
        torch.testing.assert_close(ours_gradient.reshape(count, -1), torch.stack(parts), rtol=1e-3, atol=1e-4)


def test_batch_norm_with_running_statistics_leaves_them_alone() -> None:
    norm = randomised(BatchNorm(4))
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    norm(normal(4, ROWS), batch_statistics=False)
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


def test_batch_norm_of_one_row_stays_finite() -> None:
    norm = BatchNorm(3)
    assert torch.isfinite(norm(normal(3, 1), batch_statistics=True)).all()
    assert torch.isfinite(norm.running_var).all()


@pytest.mark.parametrize("members", [None, 2])
def test_rms_norm_is_torchs_rms_norm(members: int | None) -> None:
    norm = randomised(RMSNorm(6, members))
    x = normal(2, ROWS, 6)
    gains = norm.gain.reshape(-1, 6).expand(2, 6)
    expected = torch.stack([nn.functional.rms_norm(row, (6,), gain, 1e-6) for row, gain in zip(x, gains, strict=True)])
    torch.testing.assert_close(norm(x.mT).mT, expected)


@pytest.mark.parametrize(("inputs", "outputs"), [(8, 8), (8, 3), (3, 8)])
def test_linear_maps_start_orthogonal_in_every_member(inputs: int, outputs: int) -> None:
    weight = UnitLinear(inputs, outputs, members=2).weight.double()
    assert not torch.equal(weight[0], weight[1])
    for matrix in weight:
        gram = matrix @ matrix.T if outputs <= inputs else matrix.T @ matrix
        torch.testing.assert_close(gram, torch.eye(min(inputs, outputs)).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("members", [None, 2])
def test_linear_map_is_the_product_with_each_members_matrix(members: int | None) -> None:
    layer = randomised(UnitLinear(4, 3, members))
    x = normal(2, ROWS, 4)
    weights = layer.weight.detach().reshape(-1, 3, 4).expand(2, 3, 4)
    expected = np.einsum("nbi,noi->nbo", x.numpy(), weights.numpy())
    np.testing.assert_allclose(layer(x.mT).mT.detach().numpy(), expected, rtol=1e-5, atol=1e-6)


def test_residual_block_never_lowers_a_feature_because_relu_comes_before_the_addition() -> None:
    block = randomised(ResidualBlock(8))
    x = normal(8, ROWS)
    added = block(x, True) - x
    assert (added >= -1e-6).all() and (added > 0.1).any()


def test_trunk_of_an_ensemble_equals_separate_trunks() -> None:
    ensemble = randomised(Trunk(5, 8, 2, members=3))
    x = normal(3, 5, ROWS)
    for batch_statistics in (False, True):
        singles = []
        for member in range(3):
            single = Trunk(5, 8, 2)
            single.load_state_dict({name: value[member] for name, value in ensemble.state_dict().items()})
            singles.append(single(x[member], batch_statistics))
        torch.testing.assert_close(ensemble(x, batch_statistics), torch.stack(singles), rtol=1e-4, atol=1e-5)


NETWORKS = {
    "actor": lambda: Actor(5, 2, 8, 2),
    "twin critics": lambda: Critic(5, 2, 8, 2, Categorical(11, 5.0), members=2),
    "one critic": lambda: Critic(5, 2, 8, 1, Categorical(11, 5.0), members=1),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_projection_puts_every_norm_on_its_bound_and_keeps_directions(name: str) -> None:
    network = randomised(NETWORKS[name]())
    before = {key: value.detach().double().clone() for key, value in network.named_parameters()}
    NormBounds(network).project()
    after = {key: value.detach().double() for key, value in network.named_parameters()}
    seen = set()
    for key, value in after.items():
        dim = value.shape[-1]
        if key.endswith("weight"):
            expected = before[key] / before[key].norm(dim=-1, keepdim=True)
            torch.testing.assert_close(value.norm(dim=-1), torch.ones(value.shape[:-1]).double(), rtol=0, atol=1e-6)
        elif key.endswith("gamma"):
            beta = key.removesuffix("gamma") + "beta"
            joint = (before[key].square().sum(-1, keepdim=True) + before[beta].square().sum(-1, keepdim=True)).sqrt()
            expected = before[key] * dim**0.5 / joint
            torch.testing.assert_close(after[beta], before[beta] * dim**0.5 / joint, rtol=1e-5, atol=1e-7)
            squares = (value.square() + after[beta].square()).sum(-1)
            torch.testing.assert_close(squares, torch.full(squares.shape, float(dim)).double(), rtol=1e-5, atol=0)
        elif key.endswith("gain"):
            expected = before[key] * dim**0.5 / before[key].norm(dim=-1, keepdim=True)
        elif key.endswith("beta"):
            continue
        else:
            assert "bias" in key
            expected = before[key]
        seen.add(key.rpartition(".")[2])
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)
    assert {"weight", "gamma", "gain"} < seen
    assert max(float(value) for value in NormBounds(network).deviations().values()) < 1e-5


def test_deviations_measure_the_worst_relative_distance_from_each_bound() -> None:
    network = Actor(5, 2, 8, 1)
    bounds = NormBounds(network)
    bounds.project()
    with torch.no_grad():
        network.trunk.embed.weight[3] *= 1.5
        network.trunk.blocks[0].expand_norm.gamma *= 2
        network.trunk.blocks[0].expand_norm.beta *= 2
        network.trunk.post_norm.gain *= 0.75
    measured = {name: float(value) for name, value in bounds.deviations().items()}
    assert measured == pytest.approx({"linear_rows": 0.5, "batch_norm": 1.0, "rms_norm": 0.25}, rel=1e-4)


def test_projecting_twice_changes_nothing_more() -> None:
    network = randomised(Critic(5, 2, 8, 2, Categorical(11, 5.0), members=2))
    bounds = NormBounds(network)
    bounds.project()
    once = {name: value.clone() for name, value in network.state_dict().items()}
    bounds.project()
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, once[name], rtol=1e-6, atol=1e-7)
