"""What ranks agree on: messages of any length, errors that are everybody's, shares that add up."""

from __future__ import annotations

import copy
import json
import os
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import Threads, on_ranks, succeed

from rlplastic.composition import compose
from rlplastic.config import Config
from rlplastic.distributed import ALONE, Bucket, Group, joined, meet, restarts, share_of
from rlplastic.envs.base import AutoresetMode, Step
from rlplastic.envs.episodes import EpisodeStatistics
from rlplastic.errors import CheckpointWriteError, ConfigurationError, DistributedError
from rlplastic.machine import probe_machine
from rlplastic.presets import resolve
from rlplastic.session import Session


def resolved(*overrides: str) -> Config:
    config, _ = resolve(compose(["env=pendulum", "preset=debug", *overrides]), probe_machine("cpu"))
    return config


def test_documents_of_any_length_reach_all_ranks_in_order() -> None:
    documents: list[Any] = [None, {"ü": [1, 2.5, "x" * 300]}, "short"]
    assert succeed(3, lambda group: group.exchange(documents[group.rank])) == [documents] * 3


def test_what_one_rank_meets_all_raise_after_all_have_done_their_part() -> None:
    done = []

    def work(rank: int) -> str:
        done.append(rank)
        if rank == 1:
            raise CheckpointWriteError("no space")
        return "done"

    outcomes = on_ranks(3, lambda group: group.attempt(lambda: work(group.rank)))
    assert sorted(done) == [0, 1, 2] and [type(error) for error in outcomes] == [CheckpointWriteError] * 3
    assert [str(error) for error in outcomes] == ["rank 1: no space", "no space", "rank 1: no space"]
    assert succeed(2, lambda group: group.attempt(lambda: "done", group.rank == 1)) == [None, "done"]


def test_numbers_that_differ_between_ranks_stop_all_and_name_the_first() -> None:
    def compare(group: Threads) -> None:
        group.require_equal({"actor.weight": 2**62 + 1, "critic.weight": 2**62 + group.rank}, "at step 70")

    outcomes = on_ranks(2, compare)
    assert all(isinstance(error, DistributedError) for error in outcomes)
    assert all(str(error).startswith("at step 70: critic.weight differs between ranks") for error in outcomes)
    succeed(2, lambda group: group.require_equal({"actor.weight": 5}, "at step 70"))


def test_a_lone_process_gives_back_what_it_was_given_and_needs_no_torchrun() -> None:
    with joined("cpu", 1.0) as group:
        assert group is ALONE
    assert ALONE.exchange("x") == ["x"] and ALONE.total(3) == 3 and ALONE.numbers([1, 2]) == [[1, 2]]
    assert ALONE.all(True) and not ALONE.all(False)
    tensor = torch.tensor([1.0, 3.0])
    ALONE.average(tensor)
    assert tensor.tolist() == [1, 3] and ALONE.gather(tensor).tolist() == [[1, 3]]
    ALONE.require_equal({"x": 1}, "never")
    with pytest.raises(CheckpointWriteError, match=r"^no space$"):
        ALONE.attempt(lambda: (_ for _ in ()).throw(CheckpointWriteError("no space")))


def test_a_bucket_gives_means_as_views_of_one_tensor_that_begin_at_multiples_of_sixteen_bytes() -> None:
    shapes = [(3, 5), (), (7,), (2, 2)]

    def reduce(group: Threads) -> list[torch.Tensor]:
        bucket = Bucket(group.average)
        for index in range(2):
            views = bucket([torch.full(shape, float(group.rank + index)) for shape in shapes])
        assert len({view.untyped_storage().data_ptr() for view in views}) == 1
        assert all(view.storage_offset() % 4 == 0 and view.is_contiguous() for view in views)
        return views

    for views in succeed(4, reduce):
        assert [view.shape for view in views] == [torch.Size(shape) for shape in shapes]
        assert all(bool((view == 2.5).all()) for view in views)


