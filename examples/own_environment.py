"""A Gymnasium environment of one's own: checked, then trained.

    python examples/own_environment.py

    cd examples        # or PYTHONPATH=examples: what matters is that the module can be imported
    python -m rlplastic.envs.checker env=gymnasium task=own_environment:Docking-v0
    python -m rlplastic.train env=gymnasium env.task=own_environment:Docking-v0 agent=sac env_steps=4000

What one sees: a table of what the checker tried (spaces, dtypes, resets, determinism, time limits), then a run whose
evaluations climb. Because a seeded environment does the same again, the run resumes bit for bit after kill -9.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


class Docking(gymnasium.Env[Array, Array]):
    """A cart of 1 kg between two walls is pushed to a dock at 0 and has to stand still there.

    Observation: position in m and velocity in m/s. Action: force in N. Reward: -(position^2 + 0.1 velocity^2). A step
    is 0.1 s. The episode never terminates: where rewards are negative, an end would be a way out.
    """

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        """Start within 1 m of the dock, at rest; all randomness is the seeded ``self.np_random``."""
        super().reset(seed=seed)
        self.position, self.velocity = float(self.np_random.uniform(-1, 1)), 0.0
        return self._observation(), {}

    def step(self, action: Array) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """Euler's method; the time limit comes from the registration."""
        self.velocity += 0.1 * (float(action[0]) - 0.2 * self.velocity)
        self.position += 0.1 * self.velocity
        if abs(self.position) > 2:
            self.position, self.velocity = float(np.sign(self.position)) * 2, 0.0
        return self._observation(), -(self.position**2 + 0.1 * self.velocity**2), False, False, {}

    def _observation(self) -> Array:
        return np.array([self.position, self.velocity], np.float32)


gymnasium.register("Docking-v0", entry_point=Docking, max_episode_steps=100)


def main(runs: str = "runs", *overrides: str) -> float:
    """Check, then train; the final evaluation's mean."""
    import rlplastic
    from rlplastic.envs.checker import main as check

    check(["env=gymnasium", "task=own_environment:Docking-v0"])
    task = ["env=gymnasium", "env.task=own_environment:Docking-v0", "agent=sac"]
    sizes = ["agent.critic_width=64", "agent.actor_width=64", "replay.batch_size=64"]
    run = ["env_steps=3000", "name=docking", f"runs={runs}"]
    result = rlplastic.train_agent([*task, *sizes, *run, *overrides])
    assert result.evaluation is not None
    return result.evaluation.mean


if __name__ == "__main__":
    print(f"return: {main():.2f}")
