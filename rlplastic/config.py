"""The typed schema of every setting, registered with Hydra; each field carries its sentence and its source.

Sources: [F] FlashSAC, arXiv 2604.04539; [S] SAC, arXiv 1812.05905; [Q] floq, arXiv 2509.06863.
A field that may be ``None`` is filled in by `rlplastic.presets.resolve` from the hardware and the environment, and the
choice is printed with its reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rlplastic.plasticity_config import ADAPTIVE, AdaptiveConfig, MonitorConfig

BUDGETS = ("env_steps", "max_minutes")
"""Settings that say when a run ends: a larger one continues it."""
HANDLING = (
    *("name", "runs", "fresh", "resume", "accept_machine"),
    *("evaluation", "checkpoint", "tracking", "profile", "distributed"),
)
"""Settings, or sections, that say how a run is named, kept, watched and spread, and not what it is."""


@dataclass
class RandomiseConfig:
    """Domain randomisation: [lowest, highest] of each perturbation, drawn anew for every episode; None: left alone.

    gymnasium backend only. What each one does: `rlplastic.envs.perturbation`.
    """

    observation_noise: list[float] | None = None
    """Standard deviation of noise on observations, in their units."""
    observation_delay: list[int] | None = None
    """Steps by which observations come late."""
    action_delay: list[int] | None = None
    """Steps by which actions come late."""
    friction: list[float] | None = None
    """Factor on all friction coefficients."""
    mass: list[float] | None = None
    """Factor on all masses and inertias."""
    gain: list[float] | None = None
    """Factor on the force of every actuator."""
    push: list[float] | None = None
    """Force of pushes on the root body, in weights of the robot."""


@dataclass
class EnvConfig:
    """Which task, on which backend, how many copies."""

    backend: str = "envpool"
    """`envpool`, `gymnasium` for any registered id, or `torch` for a simulator in torch."""
    task: str = "Humanoid-v5"
    """The task's name as the family spells it (`Ant-v5`, `humanoid-run`, `G1JoystickFlatTerrain`)."""
    family: str = "mujoco"
    """mujoco, dmc, playground, metaworld, myosuite, classic, gymnasium or torch: decides how `task` is looked up."""
    num_envs: int | None = None
    """Environments stepped together; None: chosen by the preset."""
    threads: int | None = None
    """Threads (envpool) that step them; None: one per core, at most one per environment."""
    device: str | None = None
    """torch backend only: where it simulates; None: where the learner is."""
    vectorization: str = "sync"
    """gymnasium backend only: `sync` steps in this process, `async` in one process per environment."""
    autoreset: str = "next_step"
    """gymnasium backend only: `next_step`, `same_step` or `disabled` (then the adapter resets finished rows itself)."""
    gamma: float = 0.99
    """Discount published for the family: 0.99, MyoSuite 0.95, Playground 0.97 [F]."""
    rebuild_every: int | None = None
    """Steps per environment after which the environments are built anew, which bounds the actions that an exact resume
    must replay; None: 20 time limits, or never where no exact resume is possible."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Passed to the backend's constructor (`env.kwargs.frame_skip=2`)."""
    randomise: RandomiseConfig = field(default_factory=RandomiseConfig)
    switch_every: int | None = None
    """gymnasium backend only: environment transitions after which the task switches; None: it never does."""
    switch: str = "friction"
    """What switches then: `friction`, or the order of `observations` or of `actions`; read with `switch_every` only."""
    switch_seed: int = 0
    """Which sequence of tasks a run goes through, whatever its `seed`: runs to be compared meet the same tasks."""
    switch_friction: list[float] = field(default_factory=lambda: [0.02, 2.0])
    """Factor on friction, drawn log-uniformly between these for every task (arXiv 2306.13812, its code)."""


