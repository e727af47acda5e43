"""Folded layers are the actor, up to rounding in float64."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from exports import flashsac_actor, rows, sac_actor
from torch import nn

from rlplastic.exporting.fold import Affine, Centre, Layer, LayerNorm, Relu, Residual, RMSNorm, fold

ACTORS = {
    "flashsac": flashsac_actor(5, 3),
    "one block": flashsac_actor(7, 2, width=4, blocks=1, seed=1),
    "sac": sac_actor(5, 3, layer_norm=False),
    "sac with norms": sac_actor(5, 3, layer_norm=True),
}


def evaluated(layers: tuple[Layer, ...], x: np.ndarray) -> np.ndarray:
    """The layers as their docstrings say, in float64."""
    for layer in layers:
        match layer:
            case Centre(mean):
                x = x - mean
            case Affine(weight, bias):
                x = x @ weight.T + bias
            case Relu():
                x = np.maximum(x, 0)
            case Residual(body):
                x = x + evaluated(body, x)
            case RMSNorm(eps):
                x = x / np.sqrt((x**2).mean(1, keepdims=True) + eps)
            case LayerNorm(gain, bias, eps):
                centred = x - x.mean(1, keepdims=True)
                x = centred / np.sqrt((centred**2).mean(1, keepdims=True) + eps) * gain + bias
    return x


@pytest.mark.parametrize("actor", ACTORS.values(), ids=ACTORS)
def test_folded_layers_equal_the_actor_in_float64(actor: nn.Module) -> None:
    folded, x = fold(actor), rows(50, actor.observation_dim).astype(np.float64) * 3
    with torch.no_grad():
        expected = copy.deepcopy(actor).double()(torch.from_numpy(x))[0].numpy()
    assert (folded.observation_dim, folded.action_dim) == (actor.observation_dim, expected.shape[1])
    np.testing.assert_allclose(evaluated(folded.layers, x), expected, rtol=1e-12, atol=1e-13)


def test_no_batch_norm_and_no_gain_is_left() -> None:
    kinds = [type(layer) for layer in fold(ACTORS["flashsac"]).layers]
    assert kinds == [Centre, Affine, Residual, Residual, RMSNorm, Affine]
