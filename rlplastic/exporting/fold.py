"""An actor as plain layers, with everything constant folded into the linear maps, in float64.

In evaluation a batch norm is y = s x + t with s = gamma / sqrt(variance + eps), t = beta - s mean (arXiv 1502.03167).
Behind a linear map it scales the map's rows, before one its columns; an RMS norm's gain (arXiv 1910.07467) scales the
columns of the map that follows. All products are taken in float64 and rounded once, at the end.

Of the norm on the raw input the mean stays a subtraction of its own. Inputs that hardly vary (a body's inertia) have a
gain s of up to 316 around a mean that may be large: W (s x) + W (beta - s mean) is then the difference of two large
numbers, each with a rounding error of its own, and on Humanoid was wrong by 2e-4. x - mean is exact where it matters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from rlplastic.agents.flashsac import networks as flashsac
from rlplastic.agents.layers import BatchNorm, ResidualBlock
from rlplastic.agents.sac import networks as sac
from rlplastic.errors import ConfigurationError

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Affine:
    """y = W x + b; weight (out, in), bias (out,)."""

    weight: Doubles
    bias: Doubles


@dataclass(frozen=True)
class Centre:
    """x - mean; mean (D,)."""

    mean: Doubles


@dataclass(frozen=True)
class Relu:
    """max(x, 0)."""


@dataclass(frozen=True)
class RMSNorm:
    """x / sqrt(mean(x^2) + eps), without a gain."""

    eps: float


@dataclass(frozen=True)
class LayerNorm:
    """(x - mean) / sqrt(variance + eps) * gain + bias (arXiv 1607.06450)."""

    gain: Doubles
    bias: Doubles
    eps: float


@dataclass(frozen=True)
class Residual:
    """x + body(x)."""

    body: tuple[Affine | Relu, ...]


Layer: TypeAlias = Centre | Affine | Relu | RMSNorm | LayerNorm | Residual


@dataclass(frozen=True)
class Folded:
    """A deterministic policy: tanh of the layers' output."""

    observation_dim: int
    action_dim: int
    layers: tuple[Layer, ...]


def fold(actor: nn.Module) -> Folded:
    """The mean of an actor's Gaussian as plain layers.

    Raises:
        ConfigurationError: an agent from outside has layers that are not known here.
    """
    if isinstance(actor, flashsac.Actor):
        layers = _flashsac(actor)
    else:
        layers = _sac(actor) if isinstance(actor, sac.Actor) else _torch(actor)
    width: object = actor.observation_dim
    last = layers[-1]
    assert isinstance(last, Affine) and isinstance(width, int)
    return Folded(width, len(last.bias), layers)


def _flashsac(actor: flashsac.Actor) -> tuple[Layer, ...]:
    trunk, head = actor.trunk, actor.head
    norm, embed = trunk.input_norm, _double(trunk.embed.weight)
    layers: list[Layer] = [Centre(_double(norm.running_mean)), Affine(embed * _scale(norm), embed @ _double(norm.beta))]
    for block in trunk.blocks:
        assert isinstance(block, ResidualBlock)
        expand = _followed(block.expand.weight, block.expand_norm)
        contract = _followed(block.contract.weight, block.contract_norm)
        layers.append(Residual((expand, Relu(), contract, Relu())))
    layers.append(RMSNorm(trunk.post_norm.eps))
    layers.append(Affine(_double(head.mean.weight) * _double(trunk.post_norm.gain), _double(head.mean_bias)))
    return tuple(layers)


def _sac(actor: sac.Actor) -> tuple[Layer, ...]:
    layers: list[Layer] = []
    for module in (*actor.trunk, actor.mean):
        if isinstance(module, sac.Linear):
            layers.append(Affine(_double(module.weight), _double(module.bias)))
        elif isinstance(module, sac.LayerNorm):
            layers.append(LayerNorm(_double(module.gain), _double(module.bias), module.eps))
        else:
            layers.append(Relu())
    return tuple(layers)


def _torch(actor: nn.Module) -> tuple[Layer, ...]:
    """Of an agent from outside: its ``mean`` is a chain of torch's own layers from observation to mean."""
    chain: object = getattr(actor, "mean", None)
    layers: list[Layer] = []
    for module in chain if isinstance(chain, nn.Sequential) else ():
        if isinstance(module, nn.Linear) and module.bias is not None:
            layers.append(Affine(_double(module.weight), _double(module.bias)))
        elif isinstance(module, nn.LayerNorm) and module.bias is not None:
            layers.append(LayerNorm(_double(module.weight), _double(module.bias), module.eps))
        elif isinstance(module, nn.ReLU):
            layers.append(Relu())
        else:
            layers.clear()
            break
    if not layers or not isinstance(layers[-1], Affine):
        raise ConfigurationError(
            f"an actor of {type(actor).__module__} cannot be exported; expected a network of FlashSAC or SAC, or one "
            "whose `mean` is a torch.nn.Sequential of Linear, LayerNorm and ReLU that ends with a Linear"
        )
    return tuple(layers)


def _scale(norm: BatchNorm) -> Doubles:
    """s (dim,) of a batch norm on its running statistics."""
    scale: Doubles = _double(norm.gamma) / np.sqrt(_double(norm.running_var) + norm.eps)
    return scale


def _followed(weight: Tensor, norm: BatchNorm) -> Affine:
    """A linear map and the batch norm behind it."""
    scale = _scale(norm)
    return Affine(scale[:, None] * _double(weight), _double(norm.beta) - _double(norm.running_mean) * scale)


def _double(tensor: Tensor) -> Doubles:
    doubles: Doubles = tensor.detach().cpu().double().numpy()
    return doubles