@dataclass
class AgentConfig:
    """What every agent has; `agent=` chooses one of `FlashSACConfig` and `SACConfig`, which say what they add."""

    name: str
    package: str | None = None
    """Module that an agent from outside comes from, which is imported wherever its runs are read; None: one of ours."""
    critic_width: int | None = None
    """Units of each of the critic's layers; published 256 [F], and Stable-Baselines3's 256 for SAC."""
    actor_width: int | None = None
    """Units of each of the actor's layers; published 128 [F], and Stable-Baselines3's 256 for SAC."""
    gamma: float | None = None
    """Discount; None: the environment family's."""
    n_step: int = 1
    """Steps summed before bootstrapping; 1, on Isaac Lab 3 [F]."""
    learning_rate: float | None = 3e-4
    """Adam's learning rate at the first step and at the top of the cosine; 3e-4 [S, F]; None, as in `agent=flashsac`:
    chosen from the hardware."""
    target_rate: float | None = 0.01
    """The target critic moves by this fraction after every update; 0.01 [F], 0.005 [S]; None: as above."""
    actor_every: int = 1
    """The actor and the temperature learn on every `actor_every`-th update, the first included; 2 [F], 1 [S]."""
    initial_alpha: float | None = None
    """Entropy temperature at the start; 0.01 [F]; None: 0.01 where rewards are scaled, or the bonus would be all that
    values tell apart, otherwise Stable-Baselines3's 1."""
    reward_scaling: bool | None = None
    """Divide rewards by the running scale of the discounted return at sampling time; on in [F]; None: where the
    critic's values have bounds, which scalar ones have not."""
    backup_entropy: bool = True
    """Put the entropy bonus into the critic's target as published [S, F]."""


@dataclass
class FlashSACConfig(AgentConfig):
    """FlashSAC [F]; defaults are the published values."""

    name: str = "flashsac"
    num_blocks: int = 2
    """Residual blocks of each network."""
    final_learning_rate: float = 1.5e-4
    """Adam's learning rate at the end of the cosine [F]."""
    actor_every: int = 2
    initial_alpha: float | None = 0.01
    target_std: float = 0.15
    """The target entropy is that of a Gaussian with this deviation in every action dimension [F]."""
    reward_scaling: bool | None = True
    noise_repeat_max: int = 16
    """Exploration noise is held for k steps, k in 1..`noise_repeat_max`, P(k) ~ k^-2 [F]; 1 draws afresh every step."""
    noise_per_env: bool = True
    """One hold counter per environment; False is the published single counter for all [F]."""


@dataclass
class SACConfig(AgentConfig):
    """Plain SAC [S] in the settings of Stable-Baselines3; the target entropy is minus the number of actions."""

    name: str = "sac"
    critic_depth: int = 2
    """Hidden layers of the critic."""
    actor_depth: int = 2
    """Hidden layers of the actor."""
    layer_norm: bool = False
    """Layer normalisation before every ReLU."""
    weight_decay: float = 0.0
    """Decoupled weight decay of actor and critic, biases and gains included (AdamW, arXiv 1711.05101)."""
    final_learning_rate: float | None = None
    """Adam's learning rate at the end of the cosine; None: the rate is constant."""
    target_rate: float | None = 0.005


@dataclass
class CriticConfig:
    """How the critic represents a value: `critic=` chooses one of the configurations below."""

    kind: str
    num_members: int = 2
    """Critics in the ensemble; the smaller value is used [S, F]."""
    target_noise: float = 0.0
    """M: noise U[-M, M] is added to every target, in units of the scaled return, to see how a critic bears it (arXiv
    2603.04333); 0: none."""


@dataclass
class CategoricalCriticConfig(CriticConfig):
    """Probabilities over fixed atoms, cross-entropy on the projected target (C51, arXiv 1707.06887)."""

    kind: str = "categorical"
    num_atoms: int = 101
    """Atoms on the support [F]."""
    support: float = 5.0
    """The support is linspace(-support, support, num_atoms) in units of the scaled return [F]."""


@dataclass
class ScalarCriticConfig(CriticConfig):
    """One number, squared error [S]."""

    kind: str = "scalar"


@dataclass
class FlowCriticConfig(CriticConfig):
    """The end point of a flow whose velocity is learned [Q]; see docs/flow_critic.md."""

    kind: str = "flow"
    steps: int = 8
    """K, Euler steps of a reading [Q]."""
    noises: int = 8
    """m, noises of a reading, of a target (each with a next action of its own) and of the loss [Q]."""
    support: float = 5.0
    """Targets are clipped to [-support, support], in units of the scaled return; the categorical critic's [F]."""
    coverage: float = 0.1
    """kappa: noise covers this share of the support, around 0; 0.1, on one task 0.25 [Q]."""
    prediction: str = "velocity"
    """velocity, or endpoint: outputs are the path's end, which removes the benefit (an ablation) [Q]."""
    time_embedding: str = "cosines"
    """cosines: cos(k pi t), k = 0..63, as the paper says; cosine: cos(t), as its released code does; none [Q]."""
    noise: str = "fresh"
    """fresh: every reading and target draws its noises [Q]; bank: all take the same ones, in pairs z, -z."""
    target_members: str = "mean"
    """mean or min: what the target takes of the members' end points; min on one task [Q]."""
    reading: str = "distilled"
    """What the actor climbs. distilled: scalar critics regressed onto the flow's mean end point [Q]; one_step: a single
    Euler step from the bank."""
    actor_members: str = "min"
    """min or mean: what the actor climbs of the members' values [S, F]."""


