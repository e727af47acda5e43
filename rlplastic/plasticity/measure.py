"""All metrics of one network in one call, by tier of cost, as a flat dictionary of stable names.

``plasticity/<module>/<layer>/<metric>``; layer ``all`` is the module as a whole. For an ensemble a value is the mean
over members, and ``<metric>_worst`` the member that is worst off. Nothing here changes the network: see
`rlplastic.plasticity.activations.untouched`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rlplastic.errors import ConfigurationError
from rlplastic.plasticity import curvature, gradients, ranks, representation, units, weights
from rlplastic.plasticity.activations import Layer, ModuleReader, Reader, running_means, untouched
from rlplastic.plasticity.profile import PLAIN, Profile

Tier = Literal["forward", "ranks", "expensive"]
MODULE = "all"
"""The name of the layer that stands for the whole module."""

LOW_IS_WORSE = frozenset(
    {
        "active_fraction",
        "effective_rank",
        "srank_0.01",
        "stable_rank",
        "geometric_stability",
        "angular_speed",
        "logit_entropy",
    }
)
"""Metrics whose worst member is the smallest; of all others it is the largest."""


@dataclass(frozen=True)
class Subject:
    """A network, and what a measurement may ask of it.

    Args:
        name: in the names of the results, such as ``critic``.
        module: whose parameters and buffers are measured.
        read: hidden layers of a batch; a `ModuleReader` also gives gradients and batch-norm inputs.
        members: of a batched ensemble, whose parameters have this first dimension; None for one network.
        profile: which metrics are informative; see `uninformative`.
        loss: of a batch, for gradients and curvature; deterministic, with running statistics where there are any.
        output: of one sample, a single number, for the eNTK: Q, or one action mean.
        logits: of a batch, (..., rows, atoms), where the critic is categorical.
        rank_layers: whose ranks and geometry are measured; None for all.
    """

    name: str
    module: nn.Module
    read: Reader
    members: int | None = None
    profile: Profile = PLAIN
    loss: Callable[[Any], Tensor] | None = None
    output: Callable[[Any], Tensor] | None = None
    logits: Callable[[Any], Tensor] | None = None
    rank_layers: Sequence[str] | None = None


@dataclass(frozen=True)
class Past:
    """Earlier weights of the module that is measured.

    Args:
        weights: from `rlplastic.plasticity.weights.snapshot`.
        updates: how many updates ago.
    """

    weights: Mapping[str, Tensor]
    updates: int


def measure(
    subject: Subject,
    batch: Any,  # noqa: ANN401 - whatever the subject's reader takes
    tier: Tier,
    *,
    initial: Past | None = None,
    previous: Past | None = None,
    micro_batches: Sequence[Any] = (),
    samples: Sequence[Any] = (),
    seed: int = 0,
) -> dict[str, float]:
    """The metrics of one tier; tiers do not contain each other.

    - forward: one forward pass and the weights. Units, batch-norm lag, norms, distances, angles, logit entropy.
    - ranks: one forward pass and decompositions. Ranks and geometric stability.
    - expensive: many backward passes. Gradient dormancy, norm and signal-to-noise, sharpness, trace, eNTK.

    Metrics whose inputs are missing (no snapshot, loss or samples) are left out. Reading values waits for the device.

    Args:
        subject: what to measure.
        batch: frozen or fresh probe states.
        tier: which.
        initial: weights at initialisation, for distance and angle from it.
        previous: a recent snapshot, for angular speed.
        micro_batches: at least 8, disjoint and of one size, for the signal-to-noise ratio.
        samples: 64 to 256 single states, for the eNTK.
        seed: of random halves, vectors and signs.

    Raises:
        ConfigurationError: unknown tier, or a batch too small for its ranks.
    """
    found: dict[str, Tensor | float]
    with untouched(subject.module, training=False):
        if tier == "forward":
            found = _forward(subject, batch) | _weights(subject, initial, previous)
        elif tier == "ranks":
            found = _ranks(subject, batch, seed)
        elif tier == "expensive":
            found = _gradients(subject, batch, micro_batches) | _curvature(subject, batch, samples, seed)
        else:
            raise ConfigurationError(f"tier={tier!r} is unknown; expected 'forward', 'ranks' or 'expensive'")
    return _named(subject.name, found)


def gradient_dormancy(subject: Subject, batch: Any) -> dict[str, float]:  # noqa: ANN401
    """`gradient_dormant` of every layer and the module, without the rest of its tier: one backward pass."""
    return _named(subject.name, _gradient_dormancy(subject, batch))


def uninformative(subject: Subject, measured: Mapping[str, float]) -> dict[str, str]:
    """Those of ``measured`` that say nothing on this kind of network, with the reason: never to be read as healthy."""
    reasons = {key: subject.profile.reason(key) for key in measured}
    return {key: reason for key, reason in reasons.items() if reason is not None}


def _named(module: str, found: Mapping[str, Tensor | float]) -> dict[str, float]:
    """Means and worst members of ``<layer>/<metric>``, as numbers."""
    named = {}
    for key, value in found.items():
        name = f"plasticity/{module}/{key}"
        if isinstance(value, Tensor) and value.dim():
            low = key.rsplit("/", 1)[-1] in LOW_IS_WORSE
            named[name], named[f"{name}_worst"] = float(value.mean()), float(value.amin() if low else value.amax())
        else:
            named[name] = float(value)
    return named


def _read(subject: Subject, batch: Any) -> dict[str, Layer]:  # noqa: ANN401
    with torch.no_grad():
        return dict(subject.read(batch))


def _forward(subject: Subject, batch: Any) -> dict[str, Tensor | float]:  # noqa: ANN401
    found: dict[str, Tensor | float] = {}
    sizes: dict[str, list[int]] = {}
    ratios: dict[str, list[Tensor]] = {}
    for name, layer in _read(subject, batch).items():
        for metric, value in _units(layer).items():
            found[f"{name}/{metric}"] = value
            ratios.setdefault(metric, []).append(value)
            sizes.setdefault(metric, []).append(layer.values.shape[-1])
    for metric, values in ratios.items():
        found[f"{MODULE}/{metric}"] = units.weighted_by_units(values, sizes[metric])
    if isinstance(subject.read, ModuleReader):
        means = running_means(subject.module)
        inputs = subject.read.norm_inputs(batch) if means else {}
        for name, entering in inputs.items():
            found[f"{name}/batch_norm_lag"] = representation.batch_norm_lag(means[name], entering)
    if subject.logits is not None:
        with torch.no_grad():
            found[f"{MODULE}/logit_entropy"] = representation.logit_entropy(subject.logits(batch))
    return found


def _units(layer: Layer) -> dict[str, Tensor]:
    h = layer.values
    found = {
        "dormant": units.dormant_ratio(h),
        "dormant_0.1": units.dormant_ratio(h, 0.1),
        "duplicates": units.duplicate_fraction(h),
    }
    if layer.kind == "rectifier":
        found["active_fraction"] = units.active_fraction(h)
        found["dead"] = units.dead_fraction(h)
        found["linearised"] = units.linearised_fraction(h)
    elif layer.kind == "tanh":
        found["active_fraction"] = units.unsaturated_fraction(h)
    return found


def _weights(subject: Subject, initial: Past | None, previous: Past | None) -> dict[str, Tensor | float]:
    now = dict(subject.module.named_parameters())
    everything = list(now.values())
    found: dict[str, Tensor | float] = {f"{MODULE}/weight_norm": weights.weight_norm(everything, subject.members)}
    if initial is not None:
        references = [_of(initial, name) for name in now]
        found[f"{MODULE}/distance_from_init"] = weights.distance(everything, references, subject.members)
    matrices = {name: weight for name, weight in now.items() if weight.dim() == (2 if subject.members is None else 3)}
    for name, weight in matrices.items():
        layer = name.removesuffix(".weight")
        found[f"{layer}/weight_norm"] = weights.weight_norm([weight], subject.members)
        if initial is not None:
            found[f"{layer}/angle_from_init"] = weights.mean_angle(weight, _of(initial, name))
        if previous is not None:
            found[f"{layer}/angular_speed"] = weights.angular_speed(weight, _of(previous, name), previous.updates)
    return found


def _of(past: Past, name: str) -> Tensor:
    if name not in past.weights:
        raise ConfigurationError(f"the snapshot has no weights {name!r}; expected one of the same module")
    return past.weights[name]


def _ranks(subject: Subject, batch: Any, seed: int) -> dict[str, Tensor | float]:  # noqa: ANN401
    found: dict[str, Tensor | float] = {}
    for name, layer in _read(subject, batch).items():
        if subject.rank_layers is not None and name not in subject.rank_layers:
            continue
        rows, width = layer.values.shape[-2:]
        if rows < 2 * width:
            raise ConfigurationError(
                f"ranks of layer {name} with {width} units were asked of {rows} rows; expected at least {2 * width}: "
                "give a larger batch, or name the layers with rank_layers="
            )
        found |= {f"{name}/{metric}": value for metric, value in ranks.all_ranks(layer.values).items()}
        # Distances between all pairs of rows: 256 of them tell as much as thousands.
        found[f"{name}/geometric_stability"] = representation.geometric_stability(layer.values[..., :256, :], seed=seed)
    return found


def _gradients(subject: Subject, batch: Any, micro_batches: Sequence[Any]) -> dict[str, Tensor | float]:  # noqa: ANN401
    found: dict[str, Tensor | float] = {}
    loss = subject.loss
    if loss is None:
        return found
    found |= _gradient_dormancy(subject, batch)
    parameters = [p for p in subject.module.parameters() if p.requires_grad]
    with torch.enable_grad():
        found[f"{MODULE}/gradient_norm"] = gradients.gradient_norm(gradients.flat_gradient(loss(batch), parameters))
    if micro_batches:
        each = gradients.micro_batch_gradients(loss, micro_batches, parameters)
        found[f"{MODULE}/gradient_signal_to_noise"] = gradients.gradient_signal_to_noise(each)
    return found


def _gradient_dormancy(subject: Subject, batch: Any) -> dict[str, Tensor | float]:  # noqa: ANN401
    loss = subject.loss
    if loss is None or not isinstance(subject.read, ModuleReader):
        return {}
    layers = subject.read.gradients(lambda: loss(batch))
    ratios = {name: units.gradient_dormant_ratio(layer.values) for name, layer in layers.items()}
    sizes = [layer.values.shape[-1] for layer in layers.values()]
    ratios[MODULE] = units.weighted_by_units(list(ratios.values()), sizes)
    return {f"{name}/gradient_dormant": ratio for name, ratio in ratios.items()}


def _curvature(subject: Subject, batch: Any, samples: Sequence[Any], seed: int) -> dict[str, Tensor | float]:  # noqa: ANN401
    found: dict[str, Tensor | float] = {}
    parameters = [p for p in subject.module.parameters() if p.requires_grad]
    if subject.loss is not None:
        with torch.enable_grad():
            hessian = curvature.Hessian(subject.loss(batch), parameters).check()
            found[f"{MODULE}/sharpness"] = hessian.largest_eigenvalue(seed=seed)
            trace, error = hessian.trace(seed=seed)
        found[f"{MODULE}/hessian_trace"], found[f"{MODULE}/hessian_trace_error"] = trace, error
    if subject.output is not None and samples:
        kernel = curvature.ntk(curvature.output_gradients(subject.output, samples, parameters))
        found[f"{MODULE}/entk_rank"] = ranks.effective_rank(kernel)
    return found
