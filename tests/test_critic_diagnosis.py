"""What is told of a critic's values: returns by brute force, real runs of every kind, and what learns of a copy."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import SMALL
from torch import Tensor

from rlplastic import diagnose, train_agent
from rlplastic.agents import make_agent
from rlplastic.agents.flashsac import FlashSAC
from rlplastic.agents.flow import FlowCritic
from rlplastic.agents.sac import SAC
from rlplastic.command_line import run_verb
from rlplastic.composition import compose
from rlplastic.config import Config
from rlplastic.critic_diagnosis import EVERY, CriticReport, Truth, diagnose_critic, last_layers, truth_of, value_errors
from rlplastic.diagnosis import diagnose_run
from rlplastic.envs.base import AutoresetMode, Step
from rlplastic.machine import probe_machine
from rlplastic.presets import resolve
from rlplastic.replay import ReplayRing

ROWS, UPDATES = 48, 20
CRITICS = {
    "flow": ["critic=flow", "critic.steps=2", "critic.noises=2"],
    "categorical": ["critic=categorical"],
    "scalar": ["critic=scalar"],
}


def configured(*overrides: str) -> Config:
    config, _ = resolve(compose([*SMALL, *overrides]), probe_machine("cpu"))
    return config


def agent_of(config: Config) -> FlashSAC | SAC:
    agent = make_agent(config, {"policy": 1}, 1)
    assert isinstance(agent, FlashSAC | SAC)
    return agent


# Returns


def recorded(length: int, terminated: bool) -> tuple[ReplayRing, dict[int, float]]:
    """A replay of two columns whose observations are row numbers, and the sums of gamma^k r to each episode's end."""
    ring = ReplayRing(400, 2, {"policy": 1}, 1, AutoresetMode.NEXT_STEP)
    rng = np.random.default_rng(0)
    rewards, truth = rng.normal(size=(121, 2)).astype(np.float32), {}
    ring.begin({"policy": np.array([[0.0], [1000.0]], np.float32)})
    for step in range(120):
        inside = step % (length + 1)
        done = np.full(2, inside == length - 1)
        following = np.array([[step + 1.0], [1001.0 + step]], np.float32)
        over = done if terminated else np.zeros(2, bool)
        answer = Step({"policy": following}, rewards[step], over, done & ~over, {})
        ring.add(np.zeros((2, 1), np.float32), answer, np.full(2, inside < length))
        for column in range(2) if inside < length else ():
            rest = rewards[step : step + length - inside, column]
            truth[1000 * column + step] = float((0.99 ** np.arange(len(rest)) * rest).sum())
    return ring, truth


def test_returns_are_discounted_sums_to_the_end_of_the_episode_in_scaled_units() -> None:
    config = configured("agent=sac", "critic=scalar", "agent.reward_scaling=false")
    ring, expected = recorded(length=9, terminated=True)
    agent = agent_of(config)
    found = truth_of(config, ring, agent, ROWS, seed=0)
    assert found.bootstrapped == 0 and found.returns.shape == (ROWS,)
    rows = found.inputs.critic_observation[:, 0].long().tolist()
    assert len(set(rows)) > ROWS // 2
    # An episode that the end of the record cuts is no whole one; its rows are those after the last end.
    whole = [index for index, row in enumerate(rows) if row % 1000 < 120]
    np.testing.assert_allclose(
        found.returns[whole].numpy(), [expected[rows[index]] for index in whole], rtol=1e-4, atol=1e-5
    )


def test_what_follows_a_truncation_is_the_target_critics_word_and_the_rows_with_least_of_it_are_kept() -> None:
    config = configured("agent=sac", "critic=scalar", "agent.reward_scaling=false")
    ring, sums = recorded(length=39, terminated=False)
    agent = agent_of(config)
    with torch.no_grad():  # a critic that says 7 everywhere, and no entropy
        agent.learner.target_critic.head.weight.zero_()
        agent.learner.target_critic.head.bias.fill_(7.0)
        agent.learner.log_alpha.fill_(-math.inf)
    found = truth_of(config, ring, agent, ROWS, seed=0)
    rows = found.inputs.critic_observation[:, 0].long().tolist()
    left = [39 - row % 1000 % 40 for row in rows]
    expected = [sums[row] + 0.99**steps * 7 for row, steps in zip(rows, left, strict=True)]
    np.testing.assert_allclose(found.returns.numpy(), expected, rtol=1e-4)
    assert found.bootstrapped == pytest.approx(float(np.mean([0.99**steps for steps in left])), rel=1e-4)
    assert np.mean(left) > 30, "a quarter of the rows is kept: those far from the end"


# Values


def test_errors_are_those_of_the_members_in_standard_deviations_of_the_returns() -> None:
    config = configured("agent=sac", "critic=scalar")
    agent = agent_of(config)
    with torch.no_grad():
        agent.learner.critic.head.weight.zero_()
        agent.learner.critic.head.bias.copy_(torch.tensor([[1.0], [2.0]]))
    returns = torch.tensor([0.0, 4.0])
    inputs = truth_of(config, recorded(9, True)[0], agent, 2, 0).inputs
    found = value_errors(agent.learner.critic, Truth(inputs, returns, 0.0))
    torch.testing.assert_close(found, torch.tensor([(1 + 3 + 2 + 2) / 4 / 2]).double())


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["agent=flashsac", "critic=scalar"], ["trunk.blocks.1", "trunk.post_norm", "head"]),
        (["agent=flashsac", "critic=flow"], ["field.blocks.1", "field.post_norm", "field.head"]),
        (["agent=sac", "critic=categorical"], ["trunk.2", "head"]),
        (["agent=sac", "agent.layer_norm=true", "critic=flow"], ["field.trunk.3", "field.trunk.4", "field.head"]),
    ],
)
def test_last_layers_are_the_last_hidden_one_with_its_norms_and_the_head(
    overrides: list[str], expected: list[str]
) -> None:
    critic = agent_of(configured(*overrides)).learner.critic
    assert last_layers(critic) == expected
    names = [name for name, _ in critic.named_parameters()]
    assert all(any(name.startswith(f"{layer}.") for name in names) for layer in expected)