VARIANTS: dict[str, dict[str, type]] = {
    "agent": {"flashsac": FlashSACConfig, "sac": SACConfig},
    "critic": {"categorical": CategoricalCriticConfig, "scalar": ScalarCriticConfig, "flow": FlowCriticConfig},
}
"""Groups whose choices have settings of their own: the schema of each choice."""


@dataclass
class ReplayConfig:
    """The replay ring."""

    capacity: int | None = None
    """Transitions kept; published 1 M on CPU simulators, 10 M on GPU simulators."""
    minimum: int | None = None
    """Transitions collected with uniform random actions before the first update; published 10 k and 100 k."""
    batch_size: int | None = None
    """Transitions per update; published 512 and 2,048."""
    observation_dtype: str = "float32"
    """float32, float16, bfloat16 or int8 (cells per dimension) storage of observations; batches are always float32."""
    device: str = "learner"
    """learner: in the learner's memory; pinned: in page-locked host memory, copied to the GPU batch by batch, the next
    one while the learner works on this one."""
    holdout: float | None = None
    """Share of whole episodes, chosen by key, that training never samples and validation can; a column's first episode
    is never one of them. None: 0.05 where `replay_ratio=adaptive` decides by their TD error, else 0."""
    half_life: int | None = None
    """Age in transitions at which a transition's weight in draws has halved ("replay decay", arXiv 2507.02712); None:
    all transitions weigh the same, as published [F]."""
    prioritised: bool = False
    """Draw in proportion to the TD error instead of uniformly (arXiv 1511.05952)."""
    priority_exponent: float = 0.6
    """alpha of prioritised replay: 0 draws uniformly, 1 in proportion (arXiv 1511.05952)."""
    importance_exponent: float = 0.4
    """beta of prioritised replay: 1 corrects the bias of the draws fully (arXiv 1511.05952, its initial value)."""


@dataclass
class ScheduleConfig:
    """What the learning-rate cosine is stretched over."""

    kind: str = "budget"
    """`budget`: the fraction of `env_steps` or `max_minutes` used, whatever the number of updates; `horizon`: a planned
    number of critic updates, which a higher replay ratio reaches earlier: from then on the rate stays at its end."""
    horizon: int = 1_000_000
    """K of the published schedule, in critic updates; only read by `horizon`."""


@dataclass
class EvaluationConfig:
    """Deterministic evaluation on environments of its own."""

    every: int | None = None
    """Environment transitions between evaluations; 0: only at the end; None: a twentieth of the step budget; without
    one 10 k, or 2,000 vector steps."""
    episodes: int = 10
    """Episodes per evaluation, one per environment."""
    final_episodes: int = 20
    """Episodes of the evaluation that ends a run; 0: there is none."""


@dataclass
class CheckpointConfig:
    """What is kept, how often."""

    every: int | None = None
    """Environment transitions between checkpoints; None: 10 k, 2,000 vector steps or a 100th of the
    replay, whichever is most, but at least ten within a step budget."""
    keep: int = 2
    """Checkpoints kept; older ones are removed after a newer one is complete."""


