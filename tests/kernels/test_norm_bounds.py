"""Norm bounding, in torch and as a kernel, against each row's norm in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlplastic.agents.flashsac.networks import Actor, Critic
from rlplastic.agents.heads import Categorical
from rlplastic.agents.layers import NormBounds
from rlplastic.errors import ConfigurationError
from rlplastic.kernels import norm_bounds
from rlplastic.kernels.norm_bounds import NormProjection, project_norms

Groups = tuple[list[Tensor], list[tuple[Tensor, Tensor]], list[Tensor]]

IMPLEMENTATIONS: dict[str, Callable[..., Callable[[], None]]] = {
    "torch": lambda *groups: lambda: project_norms(*groups),
    "triton": NormProjection,
}


def normal(*shape: int, seed: int) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ragged(device: str = "cpu") -> Groups:
    """Rows of 1 to 33 numbers, alone and in ensembles, of lengths that are and are not multiples of 4."""
    weights = [normal(*shape, seed=n) for n, shape in enumerate([(3, 5), (2, 4, 8), (1, 1), (2, 3, 33), (5, 16)])]
    affine = [(normal(*shape, seed=n), normal(*shape, seed=n + 9)) for n, shape in enumerate([(7,), (2, 12), (3, 1)])]
    gains = [normal(*shape, seed=n) for n, shape in enumerate([(9,), (2, 4)])]
    return (
        [weight.to(device) for weight in weights],
        [(gamma.to(device), beta.to(device)) for gamma, beta in affine],
        [gain.to(device) for gain in gains],
    )


def rows_of(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().double().numpy().reshape(-1, tensor.shape[-1])


def projected_row_by_row(groups: Groups) -> list[np.ndarray]:
    """In float64, the rows of all weights, then of gamma and beta of each batch norm, then of gains."""
    weights, affine, gains = groups
    results = [np.array([row / max(np.linalg.norm(row), 1e-12) for row in rows_of(weight)]) for weight in weights]
    for gamma, beta in affine:
        both = [np.concatenate(pair) for pair in zip(rows_of(gamma), rows_of(beta), strict=True)]
        scaled = np.array([row * np.sqrt(len(row) / 2) / np.sqrt((row**2).sum() + 1e-8) for row in both])
        results += np.split(scaled, 2, axis=1)
    for gain in gains:
        results.append(np.array([row * np.sqrt(len(row)) / np.sqrt((row**2).sum() + 1e-8) for row in rows_of(gain)]))
    return results


def flat(groups: Groups) -> list[Tensor]:
    weights, affine, gains = groups
    return [*weights, *(tensor for pair in affine for tensor in pair), *gains]


@pytest.mark.parametrize("kind", IMPLEMENTATIONS)
def test_every_row_lands_on_its_bound(kind: str, kernel_device: str) -> None:
    groups = ragged(kernel_device)
    expected = projected_row_by_row(groups)
    IMPLEMENTATIONS[kind](*groups)()
    for tensor, rows in zip(flat(groups), expected, strict=True):
        np.testing.assert_allclose(rows_of(tensor), rows, rtol=1e-6)


@pytest.mark.parametrize("kind", IMPLEMENTATIONS)
def test_rows_of_next_to_nothing_do_not_explode_and_a_nan_stays_in_its_row(kind: str, kernel_device: str) -> None:
    weights, affine, gains = groups = ragged(kernel_device)
    weights[1][0, 2] = 0.0
    weights[4][3] = 1e-13
    weights[1][1, 3, 5] = torch.nan
    affine[1][1][0, 3] = torch.nan
    for tensor in (*affine[0], gains[0]):
        tensor.zero_()
    expected = projected_row_by_row(groups)
    IMPLEMENTATIONS[kind](*groups)()
    assert weights[1][1, 3].isnan().all()
    assert affine[1][0][0].isnan().all() and affine[1][1][0].isnan().all()
    assert sum(int(tensor.isnan().sum()) for tensor in flat(groups)) == 8 + 2 * 12
    for tensor, rows in zip(flat(groups), expected, strict=True):
        np.testing.assert_allclose(rows_of(tensor), rows, rtol=1e-6)


@pytest.mark.parametrize("kind", IMPLEMENTATIONS)
@pytest.mark.parametrize("single", range(3))
def test_one_kind_of_layer_alone_is_enough(kind: str, single: int, kernel_device: str) -> None:
    groups = tuple(group if n == single else [] for n, group in enumerate(ragged(kernel_device)))
    expected = projected_row_by_row(groups)  # type: ignore[arg-type]
    IMPLEMENTATIONS[kind](*groups)()
    for tensor, rows in zip(flat(groups), expected, strict=True):  # type: ignore[arg-type]
        np.testing.assert_allclose(rows_of(tensor), rows, rtol=1e-6)


@pytest.mark.parametrize("offset", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("length", [3, 8])
def test_kernel_writes_nothing_but_its_rows_wherever_they_lie(offset: int, length: int, kernel_device: str) -> None:
    memory = normal(64, seed=5).to(kernel_device)
    before = memory.clone()
    weight = memory[offset : offset + 2 * length].view(2, length)
    gamma, beta = memory[24 : 24 + length], memory[24 + offset + length : 24 + offset + 2 * length]
    NormProjection([weight], [(gamma, beta)], [])()
    torch.testing.assert_close(weight.norm(dim=-1), torch.ones(2, device=kernel_device))
    written = torch.zeros(64, dtype=torch.bool)
    for start, count in [(offset, 2 * length), (24, length), (24 + offset + length, length)]:
        written[start : start + count] = True
    assert torch.equal((memory != before).cpu(), written)


NETWORKS: dict[str, Callable[[], torch.nn.Module]] = {
    "actor": lambda: Actor(5, 3, 9, 2),
    "wide actor": lambda: Actor(7, 2, 70, 1),
    "twin critics": lambda: Critic(5, 2, 8, 1, Categorical(11, 5.0), members=2),
    "three critics of odd width": lambda: Critic(4, 3, 7, 1, Categorical(5, 5.0), members=3),
}


def pair(name: str, device: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The same network with random parameters, twice."""
    network = NETWORKS[name]().to(device)
    with torch.no_grad():
        for n, parameter in enumerate(network.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=n))
    return network, copy.deepcopy(network)


