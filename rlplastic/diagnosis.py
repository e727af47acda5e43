"""Can this network still learn? All metrics of a saved run, or of any network, beside those of a fresh network.

Everything is measured on the same states: a run's are drawn from the replay that its checkpoint holds. Metrics describe
(none of them has been shown to time an intervention); those that are flat by construction on a kind of network carry
the reason. What decides is the trainability probe (`rlplastic.plasticity.probe`). Checkpoints are only read, so that a
run in use can be diagnosed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlplastic import seeding
from rlplastic.agents import AGENTS, make_agent, subjects
from rlplastic.agents.flashsac import FlashSAC
from rlplastic.agents.patients import patients, readable
from rlplastic.agents.sac import SAC
from rlplastic.agents.steps import Inputs, part
from rlplastic.checkpoint import CheckpointStore, Loaded
from rlplastic.config import Config
from rlplastic.critic_diagnosis import CriticReport, diagnose_critic
from rlplastic.envs.base import AutoresetMode
from rlplastic.errors import CheckpointError, ConfigurationError
from rlplastic.plasticity import PLAIN, ModuleReader, Past, Profile, Subject, measure, snapshot, uninformative
from rlplastic.plasticity.activations import running_means
from rlplastic.plasticity.measure import Tier
from rlplastic.plasticity.patient import Patient, States, reestimate
from rlplastic.plasticity.probe import ROWS, Probe, probe
from rlplastic.policy import read_config
from rlplastic.replay import Holdout, ReplayRing, Sampler
from rlplastic.sharding import ShardedStore

TIERS: tuple[Tier, ...] = ("forward", "ranks", "expensive")
SAMPLES, MICRO_BATCHES = 128, 8
"""Single states of the eNTK, and parts of a batch of the signal-to-noise ratio."""


@dataclass(frozen=True)
class Metric:
    """One measured number; a ``fresh`` network has none where only the past gives one.

    layer: of the network, ``all`` for the whole; worst: the member of the ensemble that is worst off, None for a single
    network; reason: why the number says nothing on this kind of network, None where it does.
    """

    layer: str
    name: str
    tier: str
    value: float
    worst: float | None
    fresh: float | None
    reason: str | None


@dataclass(frozen=True)
class Diagnosis:
    """What was found in one network; ``probe`` is None if none was asked for."""

    network: str
    metrics: tuple[Metric, ...]
    probe: Probe | None


@dataclass(frozen=True)
class Report:
    """What was found, on how many states.

    subject: what was diagnosed, in words; unavailable: what could not be measured, each with the reason; critic: of a
    run's critic, `rlplastic.critic_diagnosis`.
    """

    subject: str
    rows: int
    networks: tuple[Diagnosis, ...]
    unavailable: Mapping[str, str]
    td_error: subjects.TDError | None = None
    critic: CriticReport | None = None

    def document(self) -> dict[str, Any]:
        """As JSON can hold it: numbers that are not finite are null."""
        document = asdict(self)
        for found, network in zip(document["networks"], self.networks, strict=True):
            if network.probe is not None:
                found["probe"] |= {"ratio": network.probe.ratio, "worst": network.probe.worst}
        finite: dict[str, Any] = _finite(document)
        return finite


def _finite(value: Any) -> Any:  # noqa: ANN401 - whatever JSON can hold
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# Of a run


def diagnose_run(
    run: str | Path,
    *,
    rows: int = ROWS,
    probe_steps: int = 300,
    seed: int = 0,
    warn: Callable[[str], None] = lambda sentence: None,
) -> Report:
    """Actor and critic of a run's newest good checkpoint, on states from its replay.

    Args:
        run: the directory, such as ``runs/humanoid``.
        rows: transitions that are drawn; ranks need two for each unit of the widest last hidden layer.
        probe_steps: of the trainability probe, and updates of copies of the critic; 0: none.
        seed: of the draw, of the fresh networks and of the probe.
        warn: called with a sentence for each damaged checkpoint that was passed over.

    Raises:
        ConfigurationError: no such run, no checkpoint in it yet, no transitions in its replay, or too few rows.
        CheckpointError: every checkpoint is damaged, or does not fit the run's configuration.
    """
    path = Path(run)
    config = read_config(path)
    loaded = ShardedStore(path, 1, AGENTS[config.agent.name].columns, warn=warn).newest()
    if loaded is None:
        raise ConfigurationError(
            f"{path} has no checkpoint yet; expected one in {path / 'checkpoints'}: let the run save one first"
        )
    try:
        ring = _replay(config, loaded)
        agent, initial = _agent(config, ring, loaded.tensors("agent"))
    except (RuntimeError, KeyError) as error:
        raise CheckpointError(
            f"checkpoint {loaded.path} does not fit the run's config.yaml ({' '.join(str(error).split())[:200]}); "
            "expected both as one run wrote them"
        ) from error
    inputs, td_error, unavailable = _drawn(config, ring, agent, rows, seed)
    previous = _previous(loaded, agent.updates)
    old = _oldest(config, ring, loaded)
    if old is None and config.critic.kind == "flow":
        unavailable["recovery"] = "there is no earlier checkpoint, of which the first steps could be"
    if previous is None:
        unavailable["angular_speed"] = "there is no earlier checkpoint of another update"
    if initial is None:
        unavailable["distance_from_init, angle_from_init"] = "the run began with another run's networks"
    fresh = _fresh_agent(config, ring, inputs, seed)
    networks = []
    for name in ("actor", "critic"):
        began = Past(part(initial, f"{name}."), agent.updates) if initial else None
        before = Past(part(previous[0], f"{name}."), previous[1]) if previous else None
        pair = subjects.subjects(agent)[name], subjects.subjects(fresh)[name]
        found = _metrics(*pair, inputs, seed, began, before)
        patient = patients(agent, inputs)[name]
        probed = probe(patient, patient.states, seed, probe_steps) if probe_steps else None
        networks.append(Diagnosis(name, found, probed))
    subject = f"{path} at step {loaded.step:,}, after {agent.updates:,} updates"
    critic = diagnose_critic(config, ring, agent, old, rows, probe_steps, seed)
    return Report(subject, rows, tuple(networks), unavailable, td_error, critic)


def _replay(config: Config, loaded: Loaded) -> ReplayRing:
    """The replay of a checkpoint, in the host's memory; its sizes are those of the saved rows."""
    saved = part(next(loaded.segments()), "replay.")
    dims = {name: rows.shape[1] for name, rows in part(saved, "observation.").items()}
    settings = config.replay
    assert settings.capacity is not None, "a run's configuration is resolved"
    ring = ReplayRing(
        settings.capacity,
        len(saved["start"]),
        dims,
        saved["action"].shape[1],
        AutoresetMode.NEXT_STEP,  # of no matter: nothing is added
        settings.observation_dtype,
        holdout=Holdout(settings.holdout, config.seed) if settings.holdout else None,
    )
    for segment in loaded.segments():
        ring.import_rows(part(segment, "replay."))
    ring.import_head(loaded.tensors("replay_head"))
    if not ring.transitions:
        raise ConfigurationError(f"checkpoint {loaded.path} has no transition in its replay; let the run go on first")
    return ring


