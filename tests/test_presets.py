"""Open settings are chosen from the hardware, with a reason, once."""

from __future__ import annotations

import dataclasses

import pytest

from rlplastic.composition import compose
from rlplastic.errors import ConfigurationError
from rlplastic.machine import Machine, machine_from, probe_machine
from rlplastic.presets import resolve


def machine(**changes: object) -> Machine:
    base = Machine("a processor", 2, "2.13.0", "cpu", "cpu", True, "/usr/bin/g++")
    return dataclasses.replace(base, settings={}, **changes)  # type: ignore[arg-type]


def test_nothing_stays_open_and_every_choice_has_a_reason() -> None:
    config, choices = resolve(compose([]), machine())
    assert config.max_minutes == 10.0 and config.env_steps is None
    for key in ("num_envs", "threads"):
        assert getattr(config.env, key) is not None
    assert None not in (config.replay.capacity, config.replay.minimum, config.replay.batch_size, config.replay_ratio)
    assert None not in (config.agent.critic_width, config.agent.actor_width, config.agent.gamma)
    assert "auto" not in (config.device, config.precision, config.compile)
    assert all(choice.value and choice.reason for choice in choices)


def test_a_step_budget_alone_sets_no_time_limit() -> None:
    config, _ = resolve(compose(["env_steps=1000"]), machine())
    assert (config.env_steps, config.max_minutes) == (1000, None)


def test_compilation_needs_a_compiler_and_a_budget_that_pays_for_it() -> None:
    assert resolve(compose([]), machine())[0].compile == "on"
    assert resolve(compose([]), machine(compiler=None))[0].compile == "off"
    assert resolve(compose(["max_minutes=1"]), machine())[0].compile == "off"
    assert resolve(compose(["compile=on", "max_minutes=1"]), machine())[0].compile == "on"


def test_bfloat16_follows_the_hardware_unless_asked() -> None:
    assert resolve(compose([]), machine())[0].precision == "bf16"
    assert resolve(compose([]), machine(bf16_hardware=False))[0].precision == "float32"
    assert resolve(compose(["precision=float32"]), machine())[0].precision == "float32"
    assert resolve(compose(["precision=tf32"]), machine(device="cuda", device_gigabytes=40.0))[0].precision == "tf32"
    with pytest.raises(ConfigurationError, match="precision=tf32 is a format of NVIDIA GPUs, but device=cpu"):
        resolve(compose(["precision=tf32"]), machine())


def test_choices_of_an_earlier_start_are_reused_even_if_the_budget_changed() -> None:
    first = machine()
    before, _ = resolve(compose(["env_steps=2000"]), first)
    again = machine(cores=64)
    again.settings = first.settings
    after, choices = resolve(compose(["env_steps=500000"]), again)
    assert (after.replay, after.threads, after.compile) == (before.replay, before.threads, before.compile)
    warned = {choice.what for choice in choices if choice.warning}
    sizes = {"agent.critic_width", "agent.actor_width", "agent.learning_rate", "agent.target_rate"}
    assert warned == {"threads", "compile", "replay.minimum"} | sizes | {
        "replay.batch_size",
        "env.threads",
    }


def test_rates_are_the_published_ones_where_the_rest_is_published() -> None:
    def rates(*overrides: str, **changes: object) -> tuple[float | None, float | None]:
        agent = resolve(compose(list(overrides)), machine(**changes))[0].agent
        return agent.learning_rate, agent.target_rate

    assert rates() == (3e-3, 0.03) and rates("agent.learning_rate=1e-3") == (1e-3, 0.03)
    assert rates("preset=paper_cpu") == rates("preset=paper_gpu") == (3e-4, 0.01)
    assert rates(cores=64) == rates(device="cuda", device_gigabytes=40.0) == (3e-4, 0.01)
    assert rates("agent=sac") == (3e-4, 0.005)


def test_the_replay_does_not_depend_on_the_budget() -> None:
    capacities = {resolve(compose([f"env_steps={steps}"]), machine())[0].replay.capacity for steps in (300, 10**7)}
    assert capacities == {1_000_000}


def test_a_small_gpu_gets_a_replay_that_fits() -> None:
    def capacity(gigabytes: float) -> int | None:
        gpu = machine(device="cuda", device_name="a GPU", device_gigabytes=gigabytes)
        return resolve(compose(["device=cuda"]), gpu)[0].replay.capacity

    assert (capacity(12.0), capacity(80.0)) == (1_000_000, 10_000_000)


def test_cadences_follow_the_number_of_environments() -> None:
    config, _ = resolve(compose(["env.num_envs=1024"]), machine())
    assert config.tracking.every == 102_400
    assert config.evaluation.every == config.checkpoint.every == 2_048_000
    config, _ = resolve(compose(["env_steps=100000"]), machine())
    assert (config.tracking.every, config.evaluation.every, config.checkpoint.every) == (1000, 5000, 10_000)


def test_machines_are_compared_by_what_changes_bits() -> None:
    assert machine().differs_from(machine(cores=64)) == []
    assert machine().differs_from(machine(torch="2.14.0")) == ["torch: 2.13.0 -> 2.14.0"]


def test_a_machine_survives_json_and_an_incomplete_one_is_refused() -> None:
    assert machine_from(dataclasses.asdict(machine())) == machine()
    with pytest.raises(ConfigurationError, match=r"machine\.json"):
        machine_from({"cores": 2})


@pytest.mark.parametrize("device", ["tpu", "cuda:99", "meta"])
def test_a_device_that_is_not_there_is_refused_with_advice(device: str) -> None:
    with pytest.raises(ConfigurationError, match=device):
        probe_machine(device)


def test_small_budgets_keep_the_random_phase_small() -> None:
    config, _ = resolve(compose(["env_steps=10000"]), machine())
    assert config.replay.minimum is not None and config.replay.minimum <= 1000