def assert_same(network: torch.nn.Module, reference: torch.nn.Module) -> None:
    for (name, value), expected in zip(network.state_dict().items(), reference.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("name", NETWORKS)
def test_kernel_projects_a_network_like_torch(name: str, kernel_device: str) -> None:
    network, reference = pair(name, kernel_device)
    NormBounds(network, "triton").project()
    bounds = NormBounds(reference, "torch")
    bounds.project()
    assert_same(network, reference)
    assert max(float(value) for value in bounds.deviations().values()) < 1e-5


def test_kernel_follows_parameters_whose_storage_moved(kernel_device: str) -> None:
    network, reference = pair("actor", kernel_device)
    bounds = NormBounds(network, "triton")
    bounds.project()
    left_behind = [parameter.data for parameter in network.parameters()]
    with torch.no_grad():
        for n, parameter in enumerate(network.parameters()):
            parameter.data = normal(*parameter.shape, seed=n).to(kernel_device)  # what module.to(device) does
            left_behind[n].fill_(7.0)
    bounds.project()
    NormBounds(reference).project()
    assert_same(network, reference)
    assert all(bool((tensor == 7).all()) for tensor in left_behind)


def test_loading_a_state_keeps_addresses_and_the_next_projection_is_right(kernel_device: str) -> None:
    network, reference = pair("twin critics", kernel_device)
    loaded = copy.deepcopy(network.state_dict())
    bounds = NormBounds(network, "triton")
    bounds.project()
    network.load_state_dict(loaded)
    bounds.project()
    NormBounds(reference).project()
    assert_same(network, reference)


def test_a_deep_copy_projects_its_own_parameters(kernel_device: str) -> None:
    network, reference = pair("actor", kernel_device)
    untouched = copy.deepcopy(network.state_dict())
    bounds = NormBounds(network, "triton")
    bounds.project()  # now the table is written
    network.load_state_dict(untouched)
    twin, twin_bounds = copy.deepcopy((network, bounds))
    twin_bounds.project()
    NormBounds(reference).project()
    assert_same(twin, reference)
    assert all(torch.equal(value, untouched[name]) for name, value in network.state_dict().items())


def refused(projection: Callable[[], Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        projection()


def test_kernel_refuses_tensors_it_would_misread(kernel_device: str) -> None:
    transposed = torch.ones(3, 2, device=kernel_device).mT
    refused(NormProjection([transposed], [], []), "contiguous float32")
    refused(NormProjection([torch.ones(2, 3, device=kernel_device).double()], [], []), "contiguous float32")
    refused(NormProjection([torch.ones(2, 3, device="meta")], [], []), "CUDA device")
    refused(NormProjection([torch.ones(2, 3, device=kernel_device), torch.ones(2, device="meta")], [], []), "one CUDA")


def test_compiled_kernel_refuses_cpu_tensors(monkeypatch: pytest.MonkeyPatch, kernel_device: str) -> None:
    monkeypatch.setattr(norm_bounds, "interpreted", lambda: False)
    refused(NormProjection([torch.ones(2, 3)], [], []), "CUDA device")


def test_bounds_name_unknown_kernels_and_missing_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    refused(lambda: NormBounds(Actor(3, 1, 4, 1), "cuda"), "'torch' or 'triton'")
    monkeypatch.setattr(norm_bounds, "AVAILABLE", False)
    refused(lambda: NormBounds(Actor(3, 1, 4, 1), "triton"), r"install rlplastic\[kernels\]")
    NormBounds(Actor(3, 1, 4, 1)).project()
