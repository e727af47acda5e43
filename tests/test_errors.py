"""Hints: the name that was meant comes first, and few valid names are all told."""

from __future__ import annotations

import pytest

from rlplastic.errors import nearest

PRESETS = ("auto", "debug", "paper_cpu", "paper_gpu")
KEYS = ("agent", "agent.gamma", "critic", "env", "env.num_envs", "env.task", "evaluation.every", "seed", "threads")


@pytest.mark.parametrize(
    ("given", "valid", "meant"),
    [
        ("humanod", ("hopper", "humanoid", "humanoid_run", "go1", "g1", "h1", "ant"), "humanoid"),
        ("ANT", ("ant", "Pusher", "Reacher", "h1", "g1", "go1", "t1"), "ant"),
        ("enviroment", KEYS, "env"),
        ("seeds", KEYS, "seed"),
        ("agents.gamma", KEYS, "agent.gamma"),
        ("agent.gama", KEYS, "agent.gamma"),
        ("walker", ("walker2d", "walker_run", "pusher", "reacher", "swimmer", "hopper", "ant"), "walker2d"),
    ],
)
def test_the_name_that_was_meant_is_the_first_of_the_near_ones(given: str, valid: tuple[str, ...], meant: str) -> None:
    assert nearest(given, valid).startswith(f"did you mean {meant!r}")


def test_few_valid_names_are_all_told_beside_the_near_ones() -> None:
    assert nearest("fast", PRESETS) == "did you mean 'auto'? valid names: auto, debug, paper_cpu, paper_gpu"
    assert nearest("paper", PRESETS).startswith("did you mean 'paper_cpu' or 'paper_gpu'? valid names: auto, debug,")
    assert nearest("xyz", PRESETS) == "valid names: auto, debug, paper_cpu, paper_gpu"


def test_many_valid_names_are_not_listed_beside_near_ones() -> None:
    many = [f"task{number:02d}" for number in range(20)]
    assert "valid names" not in nearest("tusk07", many)
    assert nearest("xyz", many).endswith("task11 and 8 more")


def test_nothing_is_listed_twice_or_invented() -> None:
    assert nearest("falshsac", ["flashsac"]) == "did you mean 'flashsac'?"
    assert nearest("anything", []) == ""


def test_the_folder_of_the_names_is_shown_and_does_not_make_them_alike() -> None:
    runs = ("hopper", "ant_first", "zzz", "g1", "h1", "t1", "spot")
    assert nearest("hoper", runs, prefix="runs/") == "did you mean 'runs/hopper'?"
    assert nearest("qqqqq", runs[:2], prefix="runs/") == "valid names: runs/ant_first, runs/hopper"