def _new_agent(config: Config, ring: ReplayRing) -> FlashSAC | SAC:
    here = copy.deepcopy(config)
    here.device, here.kernels = "cpu", "torch"
    return readable(make_agent(here, ring.observation_dims, ring.action_dim), "diagnose run=…")


def _agent(
    config: Config, ring: ReplayRing, state: dict[str, Tensor]
) -> tuple[FlashSAC | SAC, dict[str, Tensor] | None]:
    """The saved agent, and the weights that it began with: a function of the seed, if not those of another run."""
    agent = _new_agent(config, ring)
    own = config.init_from is None
    initial = {
        f"{name}.{entry}": value for name in agent.modules for entry, value in snapshot(agent.modules[name]).items()
    }
    agent.load_state_dict(state)
    return agent, initial if own else None


def _fresh_agent(config: Config, ring: ReplayRing, inputs: Inputs, seed: int) -> FlashSAC | SAC:
    """An agent that learned nothing, with the running statistics of these states."""
    other = copy.deepcopy(config)
    other.seed = seeding.key("fresh", config.seed, seed, bits=31)
    agent = _new_agent(other, ring)
    for patient in patients(agent, inputs).values():
        for module in (patient.module, patient.target):
            if module is not None:
                reestimate(patient, module)
    return agent


def _drawn(
    config: Config, ring: ReplayRing, agent: FlashSAC | SAC, rows: int, seed: int
) -> tuple[Inputs, subjects.TDError | None, dict[str, str]]:
    """Transitions of the replay, the TD error on those that training never samples, and what there is no data for."""
    assert config.agent.gamma is not None, "a run's configuration is resolved"
    if rows > ring.capacity:
        raise ConfigurationError(
            f"rows={rows:,} is more than the {ring.capacity:,} transitions of the replay; expected at most those"
        )
    drawn = ring, rows, config.agent.n_step, config.agent.gamma, seeding.key("diagnosis", config.seed)
    inputs = subjects.inputs_of(agent, Sampler(*drawn).sample(seed, agent.reward_scale))
    if not ring.held_out:
        reason = f"the replay holds no held-out transition (replay.holdout={config.replay.holdout or 0:g})"
        return inputs, None, {"held_out_td_error, td_gap": reason}
    outside = Sampler(*drawn, held_out=True).sample(seed, agent.reward_scale)
    return inputs, subjects.held_out_td_error(agent, subjects.inputs_of(agent, outside), inputs), {}


def _older(loaded: Loaded) -> list[Path]:
    """The checkpoints before this one."""
    return [path for path in loaded.path.parent.glob("step_" + "[0-9]" * 12) if path.name < loaded.path.name]


def _oldest(config: Config, ring: ReplayRing, loaded: Loaded) -> tuple[FlashSAC | SAC, int] | None:
    """The agent of the oldest checkpoint there is, and its step; None without any before this one."""
    try:
        oldest = CheckpointStore.load(min(_older(loaded)), segments=False)
        return _agent(config, ring, oldest.tensors("agent"))[0], oldest.step
    except (ValueError, CheckpointError):
        return None


