"""The critic of Stable-Baselines3's SAC, watched, probed and treated while SB3 trains it.

    pip install stable-baselines3
    python examples/watch_stable_baselines3.py

What one sees: every 1,000 steps a line with metrics of the critic and its probe, and a treatment should the probe
call it ill; Pendulum does not make it ill. At the end every intervention is tried on a copy of the critic, and the
probe of each copy tells what it would have done. Nothing of SB3 is patched: a `Patient` is a view of its modules and
its optimizer.
"""

from __future__ import annotations

import torch
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback
from torch import Tensor, nn

from rlplastic.errors import ConfigurationError
from rlplastic.plasticity import ModuleReader, Subject, measure
from rlplastic.plasticity.interventions import INTERVENTIONS, shrink_and_perturb
from rlplastic.plasticity.patient import Patient, States, copy_of, hidden_layers
from rlplastic.plasticity.probe import probe

ILL = 1.5
"""A network is ill if its probe is this many times a fresh network's."""


def values(critic: nn.Module, states: States, _training: bool = False) -> Tensor:
    """Both critics' values (B, 2)."""
    return torch.cat(critic(*states), 1)


def patient_of(model: SAC, rows: int = 512) -> Patient:
    """SB3's critic on rows of its own replay."""
    assert model.replay_buffer is not None
    batch = model.replay_buffer.sample(rows)

    def fresh(key: int) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(key)
            return model.policy.make_critic()

    return Patient(
        "critic",
        model.critic,
        model.critic.optimizer,
        fresh,
        states=(batch.observations, batch.actions),
        target=model.critic_target,
        hidden=(*hidden_layers(model.critic.qf0, "qf0.", ()), *hidden_layers(model.critic.qf1, "qf1.", ())),
        head=tuple(f"{name}.4.{entry}" for name in ("qf0", "qf1") for entry in ("weight", "bias")),
        output=values,
        reader=lambda critic: ModuleReader(critic, lambda states: values(critic, states)),
        loss=lambda critic: values(critic, (batch.observations, batch.actions)).square().mean(),
    )


class Watch(BaseCallback):
    """Measures and probes; treats in place what is ill. ``ratios`` keeps the probes."""

    def __init__(self, every: int) -> None:
        super().__init__()
        self.every, self.ratios = every, list[float]()

    def _on_step(self) -> bool:
        if self.num_timesteps % self.every:
            return True
        assert isinstance(self.model, SAC)
        patient = patient_of(self.model)
        subject = Subject("critic", patient.module, patient.reader(patient.module))
        seen = measure(subject, patient.states, "forward")
        ratio = probe(patient, patient.states, key=self.num_timesteps, steps=100, functions=1).ratio
        self.ratios.append(ratio)
        told = {name: f"{seen[f'plasticity/critic/all/{name}']:.3g}" for name in ("dormant", "dead", "weight_norm")}
        print(f"step {self.num_timesteps}: {told}, probe {ratio:.2f}")
        if not ratio < ILL:
            print(shrink_and_perturb(patient, key=self.num_timesteps).evidence())
        return True


def main(steps: int = 3_000) -> tuple[list[float], dict[str, float]]:
    """Probes during training, and the probe of a copy after each intervention."""
    model = SAC("MlpPolicy", "Pendulum-v1", policy_kwargs={"net_arch": [64, 64]}, batch_size=64, seed=0, device="cpu")
    watch = Watch(every=steps // 3)
    model.learn(steps, callback=watch)
    patient = patient_of(model)
    after = {}
    for name, intervention in INTERVENTIONS.items():
        copied = copy_of(patient)
        try:
            intervention(copied, 1)
        except ConfigurationError as error:
            print(f"{name}: not for this network ({error})")
            continue
        after[name] = probe(copied, patient.states, key=0, steps=100, functions=1).ratio
        print(f"{name}: the probe of a copy would be {after[name]:.2f}")
    return watch.ratios, after


if __name__ == "__main__":
    main()
