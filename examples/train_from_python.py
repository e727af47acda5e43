"""Train, evaluate and use a policy, from Python.

    python examples/train_from_python.py

What one sees: a run of some seconds, with a live view in a terminal, and the return of its policy. Run it again, and
it says that the run is finished; with more `env_steps` it goes on where it stopped. `preset=debug` is for trying out:
without it, widths, batch and pace are those for this machine.
"""

from __future__ import annotations

import numpy as np

import rlplastic


def main(runs: str = "runs") -> float:
    """The mean return of one more episode in each of two environments."""
    result = rlplastic.train_agent(["env=pendulum", "preset=debug", f"runs={runs}", "name=from_python"])
    assert result.evaluation is not None
    print(f"{result.path}: {result.evaluation.mean:.1f}, 95 % interval {result.evaluation.ci95}")
    policy = rlplastic.load_policy(result.path)
    envs = rlplastic.make_envs(policy.env, seed=1, role="eval", num_envs=2)
    observation, returns = envs.reset(), np.zeros(2)
    for _ in range(envs.max_episode_steps or 200):
        envs.send(policy.act(observation))
        observation, reward, *_ = envs.receive()
        returns += reward
    envs.close()
    return float(returns.mean())


if __name__ == "__main__":
    print(f"another episode each: {main():.1f}")
