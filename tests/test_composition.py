"""Every way to get the command line wrong ends with one sentence and the nearest valid name."""

from __future__ import annotations

import re

import pytest
from small_runs import run

from rlplastic.composition import GROUPS, choices_of, compose, in_hydra_grammar, refuse_unknown
from rlplastic.envs.catalogue import EXAMPLES, FAMILIES
from rlplastic.errors import ConfigurationError
from rlplastic.machine import Machine
from rlplastic.presets import resolve


def machine() -> Machine:
    return Machine("a processor", 2, "2.13.0", "cpu", "cpu", True, "/usr/bin/g++")


MISTAKES = [
    ("sed=3", "unknown key 'sed'; did you mean 'seed'"),
    ("agent.gama=0.9", "did you mean 'agent.gamma'"),
    ("env=humanod", "env=humanod is not a choice of env; did you mean 'humanoid'"),
    ("agent=ppo", "agent=ppo is not a choice of agent; valid names: flashsac, sac"),
    ("monitor=act", "monitor=act is not a choice of monitor"),
    ("preset=paper", "did you mean 'paper_"),
    ("seed=abc", "seed=abc was refused; expected a whole number"),
    ("overlap=perhaps", "overlap=perhaps was refused; expected true or false"),
    ("monitor.ladder=redo", "monitor.ladder=redo was refused; expected a list in brackets"),
    ("env.num_envs=2.5", "env.num_envs=2.5 was refused"),
    ("replay_ratio=true", "replay_ratio=true was refused"),
    ("max_minutes=soon", "max_minutes=soon was refused; expected a number"),
    ("humanoid", "'humanoid' is not of the form key=value"),
    ("env={", "env={"),
    ("enviroment=hopper", "unknown key 'enviroment'; did you mean 'env'"),
    ("preset=fast", "did you mean 'auto'? valid names: auto, debug, paper_cpu, paper_gpu"),
    ("~agent", "'~agent' would leave out a part that every run needs"),
    ("~seed", "expected key=value"),
    ("env=env_schema", "env=env_schema is not a choice of env"),
    ("agent=sac_schema", "agent=sac_schema is not a choice of agent; did you mean 'sac'"),
    ("critic=null", "critic=null is not a choice of critic; valid names: categorical, flow, scalar"),
    ("agent.layer_norm=true", "agent.layer_norm=true is a setting of agent=sac, but this run has agent=flashsac"),
    ("critic=scaler", "critic=scaler is not a choice of critic; did you mean 'scalar'"),
    ("env=[hopper,ant]", "env=[hopper,ant] is not a choice of env; did you mean 'hopper'"),
]


@pytest.mark.parametrize(("override", "sentence"), MISTAKES)
def test_a_mistake_in_an_override_is_explained_in_one_sentence(override: str, sentence: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        compose([override])
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["agent.num_blocks=3"], "agent.num_blocks=3 is a setting of agent=flashsac, but this run has agent=sac"),
        (
            ["critic.num_atoms=3"],
            "critic.num_atoms=3 is a setting of critic=categorical, but this run has critic=scalar",
        ),
        (["preset=paper_cpu"], "preset=paper_cpu sets agent.noise_per_env, which is a setting of agent=flashsac"),
        (["agent.layer_nrm=true"], "did you mean 'agent.layer_norm'"),
    ],
)
def test_a_setting_of_another_agent_is_refused_with_the_agent_that_has_it(overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        compose(["agent=sac", *overrides])
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["critic=flow", "critic.noise=loud"], "critic.noise='loud' is not a choice; valid names: bank, fresh"),
        (["critic=flow", "critic.coverage=2"], "critic.coverage=2.0 is out of range; expected at most 1"),
        (["critic=flow", "critic.steps=0"], "critic.steps=0 is out of range"),
        (["critic.target_noise=-1"], "critic.target_noise=-1.0 is out of range; expected a number of 0 or more"),
        (["agent=sac", "precision=bf16"], "precision=bf16 does not go with agent=sac"),
        (["agent=sac", "agent.name=flashsac"], "expected agent=flashsac instead"),
        (["agent=sac", "agent.weight_decay=-1"], "agent.weight_decay=-1.0 is out of range"),
        (["agent=sac", "agent.actor_depth=0"], "agent.actor_depth=0 is out of range"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_sentence(overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        resolve(compose(overrides), machine())
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_an_agent_brings_its_critic_and_the_order_of_the_words_does_not_matter() -> None:
    for overrides in (["agent=sac"], ["critic=scalar", "agent=sac"], ["agent=sac", "critic=scalar"]):
        config = compose(overrides)
        assert (config.agent.name, config.critic.kind) == ("sac", "scalar")
    assert compose([]).critic.kind == "categorical"


@pytest.mark.parametrize(("critic", "scaled"), [("scalar", False), ("categorical", True), ("flow", True)])
def test_any_agent_takes_any_critic_and_rewards_are_scaled_where_values_have_bounds(critic: str, scaled: bool) -> None:
    config, _ = resolve(compose(["agent=sac", f"critic={critic}"]), machine())
    assert (config.critic.kind, config.agent.reward_scaling) == (critic, scaled)
    config, _ = resolve(compose([f"critic={critic}"]), machine())
    assert (config.critic.kind, config.agent.reward_scaling) == (critic, True)
    asked, _ = resolve(compose(["agent=sac", f"critic={critic}", "agent.reward_scaling=false"]), machine())
    assert asked.agent.reward_scaling is False


OUT_OF_RANGE = [
    "env.num_envs=0",
    "env.num_envs=-4",
    "replay.capacity=0",
    "replay.batch_size=-1",
    "agent.critic_width=0",
    "agent.n_step=0",
    "agent.gamma=1.0",
    "agent.target_rate=0",
    "critic.num_atoms=1",
    "seed=-1",
    "replay_ratio=0",
    "replay_ratio=fast",
    "replay_ratio=nan",
    "env_steps=0",
    "max_minutes=-1",
    "checkpoint.keep=0",
    "evaluation.every=-5",
    "precision=float8",
    "compile=maybe",
    "env.autoreset=sometimes",
    "replay.observation_dtype=int4",
    "resume=partly",
]


@pytest.mark.parametrize("override", OUT_OF_RANGE)
def test_a_value_out_of_range_names_its_key(override: str) -> None:
    with pytest.raises(ConfigurationError, match=override.partition("=")[0].replace(".", r"\.")):
        resolve(compose([override]), machine())


def test_a_batch_larger_than_the_replay_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"batch_size=512 is larger than replay\.capacity=100"):
        resolve(compose(["replay.batch_size=512", "replay.capacity=100"]), machine())


def test_a_minimum_that_the_replay_never_reaches_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="learning would never start"):
        resolve(compose(["replay.minimum=5000", "replay.capacity=1000"]), machine())