def test_shares_add_up_and_leave_as_many_slots_per_environment_as_alone() -> None:
    config = resolved("env.num_envs=6", "replay.batch_size=18", "replay.capacity=1001", "env.threads=4")
    asked = copy.deepcopy(config)
    for size in (1, 2, 3):
        share = share_of(config, Group(size - 1, size))
        assert share.env.num_envs and share.replay.batch_size and share.replay.capacity
        assert (share.env.num_envs * size, share.replay.batch_size * size) == (6, 18)
        assert -(-share.replay.capacity // share.env.num_envs) == -(-1001 // 6)
        assert (share.replay.minimum, share.replay_ratio, share.env_steps) == (
            config.replay.minimum,
            config.replay_ratio,
            config.env_steps,
        )
    config.distributed.scale_batch = True
    assert share_of(config, Group(0, 3)).replay.batch_size == 18
    asked.distributed.scale_batch = True
    assert config == asked


@pytest.mark.parametrize(
    ("overrides", "what"), [(["env.num_envs=5"], "env.num_envs=5"), (["replay.batch_size=33"], "replay.batch_size=33")]
)
def test_what_cannot_be_dealt_out_evenly_is_refused(overrides: list[str], what: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{what} cannot be dealt out to 2 ranks; expected a multiple of 2"):
        share_of(resolved("env.num_envs=4", "replay.batch_size=32", *overrides), Group(0, 2))


def test_messages_within_a_loss_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = ["distributed.bn_sync=forward", "compile=auto", "env_steps=1000000"]
    assert resolved(*overrides).compile == "on"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert resolved(*overrides).compile == "off"
    with pytest.raises(ConfigurationError, match="compile=on does not go with"):
        share_of(resolved("distributed.bn_sync=forward", "compile=on"), Group(0, 2))


def test_a_restart_and_the_ranks_of_a_machine_are_known_from_torchruns_variables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cores = probe_machine("cpu").cores
    assert restarts() == 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(2 * cores))
    assert restarts() == 1 and probe_machine("cpu").cores == 1


def test_training_returns_are_those_of_the_episodes_of_all_ranks_each_told_once() -> None:
    """Environment e of six ends an episode of e + 1 steps, each of reward e, again and again."""
    lengths = np.arange(1, 7)

    def follow(group: Threads) -> list[Any]:
        mine = slice(2 * group.rank, 2 * group.rank + 2)
        session: Any = SimpleNamespace(episodes=EpisodeStatistics(2, AutoresetMode.SAME_STEP), group=group)
        told = []
        for t in range(1, 21):
            done = t % lengths[mine] == 0
            step = Step({}, (lengths[mine] - 1).astype(np.float32), done, np.zeros(2, bool), {})
            session.episodes.observe(step)
            if t % 10 == 0:
                told.append(Session.finished_episodes(session))
        return told

    for told in succeed(3, follow):
        for number, (returns, counted) in enumerate(told):
            ended = [int(n) for n in lengths for t in range(10 * number + 1, 10 * number + 11) if t % n == 0]
            assert sorted(counted) == sorted(ended)
            assert sorted(returns) == sorted(n * (n - 1.0) for n in ended)


def start_in(store: dist.Store, delays: dict[int, float]) -> dict[int, list[str]]:
    """What each of some of three ranks hears from all three in the corner where they meet; nothing of those that don't.

    ``delays`` are the seconds that each rank of this start waits before it begins.
    """
    heard: dict[int, list[str]] = {}

    def begin(rank: int) -> None:
        time.sleep(delays[rank])
        try:
            corner = meet(store, rank, 3, 1.0)
            corner.set(f"from {rank}", f"{rank} of {delays}")
            heard[rank] = [corner.get(f"from {other}").decode() for other in range(3)]
        except RuntimeError:
            pass

    threads = [threading.Thread(target=begin, args=(rank,)) for rank in delays]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return heard


def test_ranks_of_one_start_meet_whatever_dead_ranks_left_in_the_store() -> None:
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=0.3))
    for dead in ((0, 1), (1, 2), (2,), (0, 2)):
        assert start_in(store, dict.fromkeys(dead, 0.0)) == {}
    for delays in ({0: 0.0, 1: 0.0, 2: 0.0}, {0: 0.0, 1: 0.1, 2: 0.2}, {0: 0.2, 1: 0.1, 2: 0.0}):
        everybody = [f"{rank} of {delays}" for rank in range(3)]
        assert start_in(store, delays) == dict.fromkeys(range(3), everybody)


GLOO = """
import json, os, torch
from rlplastic.distributed import joined
from rlplastic.errors import DistributedError
with joined("cpu", 60.0) as group:
    tensor = torch.arange(3.0) + group.rank
    group.average(tensor)
    print(json.dumps([tensor.tolist(), group.exchange(["x" * group.rank]), group.total(group.rank + 1)]), flush=True)
    if group.rank:
        os._exit(0)
    try:
        group.total(1)
    except DistributedError as error:
        print(json.dumps(str(error)), flush=True)
        os._exit(0)
"""


def test_processes_meet_over_gloo_and_a_lost_rank_is_told_in_one_sentence() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", GLOO], env={**common, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True
        )
        for rank in (0, 1)
    ]
    outputs = [process.communicate(timeout=120)[0].splitlines() for process in ranks]
    assert [json.loads(lines[0]) for lines in outputs] == [[[0.5, 1.5, 2.5], [[""], ["x"]], 3]] * 2
    told = json.loads(outputs[0][1])
    assert told.startswith("rank 0 of 2 lost the others (") and "an answer within 60 s" in told