# Runs

Runs = Callable[[str], Path]
FLOWS = pytest.mark.parametrize("name", ["flow", pytest.param("bounded", marks=pytest.mark.slow)])
KINDS = pytest.mark.parametrize(
    "name", ["flow", "scalar", *(pytest.param(name, marks=pytest.mark.slow) for name in ("categorical", "bounded"))]
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Makes, once, a run with two checkpoints of a kind of critic: plain SAC's, or FlashSAC's bounded flow."""
    folder = tmp_path_factory.mktemp("runs")

    @functools.cache
    def make(name: str) -> Path:
        short = [*SMALL, "env_steps=500", "evaluation.every=0", f"runs={folder}", f"name={name}"]
        agent = "flashsac" if name == "bounded" else "sac"
        train_agent([*short, f"agent={agent}", *CRITICS.get(name, CRITICS["flow"])], quiet=True)
        return folder / name

    return make


@pytest.fixture(scope="module")
def reported(trained: Runs) -> Callable[[str], CriticReport]:
    @functools.cache
    def report(name: str) -> CriticReport:
        found = diagnose_run(trained(name), rows=ROWS, probe_steps=UPDATES).critic
        assert found is not None
        return found

    return report


@FLOWS
def test_a_flows_steps_are_read_and_the_oldest_checkpoint_is_the_old_copy(
    trained: Runs, reported: Callable[[str], CriticReport], name: str
) -> None:
    found = reported(name)
    flow = found.flow
    assert found.kind == "flow" and flow is not None and len(found.value_error) == 2
    oldest = min((trained(name) / "checkpoints").glob("step_*"))
    assert flow.old_step == int(oldest.name.split("_")[1])
    assert len(flow.recovery) == 3 and flow.recovery[0] == pytest.approx(found.value_error[-1], rel=1e-6)
    assert flow.recovery[-1] != flow.recovery[0]
    assert flow.curvature[0] == 0 and len(flow.curvature) == 2 and len(flow.endpoint_variance) == 2
    assert all(len(norms) == 2 and min(norms) > 0 for norms in flow.norms.values())
    assert list(flow.norms)[-1] == ("post_norm" if name == "bounded" else "trunk.3")


@KINDS
def test_critics_of_every_kind_are_asked_what_makes_sense_for_them(
    reported: Callable[[str], CriticReport], name: str
) -> None:
    found = reported(name)
    assert (found.flow is None) == (name in ("categorical", "scalar"))
    assert set(found.learning) == {"head", "all layers"}
    for errors in found.learning.values():
        assert len(errors) == UPDATES // EVERY + 1
        assert errors[0] == pytest.approx(found.value_error[-1], rel=1e-6), "they begin as the critic that is saved"
        assert errors[-1] < errors[0]
    assert len(found.noise) == len(found.magnitudes) and len(set(found.noise)) == len(found.noise)


@pytest.mark.slow
def test_the_same_question_has_the_same_answer(trained: Runs, reported: Callable[[str], CriticReport]) -> None:
    assert diagnose_run(trained("flow"), rows=ROWS, probe_steps=UPDATES).critic == reported("flow")


def test_nothing_learns_where_no_updates_are_asked_for(trained: Runs) -> None:
    critic = diagnose_run(trained("scalar"), rows=ROWS, probe_steps=0).critic
    assert critic is not None and not critic.learning and not critic.noise and critic.value_error


@pytest.mark.slow
def test_without_an_earlier_checkpoint_there_is_no_recovery_and_the_reason_is_told(tmp_path: Path) -> None:
    short = [*SMALL, "env_steps=300", "evaluation.every=0", "checkpoint.keep=1", f"runs={tmp_path}", "name=run"]
    train_agent([*short, "agent=sac", *CRITICS["flow"]], quiet=True)
    report = diagnose_run(tmp_path / "run", rows=ROWS, probe_steps=0)
    assert report.critic is not None and report.critic.flow is not None
    assert report.critic.flow.recovery == () and report.critic.flow.old_step is None
    assert report.unavailable["recovery"].startswith("there is no earlier checkpoint")


def test_the_verb_tells_it_in_table_document_and_picture(
    trained: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [f"run={trained('flow')}", f"out={tmp_path}", f"rows={ROWS}", "probe_steps=10"]
    assert run_verb(diagnose.main, command) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "values of the flow critic on 48 recent transitions" in shown
    for told in ("error after each Euler step", "error while head learns", "curvature of the path", "norm of trunk.3"):
        assert told in shown
    document = json.loads((tmp_path / "diagnosis.json").read_text())["critic"]
    assert document["every"] == EVERY and document["flow"]["recovery"] and document["learning"]["all layers"]
    assert (tmp_path / "critic.png").read_bytes().startswith(b"\x89PNG")
    assert "critic.png" in shown


def test_the_agent_is_as_it_was_after_all_of_it() -> None:
    config = configured("agent=sac", *CRITICS["flow"])
    agent = agent_of(config)
    critic = agent.learner.critic
    assert isinstance(critic, FlowCritic)
    before = {name: value.clone() for name, value in agent.state_dict().items()}
    diagnose_critic(config, recorded(9, True)[0], agent, None, ROWS, 5, 0)
    after: dict[str, Tensor] = agent.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
