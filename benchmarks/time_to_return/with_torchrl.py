"""SAC of TorchRL as a contender of the time_to_return grid.

    python benchmarks/time_to_return/with_torchrl.py task=Hopper-v5 minutes=3,6 seed=0 threads=2 runs=runs name=try

Settings are those that TorchRL publishes for HalfCheetah (sota-implementations/sac/config.yaml of pytorch/rl): two
hidden layers of 256 units, Adam with 3e-4, batches of 256, discount 0.99, targets kept by 0.995, 25,000 random
transitions, then 1,000 transitions and 1,000 updates in turn; no compilation, which is off there. The parts are
TorchRL's: environment, collector, replay buffer, networks, loss and target updates.
"""

from __future__ import annotations

import sys
from typing import Any

from rlplastic.benchmarking.time_to_return import Race, contend, unit_actions

OWN: dict[str, tuple[str, ...]] = {}
RANDOM, COLLECTED, BATCH, CAPACITY = 25_000, 1_000, 256, 1_000_000


def networks(env: Any) -> tuple[Any, Any]:
    """Policy and value network for a TorchRL environment."""
    from tensordict.nn import InteractionType, TensorDictModule
    from torch import nn
    from torchrl.modules import MLP, NormalParamExtractor, ProbabilisticActor, TanhNormal, ValueOperator

    spec = env.action_spec
    observations, actions = env.observation_spec["observation"].shape[-1], spec.shape[-1]

    def layers(inputs: int, outputs: int) -> MLP:
        return MLP(in_features=inputs, num_cells=[256, 256], out_features=outputs, activation_class=nn.ReLU)

    body = nn.Sequential(
        layers(observations, 2 * actions),
        NormalParamExtractor(scale_mapping="biased_softplus_1.0", scale_lb=0.1),
    )
    actor = ProbabilisticActor(
        spec=spec,
        in_keys=["loc", "scale"],
        module=TensorDictModule(body, in_keys=["observation"], out_keys=["loc", "scale"]),
        distribution_class=TanhNormal,
        distribution_kwargs={"low": spec.space.low, "high": spec.space.high, "tanh_loc": False},
        default_interaction_type=InteractionType.RANDOM,
        return_log_prob=False,
    )
    return actor, ValueOperator(module=layers(observations + actions, 1), in_keys=["action", "observation"])


def train(race: Race) -> None:
    """Until the race is over."""
    import torch
    from tensordict import TensorDict
    from torchrl.collectors import Collector
    from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
    from torchrl.envs import Compose, DoubleToFloat, GymEnv, InitTracker, RewardSum, StepCounter, TransformedEnv
    from torchrl.envs.utils import ExplorationType, set_exploration_type
    from torchrl.objectives import SACLoss, SoftUpdate

    entry = race.entry
    torch.set_num_threads(entry.threads)
    torch.manual_seed(entry.seed)
    env = TransformedEnv(
        GymEnv(entry.task, device="cpu"), Compose(InitTracker(), StepCounter(1000), DoubleToFloat(), RewardSum())
    )
    env.set_seed(entry.seed)
    actor, value = networks(env)
    low, high = (bound.numpy() for bound in (env.action_spec.space.low, env.action_spec.space.high))
    loss = SACLoss(actor, value, num_qvalue_nets=2, loss_function="l2", delay_qvalue=True, alpha_init=1.0)
    loss.make_value_estimator(gamma=0.99)
    targets = SoftUpdate(loss, eps=0.995)
    learned = (loss.actor_network_params, loss.qvalue_network_params)
    optimisers = [torch.optim.Adam(list(part.flatten_keys().values()), lr=3e-4) for part in learned]
    optimisers.append(torch.optim.Adam([loss.log_alpha], lr=3e-4))
    replay = TensorDictReplayBuffer(storage=LazyTensorStorage(CAPACITY), batch_size=BATCH, prefetch=3)
    collector = Collector(
        env, actor, init_random_frames=RANDOM, frames_per_batch=COLLECTED, total_frames=-1, device="cpu"
    )

    @torch.no_grad()
    def act(observations: Any) -> Any:
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            asked = TensorDict({"observation": torch.from_numpy(observations)}, batch_size=[len(observations)])
            return unit_actions(actor(asked)["action"].numpy(), low, high)

    steps = updates = 0
    for transitions in collector:
        steps += transitions.numel()
        replay.extend(transitions.reshape(-1))
        for _ in range(COLLECTED if steps >= RANDOM else 0):
            losses = loss(replay.sample())
            (losses["loss_actor"] + losses["loss_qvalue"] + losses["loss_alpha"]).sum().backward()
            for optimiser in optimisers:
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
            targets.step()
            updates += 1
            if race.over(steps, updates, act):
                break
        if race.over(steps, updates, act):
            break
    collector.shutdown()


if __name__ == "__main__":
    sys.exit(contend(train, OWN))
