"""A tier at once: names, ensembles, profiles, and that nothing is touched, on networks of several libraries."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rlplastic.agents.flashsac.networks import Actor, Critic
from rlplastic.agents.heads import Categorical
from rlplastic.agents.layers import NormBounds
from rlplastic.errors import ConfigurationError
from rlplastic.plasticity import (
    BOUNDED,
    PLAIN,
    Layer,
    ModuleReader,
    Past,
    Subject,
    measure,
    ranks,
    snapshot,
    uninformative,
    units,
)
from rlplastic.plasticity.measure import LOW_IS_WORSE

TIERS = ("forward", "ranks", "expensive")
ROWS = 80


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mlp(width: int = 6) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1))


def plain(net: nn.Module) -> Subject:
    return Subject("net", net, ModuleReader(net), loss=lambda x: net(x).square().mean(), output=lambda x: net(x))


def critic_subject() -> tuple[Subject, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    critic = Critic(3, 2, 8, 1, Categorical(5, 1.0), 2)
    NormBounds(critic).project()
    batch = normal(ROWS, 3), normal(ROWS, 2, seed=2)
    critic(*batch, True)

    def logits(batch: tuple[Tensor, Tensor]) -> Tensor:
        return critic(*batch, False)

    subject = Subject(
        "critic",
        critic,
        ModuleReader(
            critic,
            logits,
            {
                "trunk.blocks.0.expand_norm": "rectifier",
                "trunk.blocks.0.contract_norm": "rectifier",
                "trunk.post_norm": "linear",
            },
            units=-2,
        ),
        members=2,
        profile=BOUNDED,
        loss=lambda batch: -F.log_softmax(logits(batch), -1)[..., 2].mean(),
        output=lambda batch: critic.values.expected(logits(batch)).mean(),
        logits=logits,
    )
    return subject, batch


def rows_of(batch: tuple[Tensor, Tensor], size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(batch[0].split(size), batch[1].split(size), strict=True))


def everything(subject: Subject, batch, micro_batches, samples) -> dict[str, float]:
    past = Past(snapshot(subject.module), 5)
    found = {}
    for tier in TIERS:
        new = measure(subject, batch, tier, initial=past, previous=past, micro_batches=micro_batches, samples=samples)
        assert not set(new) & set(found)
        found |= new
    return found


def test_names_are_stable() -> None:
    x = normal(ROWS, 3)
    found = everything(plain(mlp()), x, x.split(10), x[:4].split(1))
    activation = {"dormant", "dormant_0.1", "duplicates", "active_fraction"}
    rank = {"effective_rank", "srank_0.01", "stable_rank", "geometric_stability"}
    weight = {"weight_norm", "angle_from_init", "angular_speed"}
    layers = {
        "0": weight,
        "2": weight,
        "4": weight,
        "1": activation | rank | {"dead", "linearised", "gradient_dormant"},
        "3": activation | rank | {"gradient_dormant"},
        "all": activation
        | {"dead", "linearised", "weight_norm", "distance_from_init", "gradient_dormant", "gradient_norm"}
        | {"gradient_signal_to_noise", "sharpness", "hessian_trace", "hessian_trace_error", "entk_rank"},
    }
    assert set(found) == {f"plasticity/net/{layer}/{metric}" for layer, metrics in layers.items() for metric in metrics}
    assert all(math.isfinite(value) for value in found.values())


def test_values_are_those_of_the_functions() -> None:
    net, x = mlp(), normal(ROWS, 3)
    found = everything(plain(net), x, x.split(10), x[:4].split(1))
    h = net[:2](x)
    assert found["plasticity/net/1/active_fraction"] == pytest.approx(float(units.active_fraction(h)))
    assert found["plasticity/net/3/effective_rank"] == pytest.approx(float(ranks.effective_rank(net[:4](x))))
    squares = sum(float(p.detach().square().sum()) for p in net.parameters())
    assert found["plasticity/net/all/weight_norm"] == pytest.approx(math.sqrt(squares), rel=1e-5)
    net(x).square().mean().backward()
    squares = sum(float(p.grad.square().sum()) for p in net.parameters())
    assert found["plasticity/net/all/gradient_norm"] == pytest.approx(math.sqrt(squares), rel=1e-5)


def test_a_modules_ratio_weighs_layers_by_their_units() -> None:
    layers = {"narrow": Layer(torch.zeros(4, 2)), "wide": Layer(torch.ones(4, 6))}
    found = measure(Subject("net", nn.Linear(1, 1), lambda _: layers), None, "forward")
    assert found["plasticity/net/narrow/dormant"] == 1
    assert found["plasticity/net/wide/dormant"] == 0
    assert found["plasticity/net/all/dormant"] == pytest.approx(0.25)


def test_ensembles_give_the_mean_and_the_member_that_is_worst_off() -> None:
    h = torch.ones(2, 20, 4)
    h[1, :, 0] = 0
    h[0] += normal(20, 4).abs()
    module = nn.ParameterDict({"weight": nn.Parameter(torch.stack((torch.ones(2, 2), 3 * torch.ones(2, 2))))})
    subject = Subject("net", module, lambda _: {"h": Layer(h)}, members=2)
    found = measure(subject, None, "forward") | measure(subject, None, "ranks")
    assert found["plasticity/net/h/dormant"] == pytest.approx(0.125)
    assert found["plasticity/net/h/dormant_worst"] == pytest.approx(0.25)
    assert found["plasticity/net/h/active_fraction"] == pytest.approx(0.875)
    assert found["plasticity/net/h/active_fraction_worst"] == pytest.approx(0.75)
    assert found["plasticity/net/h/effective_rank_worst"] == pytest.approx(1, abs=1e-6)
    assert found["plasticity/net/all/weight_norm"] == pytest.approx(4)
    assert found["plasticity/net/all/weight_norm_worst"] == pytest.approx(6)


def test_every_metric_that_is_worse_when_low_exists() -> None:
    subject, batch = critic_subject()
    found = everything(subject, batch, rows_of(batch, 10), rows_of(batch, 1)[:4])
    assert {key.rsplit("/", 1)[-1] for key in found} >= LOW_IS_WORSE


def test_flat_metrics_of_bounded_networks_are_called_uninformative_with_a_reason() -> None:
    subject, batch = critic_subject()
    found = everything(subject, batch, rows_of(batch, 10), rows_of(batch, 1)[:4])
    labelled = uninformative(subject, found)
    flat = {"active_fraction", "dormant", "dormant_0.1", "dead", "linearised", "weight_norm", "distance_from_init"}
    assert {key.rsplit("/", 1)[-1].removesuffix("_worst") for key in labelled} == flat
    assert all(len(reason) > 20 for reason in labelled.values())
    assert "plasticity/critic/all/dormant_worst" in labelled
    for metric in ("effective_rank", "angular_speed", "batch_norm_lag", "gradient_dormant", "sharpness"):
        assert subject.profile.reason(metric) is None
        assert any(key.endswith(f"/{metric}") for key in found)


def test_flat_metrics_are_flat_on_a_fresh_bounded_network() -> None:
    subject, batch = critic_subject()
    lagging = measure(subject, batch, "forward")
    for _ in range(500):
        subject.module(*batch, True)
    found = measure(subject, batch, "forward")
    assert found["plasticity/critic/trunk.input_norm/batch_norm_lag"] < 0.01
    assert lagging["plasticity/critic/trunk.input_norm/batch_norm_lag"] > 0.05
    assert found["plasticity/critic/all/dormant"] == found["plasticity/critic/all/dead"] == 0
    assert found["plasticity/critic/all/active_fraction"] == pytest.approx(0.5, abs=0.1)


def test_no_metric_of_a_plain_network_but_lag_is_uninformative() -> None:
    x = normal(ROWS, 3)
    subject = plain(mlp())
    assert subject.profile is PLAIN
    assert uninformative(subject, everything(subject, x, x.split(10), x[:4].split(1))) == {}


def test_one_update_of_a_bounded_network_is_seen_as_speed() -> None:
    subject, batch = critic_subject()
    past = Past(snapshot(subject.module), 1)
    with torch.no_grad():
        weight = subject.module.trunk.embed.weight
        first, second = weight[0].clone(), weight[0].roll(1, -1)
        weight[0] = math.cos(0.1) * first + math.sin(0.1) * F.normalize(
            second - (second * first).sum(-1, keepdim=True) * first, dim=-1
        )
    found = measure(subject, batch, "forward", previous=past, initial=past)
    assert found["plasticity/critic/trunk.embed/angular_speed"] == pytest.approx(0.05, rel=1e-5)
    assert found["plasticity/critic/trunk.embed/angular_speed_worst"] == pytest.approx(0, abs=1e-9)
    assert found["plasticity/critic/trunk.embed/angle_from_init_worst"] == pytest.approx(0.1, rel=1e-5)
    assert found["plasticity/critic/trunk.blocks.0.expand/angular_speed"] == 0


def state(module: nn.Module) -> list[object]:
    tensors = [*module.parameters(), *module.buffers()]
    return [
        [(tensor.detach().numpy().tobytes(), id(tensor), tensor.requires_grad) for tensor in tensors],
        [None if p.grad is None else (id(p.grad), p.grad.numpy().tobytes()) for p in module.parameters()],
        [m.training for m in module.modules()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in module.modules()],
        torch.get_rng_state().numpy().tobytes(),
    ]


def test_measuring_a_plain_network_leaves_no_trace() -> None:
    net, x = mlp(), normal(ROWS, 3)
    net(x).sum().backward()
    net[1].eval()
    before = state(net)
    everything(plain(net), x, x.split(10), x[:4].split(1))
    assert state(net) == before


@pytest.mark.parametrize("grads", [False, True])
def test_measuring_flashsac_leaves_no_trace(grads: bool) -> None:
    subject, batch = critic_subject()
    if grads:
        subject.loss(batch).backward()
    before = state(subject.module)
    everything(subject, batch, rows_of(batch, 10), rows_of(batch, 1)[:4])
    assert state(subject.module) == before
    actor = Actor(3, 2, 8, 1)
    before = state(actor)
    layers = {"trunk.blocks.0.expand_norm": "rectifier"}
    reader = ModuleReader(actor, lambda x: actor(x, True), layers, units=-2)  # statistics that would move
    x = normal(ROWS, 3)
    measure(Subject("actor", actor, reader, profile=BOUNDED), x, "forward")
    assert state(actor) == before


def test_measuring_twice_gives_the_same_numbers() -> None:
    subject, batch = critic_subject()
    first, second = (everything(subject, batch, rows_of(batch, 10), rows_of(batch, 1)[:4]) for _ in range(2))
    assert first == second


def test_a_compiled_step_is_not_compiled_again_after_measuring() -> None:
    subject, batch = critic_subject()
    graphs = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[Tensor]):
        graphs.append(graph)
        return graph.forward

    step = torch.compile(lambda batch: subject.module(*batch, True).sum(), backend=backend)
    step(batch)
    compiled = len(graphs)
    everything(subject, batch, rows_of(batch, 10), rows_of(batch, 1)[:4])
    step(batch)
    assert len(graphs) == compiled > 0


def test_half_precision_activations_are_measured_as_they_are() -> None:
    h = normal(20, 4).relu().bfloat16()
    found = [metric(h) for metric in (units.dormant_ratio, units.duplicate_fraction, ranks.effective_rank)]
    expected = [metric(h.double()) for metric in (units.dormant_ratio, units.duplicate_fraction, ranks.effective_rank)]
    assert found == expected


def test_a_reader_that_meddles_is_undone() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU())
    before = state(net)

    def meddles(x: Tensor) -> dict[str, Layer]:
        net.train()
        torch.rand(3)
        return {"h": Layer(net(x))}

    measure(Subject("net", net, meddles), normal(ROWS, 3), "forward")
    assert state(net) == before


def test_critic_of_stable_baselines3_is_measured() -> None:
    gymnasium = pytest.importorskip("gymnasium")
    sb3 = pytest.importorskip("stable_baselines3")
    model = sb3.SAC("MlpPolicy", gymnasium.make("Pendulum-v1"), policy_kwargs={"net_arch": [12, 12]}, device="cpu")
    critic, actor = model.policy.critic, model.policy.actor
    before = state(critic), state(actor)
    batch = normal(ROWS, 3), normal(ROWS, 1, seed=2).tanh()
    q = Subject(
        "critic",
        critic,
        ModuleReader(critic, lambda batch: critic(*batch)),
        loss=lambda batch: torch.cat(critic(*batch)).square().mean(),
        output=lambda batch: critic(*batch)[0],
    )
    found = everything(q, batch, rows_of(batch, 10), rows_of(batch, 1)[:4])
    assert {f"plasticity/critic/qf{k}.{layer}/dormant" for k in (0, 1) for layer in (1, 3)} <= set(found)
    policy = Subject("actor", actor, ModuleReader(actor))
    assert "plasticity/actor/latent_pi.3/effective_rank" in measure(policy, batch[0], "ranks")
    assert (state(critic), state(actor)) == before


def test_a_supervised_network_that_loses_units_is_seen_to() -> None:
    net, x = mlp(40), normal(ROWS, 3)
    subject = plain(net)
    healthy = measure(subject, x, "forward")
    with torch.no_grad():
        net[0].bias[:10] = -100
    ill = measure(subject, x, "forward")
    for metric in ("dead", "dormant"):
        assert healthy[f"plasticity/net/1/{metric}"] < 0.1
        assert ill[f"plasticity/net/1/{metric}"] >= 0.25


def test_too_few_rows_for_a_rank_are_refused_unless_the_layer_is_left_out() -> None:
    net, x = mlp(), normal(11, 3)
    with pytest.raises(ConfigurationError, match="at least 12"):
        measure(plain(net), x, "ranks")
    assert measure(Subject("net", net, ModuleReader(net), rank_layers=()), x, "ranks") == {}
    with pytest.raises(ConfigurationError, match="unknown"):
        measure(plain(net), x, "everything")
    with pytest.raises(ConfigurationError, match="same module"):
        measure(plain(net), x, "forward", initial=Past({}, 1))


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 6),
    width=st.integers(1, 4),
    members=st.sampled_from([None, 1, 3]),
    content=st.sampled_from([0.0, 1.0, math.nan, math.inf]),
)
def test_no_shape_or_content_breaks_a_measurement(rows: int, width: int, members: int | None, content: float) -> None:
    lead = () if members is None else (members,)
    layers = {"h": Layer(torch.full((*lead, rows, width), content))}
    subject = Subject("net", nn.ReLU(), lambda _: layers)
    with pytest.raises(ConfigurationError, match="no weights"):
        measure(subject, None, "forward")
    weight = nn.ParameterDict({"weight": nn.Parameter(torch.ones(*lead, 2, 2))})
    found = measure(Subject("net", weight, lambda _: layers, members), None, "forward")
    hidden = {key: value for key, value in found.items() if "weight_norm" not in key}
    assert all(math.isnan(value) != math.isfinite(content) for value in hidden.values())
    assert any(key.endswith("_worst") for key in found) == (members is not None)
