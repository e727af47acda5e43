"""The fit and the projection of `benchmarks/messages.py`."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module("messages")


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_the_fit_finds_the_latency_and_bandwidth_of_a_ring_that_is_one(messages: ModuleType, ranks: int) -> None:
    """Time as it passes: 2 (W - 1) rounds in each of which every rank sends a W-th of the tensor to its neighbour."""
    latency, bandwidth = 20e-6, 3e9
    times = [sum(latency + size / ranks / bandwidth for _ in range(2 * (ranks - 1))) for size in messages.SIZES]
    assert messages.fitted(messages.SIZES, times, ranks) == pytest.approx((latency, bandwidth))
    assert messages.ring(messages.SIZES[-1], ranks, latency, bandwidth) == pytest.approx(times[-1])


def test_the_messages_of_an_update_are_as_long_as_the_documentation_says(messages: ModuleType) -> None:
    critic, actor = messages.message_bytes(256, 128)
    assert critic == pytest.approx(9.39e6 * 1.010, rel=2e-3) and actor == pytest.approx(1.26e6 * 1.010, rel=6e-3)
    rows = messages.projected([messages.Link("slow", (4,), 0.0, 1e6, "")])
    assert rows[0]["published_us"] == pytest.approx(1.5 * (critic + actor / 2), rel=1e-6)


def test_a_table_has_a_row_for_every_link_and_number_of_ranks(messages: ModuleType) -> None:
    lines = messages.table(messages.projected(messages.PUBLISHED)).splitlines()
    assert len(lines) == 2 + sum(len(link.ranks) for link in messages.PUBLISHED)
    assert len({line.count("|") for line in lines}) == 1
