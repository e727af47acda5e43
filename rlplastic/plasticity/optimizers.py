"""What an intervention must know of an optimizer: which parameters it moves, and what it remembers of each.

Known are ``torch.optim``'s Adam, AdamW, SGD, RMSprop and their like, and any optimizer with `IndexedOptimizer`'s two
members. What is remembered is zeroed in place, never replaced: compiled steps and saved references stay valid.

Adam's step counter belongs to a whole tensor. A tensor forgotten wholly starts again at step 0, and its bias correction
is that of a new optimizer. Of a tensor forgotten under a mask the step stays, since the other entries' moments need it:
the forgotten entries then start without bias correction, and their k-th move under a constant gradient is
(1 - beta1^k) / sqrt(1 - beta2^k) times that of a new optimizer: 3.2 times at first, 6.6 at most, 1 in the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from rlplastic.errors import ConfigurationError

SLOTS = frozenset({"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "grad_avg"})
"""Names of what optimizers remember that is zero before their first step."""


class IndexedOptimizer(Protocol):
    """An optimizer that tells what it remembers by the place of a parameter."""

    parameters: list[Tensor]

    def state_of(self, index: int) -> dict[str, Tensor]:
        """``step`` and moments of a parameter, under torch.optim's names; not copies."""
        ...


Optimizer = torch.optim.Optimizer | IndexedOptimizer
Memory = list[dict[str, Tensor]]
"""Copies of what an optimizer remembers, parameter by parameter."""


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """All parameters that it moves, in its order."""
    if isinstance(optimizer, torch.optim.Optimizer):
        return [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return optimizer.parameters


def check_complete(optimizer: Optimizer, named: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Refuse an optimizer that does not know a trainable parameter: it would never move again.

    Raises:
        ConfigurationError: with the parameter's name.
    """
    known = {id(parameter) for parameter in parameters_of(optimizer)}
    for name, parameter in named:
        if parameter.requires_grad and id(parameter) not in known:
            raise ConfigurationError(
                f"the optimizer does not move parameter {name!r}; expected every trainable parameter of the module: "
                "make the optimizer of this module's own parameters, or freeze what it shall not move"
            )


def remembered(optimizer: Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """What it remembers of a parameter, by `SLOTS`; not copies, empty before the first step of a ``torch.optim`` one.

    Raises:
        ConfigurationError: it does not move the parameter, or remembers something that is not known to start at zero.
    """
    if isinstance(optimizer, torch.optim.Optimizer):
        entries = {name: value for name, value in optimizer.state.get(parameter, {}).items() if value is not None}
    else:
        places = [index for index, mine in enumerate(optimizer.parameters) if mine is parameter]
        if not places:
            raise ConfigurationError("the optimizer does not move this parameter; expected one of its own")
        entries = optimizer.state_of(places[0])
    for name, value in entries.items():
        if name not in SLOTS or not isinstance(value, Tensor):
            raise ConfigurationError(
                f"{type(optimizer).__name__} remembers {name!r}, and nothing is known of how it starts; "
                "expected an optimizer such as Adam, AdamW, SGD or RMSprop"
            )
    return entries


@torch.no_grad()
def forget(optimizer: Optimizer, parameter: Tensor, mask: Tensor | None = None) -> None:
    """Zero the moments of a parameter in place, and its step unless entries remain; see the module's head for Adam.

    Args:
        optimizer: that moves it.
        parameter: whose past is to be forgotten.
        mask: bool, of the parameter's shape: the entries to forget; None for all.
    """
    wholly = mask is None or bool(mask.all())
    for name, value in remembered(optimizer, parameter).items():
        if wholly:
            value.zero_()
        elif name != "step":
            assert mask is not None
            value.masked_fill_(mask, 0)


def saved_memory(optimizer: Optimizer) -> Memory:
    """Copies of all that it remembers."""
    return [
        {name: value.detach().clone() for name, value in remembered(optimizer, parameter).items()}
        for parameter in parameters_of(optimizer)
    ]


@torch.no_grad()
def restore_memory(optimizer: Optimizer, memory: Memory) -> None:
    """Take back `saved_memory`, bit for bit and in place; what it did not remember then is gone."""
    for parameter, entries in zip(parameters_of(optimizer), memory, strict=True):
        now: Mapping[str, Tensor] = remembered(optimizer, parameter)
        if now.keys() == entries.keys():
            for name, value in entries.items():
                now[name].copy_(value)
        else:
            assert isinstance(optimizer, torch.optim.Optimizer)
            optimizer.state.pop(parameter, None)
            if entries:
                optimizer.state[parameter] = {name: value.clone() for name, value in entries.items()}
