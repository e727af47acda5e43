"""How old the policy that acts is, and the newest transition that an update may draw, with and without `overlap`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from small_runs import SMALL
from torch import Tensor

from rlplastic.agents import make_agent
from rlplastic.checkpoint import CheckpointStore
from rlplastic.composition import compose
from rlplastic.loop import advance
from rlplastic.machine import probe_machine
from rlplastic.presets import resolve
from rlplastic.run_directory import RunDirectory
from rlplastic.session import build

ENVS, MINIMUM, TURNS = 4, 200, 120


@pytest.mark.parametrize(("overlap", "lag"), [("true", 1), ("false", 0)])
def test_the_policy_that_acts_is_one_vector_step_old_with_overlap_and_the_newest_without(
    tmp_path: Path, overlap: str, lag: int
) -> None:
    overrides = [*SMALL, f"env.num_envs={ENVS}", f"replay.minimum={MINIMUM}", "replay_ratio=0.75"]
    config, _ = resolve(compose([*overrides, "env.rebuild_every=1000", f"overlap={overlap}"]), probe_machine("cpu"))
    acted_after: list[int] = []
    stored: list[tuple[int, int]] = []
    with RunDirectory.open(tmp_path, "run", {}) as directory:
        session = build(config, directory, partial(make_agent), CheckpointStore(directory.path / "checkpoints", 1))
        agent = session.agent
        explore, update = agent.explore, agent.update

        def watched_explore(observation: Mapping[str, NDArray[np.float32]], *rest: object) -> NDArray[np.float32]:
            acted_after.append(agent.updates)
            return explore(observation, *rest)  # type: ignore[arg-type]

        def watched_update(*arguments: object) -> dict[str, Tensor]:
            stored.append((len(acted_after), int(session.replay.written[0])))
            return update(*arguments)  # type: ignore[arg-type]

        agent.explore, agent.update = watched_explore, watched_update  # type: ignore[method-assign, assignment]
        session.watch.start()
        for _ in range(TURNS):
            advance(session)
        session.envs.close()

    def owed(vector_steps: int) -> int:
        return int(0.75 * max(ENVS * vector_steps - MINIMUM, 0))

    assert acted_after == [owed(turn - lag) for turn in range(TURNS)]
    assert acted_after[-1] > 100
    # During turn t (from 1) the newest row is that of step t without overlap, and of the step before with it.
    assert {turn - rows for turn, rows in stored} == {lag}
