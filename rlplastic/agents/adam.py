"""Adam for networks whose parameters never change places: one fused pass over gradients that are handed to it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from rlplastic.distributed import Reduce, dense

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


class Adam:
    """Adam (arXiv 1412.6980, algorithm 1), its published constants; with weight decay AdamW (arXiv 1711.05101).

    The same bits as ``torch.optim.Adam(fused=True)``, or ``AdamW``, whose bookkeeping for everything that can change
    between two steps took 4 % of an update at width 64.

    Args:
        parameters: float32, all on one device; they stay where they are.
        weight_decay: every parameter loses this share of itself, times the learning rate, before each step.
        reduce: makes of gradients those of all ranks.

    Attributes:
        parameters: as given.
        reduce: as given; for whoever hands gradients to `step`.
        rate: learning rate of the last step.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], weight_decay: float = 0.0, reduce: Reduce = dense) -> None:
        self.parameters: list[Tensor] = list(parameters)
        self.reduce = reduce
        self.rate: float | Tensor = 0.0
        self._weight_decay = weight_decay
        self._first = [torch.zeros_like(parameter) for parameter in self.parameters]
        self._second = [torch.zeros_like(parameter) for parameter in self.parameters]
        # One counter each, so that a parameter can start anew alone; one tensor, so that they advance in one pass.
        self._counters = torch.zeros(len(self.parameters), device=self.parameters[0].device)
        self._steps = list(self._counters.unbind())

    @torch.no_grad()
    def step(self, gradients: list[Tensor], rate: float | Tensor) -> None:
        """Move every parameter; ``gradients`` in the order of the parameters, laid out as they are."""
        self.rate = rate
        self._counters.add_(1)
        move = torch._fused_adamw_ if self._weight_decay else torch._fused_adam_
        move(
            self.parameters,
            gradients,
            self._first,
            self._second,
            [],
            self._steps,
            lr=rate,
            beta1=BETA1,
            beta2=BETA2,
            weight_decay=self._weight_decay,
            eps=EPS,
            amsgrad=False,
            maximize=False,
        )

    def state_of(self, index: int) -> dict[str, Tensor]:
        """``step``, ``exp_avg`` and ``exp_avg_sq`` of a parameter, under torch.optim's names; not copies."""
        return {"step": self._steps[index], "exp_avg": self._first[index], "exp_avg_sq": self._second[index]}

    @torch.no_grad()
    def load(self, index: int, state: dict[str, Tensor]) -> None:
        """Take over `state_of` a parameter; an empty one is that of an optimizer which has not stepped yet."""
        for name, mine in self.state_of(index).items():
            mine.copy_(state[name]) if state else mine.zero_()
