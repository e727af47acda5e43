"""Proportional priorities: which transitions are drawn more often, and the weights that correct for it.

Schaul et al., "Prioritized experience replay", arXiv 1511.05952, sections 3.3 and 3.4: row i is drawn with probability
P(i) = p_i / sum_k p_k, where p_i = (|td_error_i| + epsilon)^alpha, and its loss is multiplied by (N P(i))^-beta, with N
rows to draw from. Draws are independent: the caller gives one uniform number for each, from `uniform_fractions`.

New rows get the largest priority seen so far, 1 before any (algorithm 1 of the paper: p_1 = 1, p_t = max_{i<t} p_i), so
that each is drawn soon. It is a running maximum, as in the implementations that others build on (DQN Zoo, OpenAI
Baselines, Dopamine): it never falls, also when the row that set it is gone. A single huge error thus makes new rows
more likely for good, but only until their first draw, which gives each the priority of its own error.

The tree. `SumTree.nodes` holds 2P floats, P the next power of two: node 1 is the root, the children of node k are 2k
and 2k + 1, leaf i is node P + i, and a node is the rounded sum of its children. After a write the ancestors are
recomputed from their children, level by level, never corrected by a difference. So the nodes are a function of the
leaves alone: nothing drifts, ancestors that several leaves share are computed several times with one result, and a
rebuilt tree has the same bits.

Why a leaf of priority 0 is never drawn. Nodes are sums of non-negative numbers, so a positive node has a positive
child; let the root be positive. From a positive node, a draw goes right only if the right child is positive, and left
only if the left child is positive or the right one is not, and then it is the left child that is positive. So it goes
from positive nodes to positive nodes, down to a positive leaf. The uniform number decides only where both children are
positive: no rounding of it can break this.

Why draws are proportional. With children l and r, a fraction u goes left if u (l + r) < l, and is then stretched to
u (l + r) / l, or else to (u (l + r) - l) / r: uniform again. So each child is entered with its share of its own l + r,
in float64; one target carried down from the root would spill the roundings of large sums onto small neighbours. A
chance differs from p_i / root by a relative 2**-24 per level (the float32 rounding of each sum), under 2e-6 for any
replay; chances below 2**-53 have the granularity of the uniform numbers.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rlplastic import seeding
from rlplastic.errors import CheckpointError, ConfigurationError


class SumTree:
    """Priorities of ``num_leaves`` rows on the learner's device; nothing here makes the host wait for the device.

    Leaves are int64 on that device and in [0, num_leaves): to check them would be to wait, so others corrupt the tree
    or fail in the device's own way. Where all priorities are 0 there is nothing to draw; see `draw`.

    Attributes:
        nodes: (2P,) float32, the tree; node 0 is unused. That is 8 bytes per leaf of the full tree, so between 8 and
            16 bytes per row (`memory_bytes`).
        priorities: (num_leaves,) float32, the view of the rows' leaves; read only.
        largest: () float32, the largest priority that `set` has seen, at least 1; it never falls (see above).
    """

    def __init__(self, num_leaves: int, device: torch.device | str) -> None:
        """Start with every priority at 0.

        Raises:
            ConfigurationError: ``num_leaves`` is below 1.
        """
        if num_leaves < 1:
            raise ConfigurationError(
                f"a priority tree of {num_leaves} rows was asked for; expected at least 1, so raise replay.capacity"
            )
        self.num_leaves = num_leaves
        self._depth = _depth(num_leaves)
        self._width = 1 << self._depth
        self.nodes = torch.zeros(2 * self._width, device=device)
        self.priorities = self.nodes[self._width : self._width + num_leaves]
        self.largest = torch.ones((), device=device)
        self._children = self.nodes.view(self._width, 2)
        # P leaves of this size sum to the largest float32, and P is a power of two: no sum can become infinite.
        self._limit = torch.finfo(torch.float32).max / self._width

    @staticmethod
    def memory_bytes(num_leaves: int) -> int:
        """Bytes that a tree of this many rows puts on its device."""
        return (8 << _depth(num_leaves)) + 4

    # Writing

    def set(self, leaves: Tensor, priorities: Tensor) -> None:
        """Give rows their priorities, which are already raised to alpha (`priorities_from_errors`).

        A priority that is NaN, infinite or negative counts as the largest finite one seen so far, this call's included:
        a row with a broken TD error must be looked at again, and must not poison the sums. Finite priorities above
        (largest float32) / P count as that, so that no sum overflows; that is over 1e29 for every replay.

        Args:
            leaves: (n,) int64. Where one occurs several times, the largest of its priorities counts.
            priorities: (n,) float32; 0 takes a row out of the draws.
        """
        sound = (priorities >= 0) & (priorities < torch.inf)
        kept = torch.where(sound, priorities, 0.0).clamp_(max=self._limit)
        torch.maximum(self.largest, torch.cat((self.largest.view(1), kept)).amax(), out=self.largest)
        nodes = leaves + self._width
        # A maximum does not depend on the order of its terms, unlike which of several plain writes comes last.
        self.nodes.index_fill_(0, nodes, 0.0)
        self.nodes.scatter_reduce_(0, nodes, torch.where(sound, kept, self.largest), "amax")
        self._sum_above(nodes)

    def add_new(self, leaves: Tensor) -> None:
        """Give rows (n,) that have just become transitions the largest priority seen so far, 1 before any."""
        self._fill(leaves, self.largest)

    def clear(self, leaves: Tensor) -> None:
        """Give rows (n,) that are no transitions priority 0: they are never drawn."""
        self._fill(leaves, torch.zeros_like(self.largest))

    def _fill(self, leaves: Tensor, priority: Tensor) -> None:
        nodes = leaves + self._width
        # Not index_fill_, which reads the value of a tensor on the host.
        self.nodes.index_copy_(0, nodes, priority.expand(nodes.shape))
        self._sum_above(nodes)

    def _sum_above(self, nodes: Tensor) -> None:
        """Recompute all ancestors of these leaves (n,), given as nodes, from the lowest level up."""
        for _ in range(self._depth):
            nodes = nodes >> 1
            left, right = self._children.index_select(0, nodes).unbind(1)
            self.nodes.index_copy_(0, nodes, left + right)

    # Drawing

    def draw(self, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Rows drawn in proportion to their priorities, never one of priority 0 (proved above).

        Larger uniform numbers give larger rows, so stratified numbers give stratified draws. If all priorities are 0
        the answer is row 0 with probability NaN, which no loss survives unnoticed.

        Args:
            uniforms: (n,) float64 or float32, in [0, 1).

        Returns:
            The rows, (n,) int64, and the probability that one draw has of each, (n,) float64: the ratio of two float32
            numbers need not be a float32.
        """
        nodes = torch.ones_like(uniforms, dtype=torch.int64)
        fraction = uniforms.double()
        for _ in range(self._depth):
            left, right = self._children.index_select(0, nodes).double().unbind(1)
            target = fraction * (left + right)
            goes_right = (right > 0) & ((left == 0) | (target >= left))
            fraction = torch.where(goes_right, (target - left) / right, target / left)
            nodes = 2 * nodes + goes_right
        probabilities = self.nodes.index_select(0, nodes).double() / self.nodes[1].double()
        return nodes - self._width, probabilities

    # Persistence

    def state_dict(self) -> dict[str, Tensor]:
        """``priorities`` (num_leaves,) and ``largest`` (), copies on the tree's device."""
        return {"priorities": self.priorities.clone(), "largest": self.largest.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state_dict`: the tree has the same bits, and so have its draws.

        Raises:
            CheckpointError: the state is that of a tree with another number of rows.
        """
        if state["priorities"].shape != self.priorities.shape:
            raise CheckpointError(
                f"the checkpoint has priorities of {state['priorities'].numel():,} rows, but the replay has "
                f"{self.num_leaves:,}; expected as many, so resume with the capacity and environments of the checkpoint"
            )
        self.priorities.copy_(state["priorities"])
        self.largest.copy_(state["largest"])
        for level in reversed(range(self._depth)):
            nodes = slice(1 << level, 2 << level)
            left, right = self._children[nodes].unbind(1)
            torch.add(left, right, out=self.nodes[nodes])


def priorities_from_errors(td_error: Tensor, exponent: float, epsilon: float) -> Tensor:
    """(|td_error| + epsilon)^exponent, float32 (n,): how surprising each transition was.

    Args:
        td_error: (n,), of any sign; NaN and infinities pass through, for `SumTree.set` to judge.
        exponent: alpha of the paper; 0 makes draws uniform, 1 proportional to the error.
        epsilon: positive, so that a transition without error can be drawn again.
    """
    return td_error.detach().float().abs().add(epsilon).pow(exponent)


def importance_weights(probabilities: Tensor, exponent: float) -> Tensor:
    """w_i / max_j w_j over the batch with w_i = (1/N * 1/P(i))^beta, float32 (n,): factors of the losses, in [0, 1].

    arXiv 1511.05952, section 3.4: they undo the bias of drawing by priority, fully at beta = 1, and the division only
    ever scales updates down. N, the rows that can be drawn, is the same in all w_i and so cancels out:
    w_i / max_j w_j = (min_j P(j) / P(i))^beta, with a base in [0, 1] that no exponent can make overflow.

    Args:
        probabilities: (n,) float64, P of the rows drawn (`SumTree.draw`).
        exponent: beta of the paper.
    """
    return (probabilities.amin() / probabilities).pow(exponent).float()


def uniform_fractions(count: int, high: int, seed: int, device: torch.device | str) -> Tensor:
    """``count`` float64 multiples of 2**-53 in [0, 1), a function of ``(high, seed)`` alone, the same on every device.

    They are made of the same words as `rlplastic.seeding.uniform_integers`, so the two need different seeds.
    """
    upper, lower = seeding.uniform_words(count, high, seed, device)
    return ((upper << 21) | (lower >> 11)).double() * 2.0**-53


def _depth(num_leaves: int) -> int:
    """Levels below the root: 2**depth is the smallest power of two that is at least ``num_leaves``."""
    return (num_leaves - 1).bit_length()