def _previous(loaded: Loaded, updates: int) -> tuple[dict[str, Tensor], int] | None:
    """The agent's tensors in the checkpoint before this one, and the updates since; None without any."""
    try:
        tensors = CheckpointStore.load(max(_older(loaded)), segments=False).tensors("agent")
    except (ValueError, CheckpointError):
        return None
    since = updates - int(tensors["updates"])
    return (tensors, since) if since > 0 else None


# Of any network


def diagnose_network(
    module: nn.Module,
    make: Callable[[], nn.Module],
    states: States,
    *,
    target: Tensor | None = None,
    profile: Profile = PLAIN,
    probe_steps: int = 300,
    seed: int = 0,
    subject: str = "network",
) -> Report:
    """A network of whatever library, on states of its own.

    Args:
        module: takes the states as positional arguments; its outputs are (rows, …), the first of them if several.
        make: a new network of the same sizes, initialised from torch's random stream.
        states: inputs, rows first.
        target: what the squared error is against, as the outputs; None: nothing that needs a loss is measured.
        profile: which metrics are informative.
        probe_steps: of the trainability probe; 0: none.
        seed: of the fresh network and of the probe.
        subject: what it is, for the report.

    Raises:
        ConfigurationError: no hidden layer can be read, or there are too few rows for ranks.
    """

    def fresh(key: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key)
            return make()

    if profile is PLAIN and running_means(module):
        profile = Profile("plain with batch norm", {})  # whose running statistics can lag
    optimizer = torch.optim.Adam(module.parameters())  # never stepped: the probe has its own
    patient = Patient("network", module, optimizer, fresh, states=states, output=_first_output)
    other = fresh(seed)
    reestimate(patient, other)
    batch = Rows(states, target)
    found = _metrics(_subject(module, batch, profile), _subject(other, batch, profile), batch, seed)
    probed = probe(patient, states, seed, probe_steps) if probe_steps else None
    unavailable = {} if target is not None else {"gradients, curvature": "there is no target that a loss could have"}
    return Report(subject, len(states[0]), (Diagnosis("network", found, probed),), unavailable)


@dataclass(frozen=True)
class Rows:
    """States and targets of some rows."""

    states: States
    target: Tensor | None


def _first_output(module: nn.Module, states: States, training: bool) -> Tensor:
    module.train(training)
    found = module(*states)
    output: Tensor = found[0] if isinstance(found, tuple | list) else found
    return output.flatten(1) if output.dim() > 1 else output


def _subject(module: nn.Module, batch: Rows, profile: Profile) -> Subject:
    def run(rows: Rows) -> Tensor:
        return _first_output(module, rows.states, False)

    def loss(rows: Rows) -> Tensor:
        assert rows.target is not None
        return (run(rows) - rows.target).square().mean()

    read = ModuleReader(module, run)
    try:
        last = list(read(batch))[-1]
    except ConfigurationError:  # no activation modules: perhaps calls of functions
        read = ModuleReader(module, run, functional=True)
        last = list(read(batch))[-1]
    return Subject(
        "network",
        module,
        read,
        profile=profile,
        loss=loss if batch.target is not None else None,
        output=lambda rows: run(rows).reshape(-1)[0],
        rank_layers=[last],
    )


# Of both


def _metrics(
    subject: Subject,
    fresh: Subject,
    batch: Any,  # noqa: ANN401 - inputs of an agent, or `Rows`
    seed: int,
    initial: Past | None = None,
    previous: Past | None = None,
) -> tuple[Metric, ...]:
    """All tiers of a network, beside a fresh one on the same batch."""
    cut: Callable[[Any, int, int], Any] = subjects.rows_of if isinstance(batch, Inputs) else _rows_of
    rows = len(batch.reward if isinstance(batch, Inputs) else batch.states[0])
    each = rows // MICRO_BATCHES
    parts = [cut(batch, start, start + each) for start in range(0, each * MICRO_BATCHES, each)]
    samples = [cut(batch, row, row + 1) for row in range(min(SAMPLES, rows))]
    found: list[Metric] = []
    for tier in TIERS:
        given: dict[str, Any] = (
            {"micro_batches": parts, "samples": samples, "seed": seed} if tier == "expensive" else {}
        )
        now = measure(subject, batch, tier, initial=initial, previous=previous, **given)
        then = measure(fresh, batch, tier, **given)
        found += _beside(subject, tier, now, then)
    return tuple(found)


def _beside(subject: Subject, tier: Tier, now: Mapping[str, float], then: Mapping[str, float]) -> Sequence[Metric]:
    reasons = uninformative(subject, now)
    metrics = []
    for key, value in now.items():
        if key.endswith("_worst"):
            continue
        _, _, layer, name = key.split("/")
        metrics.append(Metric(layer, name, tier, value, now.get(f"{key}_worst"), then.get(key), reasons.get(key)))
    return metrics


def _rows_of(batch: Rows, start: int, stop: int) -> Rows:
    target = None if batch.target is None else batch.target[start:stop]
    return Rows(tuple(states[start:stop] for states in batch.states), target)
