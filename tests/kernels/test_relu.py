"""The ReLU of compiled losses: torch's in value and gradient, without booleans kept for the way back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table

from rlplastic.agents.sac.networks import trunk
from rlplastic.kernels.relu import relu, step


def kept_between(function: Any, *inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
    """What the function returns, and what its compiled form hands from the way forward to the way back.

    All of torch's compiler but the last step, which writes the C++.
    """
    kept: list[Tensor] = []

    def forward(graph: torch.fx.GraphModule, _examples: Any) -> Any:
        (output,) = [node for node in graph.graph.nodes if node.op == "output"]
        kept.extend(node.meta["val"] for node in output.args[0] if node is not None)
        return make_boxed_func(graph)

    backend = aot_autograd(
        fw_compiler=forward,
        bw_compiler=lambda graph, _examples: make_boxed_func(graph),
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    result: Tensor = torch.compile(function, backend=backend, fullgraph=True, dynamic=False)(*inputs)
    return result, kept


EDGES = [-torch.inf, -3.0, -1e-20, -0.0, 0.0, 1e-20, 0.7, 3.0, torch.inf]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_relu_has_the_values_and_the_gradient_of_torchs(dtype: torch.dtype) -> None:
    x = torch.cat((torch.tensor(EDGES), torch.randn(100, generator=torch.manual_seed(0)))).to(dtype)
    weight = torch.randn(len(x), generator=torch.manual_seed(1)).to(dtype)
    gradients = []
    for function in (torch.relu, lambda x: kept_between(relu, x)[0]):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        assert torch.equal(y, x.clamp(min=0))
        gradients += torch.autograd.grad(y, leaf, weight)
    assert torch.equal(*gradients)


def test_a_nan_passes_through_both_ways() -> None:
    x = torch.tensor([torch.nan, 1.0], requires_grad=True)
    y, _ = kept_between(relu, x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert y.isnan().tolist() == gradient.isnan().tolist() == [True, False]


def test_step_is_the_sign_of_what_is_above_zero() -> None:
    assert step(torch.tensor(EDGES[:4])).tolist() == [0.0] * 4
    assert step(torch.tensor(EDGES[5:])).tolist() == [1.0] * 4


@pytest.mark.parametrize("layer_norm", [False, True])
def test_a_compiled_network_keeps_no_booleans_for_the_way_back(layer_norm: bool) -> None:
    network = trunk(5, 16, 2, layer_norm, members=2)
    x = torch.randn(2, 8, 5, requires_grad=True)
    result, kept = kept_between(lambda x: network(x).square().mean(), x)
    result.backward()
    assert len(kept) > 1 and not [tensor.shape for tensor in kept if tensor.dtype == torch.bool]

    plain = nn.Sequential(*(nn.ReLU() if isinstance(layer, nn.ReLU) else layer for layer in network))
    _, kept = kept_between(lambda x: plain(x).square().mean(), x)  # and that is what this is about
    assert [tensor.shape for tensor in kept if tensor.dtype == torch.bool]