def test_environment_options_need_no_plus_sign() -> None:
    assert compose(["env.kwargs.frame_skip=2"]).env.kwargs == {"frame_skip": 2}


def test_an_odd_choice_in_a_sweep_is_named_alone() -> None:
    with pytest.raises(ConfigurationError, match=r"^env=env_schema is not a choice of env"):
        refuse_unknown(["env=hopper,env_schema"])
    refuse_unknown(["env=hopper,ant", "env=choice(hopper,ant)", "env='hopper'"])


@pytest.mark.parametrize("group", GROUPS)
def test_every_choice_of_every_group_composes(group: str) -> None:
    names = choices_of(group)
    assert names
    for name in names:
        compose([f"{group}={name}", *([f"env.task={EXAMPLES[name]}"] if name in EXAMPLES else [])])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_without_a_task_is_refused_with_an_example_that_composes(family: str) -> None:
    with pytest.raises(ConfigurationError, match=f"env={family} is a family") as caught:
        compose([f"env={family}"])
    (example,) = re.findall(r"env\.task=\S+$", str(caught.value))
    assert compose([f"env={family}", example]).env.task == EXAMPLES[family]


def test_help_all_lists_the_choices_that_can_be_made_and_no_schema() -> None:
    shown = run("--help", "all")
    assert shown.returncode == 0 and "schema" not in shown.stdout
    for group in GROUPS:
        assert f"\n{group}: {', '.join(choices_of(group))}\n" in shown.stdout
    assert "env_steps: null" in shown.stdout


def test_published_settings_are_exactly_the_published_table() -> None:
    for preset, expected in {
        "paper_cpu": (1, 512, 1.0, 1_000_000, 10_000, "float32"),
        "paper_gpu": (1024, 2048, 2 / 1024, 10_000_000, 100_000, "bf16"),
    }.items():
        config, _ = resolve(compose([f"preset={preset}"]), machine())
        replay = config.replay
        assert (
            config.env.num_envs,
            replay.batch_size,
            config.replay_ratio,
            replay.capacity,
            replay.minimum,
            config.precision,
        ) == expected
        assert (config.agent.critic_width, config.agent.actor_width, config.agent.num_blocks) == (256, 128, 2)
        assert (config.schedule.kind, config.agent.n_step, config.agent.actor_every) == ("horizon", 1, 2)
        assert not config.overlap  # published: act, step, store, update, one after the other


def test_the_default_name_of_a_run_can_be_given_although_it_has_an_equals_sign() -> None:
    config = compose(["init_from=runs/hopper_flashsac_seed0_preset=debug", "name=a=b", "runs='x=y'"])
    assert (config.init_from, config.name, config.runs) == ("runs/hopper_flashsac_seed0_preset=debug", "a=b", "x=y")
    assert in_hydra_grammar(["init_from=r/a=1,r/b=2"]) == ["init_from='r/a=1','r/b=2'"]  # a sweep


def test_the_command_line_wins_over_a_preset() -> None:
    config = compose(["preset=paper_cpu", "replay.batch_size=64", "replay_ratio=2"])
    assert (config.replay.batch_size, config.replay_ratio) == (64, 2.0)


def test_a_family_brings_its_published_discount() -> None:
    for override, gamma in {"env=humanoid": 0.99, "env=go1": 0.97, "env=dog_run": 0.99}.items():
        assert resolve(compose([override]), machine())[0].agent.gamma == gamma
    myosuite = compose(["env=myosuite", f"env.task={EXAMPLES['myosuite']}"])
    assert resolve(myosuite, machine())[0].agent.gamma == 0.95
    assert resolve(compose(["env=go1", "agent.gamma=0.9"]), machine())[0].agent.gamma == 0.9


@pytest.mark.parametrize("override", ["+agent.lerning_rate=0.5", "++envv=1", "+foo=1"])
def test_a_plus_sign_does_not_smuggle_in_an_unknown_key(override: str) -> None:
    with pytest.raises(ConfigurationError, match="unknown key"):
        compose([override])


@pytest.mark.parametrize(
    "override", ["threads=100000", "env.num_envs=1000000000", "agent.n_step=99999", "agent.critic_width=1000000"]
)
def test_a_size_that_would_hang_the_machine_is_refused(override: str) -> None:
    with pytest.raises(ConfigurationError, match="expected at most"):
        resolve(compose([override]), machine())


def test_whole_numbers_may_be_written_with_an_exponent() -> None:
    assert compose(["env_steps=1e6"]).env_steps == 1_000_000
    with pytest.raises(ConfigurationError, match="seed=1e-3 was refused"):
        compose(["seed=1e-3"])
    assert compose(["agent.learning_rate=1e-3"]).agent.learning_rate == 1e-3