@dataclass
class TrackingConfig:
    """What is shown, how often."""

    every: int | None = None
    """Environment transitions between scalars in TensorBoard and lines in the terminal; None: 1,000, or 100 vector
    steps."""
    live: bool = True
    """A live view when the output is a terminal; plain lines otherwise."""
    video: bool = False
    """Record one episode as MP4 after the final evaluation."""
    writers: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Where curves, texts and films go: tensorboard, wandb, mlflow (docs/report.md); tables are written in any case."""
    project: str = "rlplastic"
    """Weights & Biases' project and MLflow's experiment."""


@dataclass
class DistributedConfig:
    """Several ranks under `torchrun`; without it nothing here is read."""

    scale_batch: bool = False
    """Every rank draws `replay.batch_size` rows, so that an update sees that many times the number of ranks; False: the
    ranks share them, and learning curves stay those of one rank."""
    bn_sync: str = "running"
    """What batch norms see of the other ranks: `running`, in their running statistics only; `forward`, in every
    normalisation too, as if one rank had the whole batch, at four more messages per layer."""
    timeout: float = 600.0
    """Seconds that a rank waits for the others before all end; longer than an evaluation takes."""


@dataclass
class PresetConfig:
    """Which rule filled in the open settings."""

    name: str = "auto"


@dataclass
class Config:
    """The whole configuration of a training run."""

    env: EnvConfig = field(default_factory=EnvConfig)
    agent: AgentConfig = field(default_factory=FlashSACConfig)
    critic: CriticConfig = field(default_factory=CategoricalCriticConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    adaptive: AdaptiveConfig = field(default_factory=AdaptiveConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    preset: PresetConfig = field(default_factory=PresetConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    seed: int = 0
    """Everything random follows from it."""
    replay_ratio: int | float | str | None = None
    """Gradient updates per environment transition, whatever the number of environments; fractions are carried over.
    `adaptive`: as `adaptive.rule` decides from measurements of the critic."""
    priming_updates: int = 0
    """Updates done on the first `replay.minimum` transitions the moment they are there, before training goes on: "heavy
    priming" (arXiv 2205.07802), which makes a network ill on purpose; 0: none."""
    env_steps: int | None = None
    """Stop after this many environment transitions; None: no limit on steps."""
    max_minutes: float | None = None
    """Stop after this many minutes of training, evaluation excluded; with neither budget given: 10 minutes."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:<index>."""
    precision: str = "auto"
    """float32; bf16: products in bfloat16, all else in float32; tf32: products in TensorFloat-32, on NVIDIA GPUs only;
    auto: bf16 where the hardware multiplies it, else float32."""
    kernels: str = "auto"
    """triton, torch, or auto: Triton on a GPU where a probe kernel runs, torch elsewhere."""
    compile: str = "auto"
    """on, off, or auto: compile the update where a compiler works and the budget pays for it."""
    cuda_graphs: bool = False
    """Record the updates of one process on a GPU as CUDA graphs and replay them: one launch per update instead of some
    three hundred; tested by a stand-in on a CPU, not yet run on a GPU."""
    threads: int | None = None
    """Threads of the learner on a CPU; None: all cores but one, which is left to the simulation."""
    overlap: bool = True
    """Step the environments while the learner learns: the policy that acts is then one vector step old, and the newest
    vector step is not sampled yet. False: one after the other, as published [F]."""
    profile: bool = False
    """Print at the end where all of the wall time went, and write it to profile.json; on a GPU every section then waits
    for the device."""
    runs: str = "runs"
    """Folder that holds run directories."""
    name: str | None = None
    """Run directory's name; None: environment, agent, seed and every override."""
    init_from: str | None = None
    """Directory of another run whose newest checkpoint this one starts from (fine-tuning)."""
    init_what: str = "actor,critic"
    """What is taken from it: `actor`, `critic` (with its target and the reward statistics), `replay`."""
    fresh: bool = False
    """Move an existing run of this name aside and start anew."""
    accept_machine: bool = False
    """Resume on another machine or torch than the run began on; bits may then differ."""
    resume: str = "exact"
    """exact: rebuild the environments and replay their actions; fresh: start new episodes on resume."""

    @property
    def first_replay_ratio(self) -> float:
        """The replay ratio that a run with this resolved configuration begins with, as a number."""
        ratio = self.adaptive.low if self.replay_ratio == ADAPTIVE else self.replay_ratio
        assert ratio is not None and not isinstance(ratio, str), "resolve the configuration first"
        return ratio


def schema(agent: str, critic: str) -> Config:
    """The defaults of an agent and a critic, for reading a written configuration of theirs.

    Raises:
        KeyError: there is no such agent or critic.
    """
    return Config(agent=VARIANTS["agent"][agent](), critic=VARIANTS["critic"][critic]())


def register() -> None:
    """Make the schemas known to Hydra; calling it again changes nothing."""
    from hydra.core.config_store import ConfigStore
    from omegaconf import MISSING

    store = ConfigStore.instance()
    # of the types that every choice of a group extends: which one it is, the choice says
    open_types = Config(agent=AgentConfig(name=MISSING), critic=CriticConfig(kind=MISSING))
    store.store(name="config_schema", node=open_types)
    for group, node in {
        "env": EnvConfig,
        "schedule": ScheduleConfig,
        "monitor": MonitorConfig,
    }.items():
        store.store(group=group, name=f"{group}_schema", node=node)
    for group, variants in VARIANTS.items():
        for name, node in variants.items():
            store.store(group=group, name=f"{name}_schema", node=node)
