"""What the monitor reads of a run in training: that reading leaves no trace, and churn and bias against direct sums."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import SMALL, plain
from torch import Tensor, nn

from rlplastic.agents import make_agent
from rlplastic.agents.subjects import policy_mean, values
from rlplastic.checkpoint import CheckpointStore
from rlplastic.composition import compose
from rlplastic.loop import advance
from rlplastic.machine import probe_machine
from rlplastic.presets import resolve
from rlplastic.run_directory import RunDirectory
from rlplastic.session import Session, build

RUN = [override for override in SMALL if override not in ("monitor=off", "env_steps=600")]
UPDATES = 200
"""Checked; a run of `STEPS` transitions plans a few more."""
STEPS = 1_004
PROBING = ["monitor=full", "monitor.max_interventions=0", "monitor.probe_steps=5", "monitor.budget=100"]
MONITORS = {
    "watching": ["monitor=watch"],
    "probing": PROBING,
    "forbidden to treat the ill": [*PROBING, "monitor.ill=0.001", "monitor.ill_gap=-2"],
}


@contextmanager
def session_of(folder: Path, *overrides: str) -> Iterator[Session]:
    config, _ = resolve(compose([*RUN, f"env_steps={STEPS}", *overrides]), probe_machine("cpu"))
    with RunDirectory.open(folder, "run", {}) as directory:
        session = build(config, directory, partial(make_agent), CheckpointStore(directory.path / "checkpoints", 1))
        session.watch.start()
        yield session
        session.envs.close()


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()


def random_states() -> str:
    return digest(plain(torch.get_rng_state()).tobytes(), repr((np.random.get_state(), random.getstate())).encode())


def networks_of(session: Session) -> dict[str, str]:
    """Every parameter, buffer, gradient, mode and entry of an optimizer, target and temperature included."""
    learner = session.agent.learner
    found = {name: digest(plain(value).tobytes()) for name, value in session.agent.learned_state().items()}
    for name, module in (("actor", learner.actor), ("critic", learner.critic), ("target", learner.target_critic)):
        for key, value in (*module.named_parameters(), *module.named_buffers()):
            found[f"{name}.{key}"] = digest(plain(value.detach()).tobytes())
            found[f"{name}.{key}.gradient"] = str(value.grad)
            found[f"{name}.{key}.requires_grad"] = str(value.requires_grad)
        found[f"{name}.modes"] = str([part.training for part in module.modules()])
    return found


def trace(folder: Path, *overrides: str) -> tuple[list[tuple[str, str, str]], dict[str, str], list[str]]:
    """Of every update: the rows drawn and what was in them, the metrics, torch's, numpy's and Python's random states.

    And what the run ended with, and what the monitor did.
    """
    seen: list[tuple[str, str, str]] = []
    told: list[str] = []
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(7)
    with session_of(folder, *overrides) as session:
        update = session.agent.update

        def traced(batch: Any, *rest: Any) -> dict[str, Tensor]:
            drawn = digest(plain(batch.rows).tobytes(), plain(batch.reward).tobytes(), plain(batch.action).tobytes())
            metrics = update(batch, *rest)
            moved = digest(*(plain(metrics[name].detach()).tobytes() for name in sorted(metrics)))
            seen.append((drawn, moved, random_states()))
            return metrics

        session.agent.update = traced  # type: ignore[method-assign, assignment]
        while len(seen) < UPDATES:
            advance(session)
            if session.watcher is not None:
                told += [event.record["event"] for event in session.watcher.pop_events()]
        return seen, networks_of(session), told


@pytest.mark.slow
@pytest.mark.parametrize("agent", ["flashsac", "sac"])
def test_200_updates_draw_compute_and_leave_the_same_bits_whether_and_however_they_are_watched(
    tmp_path: Path, agent: str
) -> None:
    options = [f"agent={agent}", "replay.holdout=0.3"]
    updates, networks, _ = trace(tmp_path / "off", *options, "monitor=off")
    assert len(updates) == UPDATES and len({moved for _, moved, _ in updates}) == UPDATES
    for name, monitor in MONITORS.items():
        watched, left, told = trace(tmp_path / name, *options, *monitor)
        assert watched == updates, name
        assert left == networks, name
        wanted = {"watching": "measurement", "probing": "probe", "forbidden to treat the ill": "forbidden"}
        assert wanted[name] in told


@pytest.mark.parametrize(("agent", "over"), [("flashsac", 2), ("sac", 1)])
def test_churn_is_what_the_last_updates_before_a_reading_moved_on_a_batch_that_stays(
    tmp_path: Path, agent: str, over: int
) -> None:
    history: list[dict[str, Tensor]] = []
    with session_of(tmp_path, f"agent={agent}", "monitor=watch", "monitor.forward_every=10") as session:
        watcher, learner = session.watcher, session.agent
        assert watcher is not None
        after_update = watcher.after_update

        def looked(*arguments: Any) -> None:
            batch = watcher._probe_batch
            if batch is not None:
                with torch.no_grad():
                    q = values(learner, batch.critic_observation, batch.action)  # type: ignore[arg-type]
                    history.append({"actor": policy_mean(learner, batch.observation)[None], "critic": q[..., None]})  # type: ignore[arg-type]
            after_update(*arguments)

        watcher.after_update = looked  # type: ignore[method-assign]
        while learner.updates < 30:
            advance(session)
        first, *later = [event.record for event in watcher.pop_events() if event.record.get("tier") == "forward"]
    assert first["updates"] == 10 and not [name for name in first["values"] if name.endswith("churn")]
    for reading in later:
        assert reading["churn_over"] == over
        now, before = (history[reading["updates"] - 11 - lag] for lag in (0, over))
        for name in ("actor", "critic"):
            moved = (now[name] - before[name]).double().norm(dim=-1).mean(-1)
            spread = (before[name] - before[name].mean(-2, keepdim=True)).double().square().sum(-1).mean(-1).sqrt()
            expected = float((moved / spread).mean())
            assert expected > 0
            assert reading["values"][f"plasticity/{name}/all/churn"] == pytest.approx(expected, rel=1e-5)


def test_value_bias_is_the_critics_error_against_discounted_sums_of_what_was_held_out(tmp_path: Path) -> None:
    """Rewards are all -1, gamma is 1/2 and the target is 0: returns over the 5 steps that count are -1.9375.

    Only the few steps before the newest transition have shorter ones.
    """
    options = ["agent=sac", "agent.gamma=0.5", "agent.initial_alpha=1e-8", "replay.holdout=0.5"]
    with session_of(tmp_path, *options) as session:
        watcher, learner = session.watcher, session.agent.learner
        assert watcher is not None
        while session.replay.held_out < 150:
            advance(session)
        watcher.pop_events()
        session.replay.tensors.reward.fill_(-1.0)

        def bias(says: float) -> float:
            for network, value in ((learner.critic, says), (learner.target_critic, 0.0)):
                head: Any = network.head
                nn.init.zeros_(head.weight)
                nn.init.constant_(head.bias, value)
            watcher.measure("forward", session.agent.updates)
            (event,) = watcher.pop_events()
            return float(event.record["values"]["plasticity/critic/all/value_bias"])

        low, high = bias(0.0), bias(7.0)
    assert low == pytest.approx(1.0), "(0 - G) / |G|"
    assert 7.0 / (high - low) == pytest.approx(1.9375, rel=0.05)
