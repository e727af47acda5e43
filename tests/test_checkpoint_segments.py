"""A checkpoint that cannot share an earlier segment says so by its own error, and saving the rows anew helps."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from rlplastic.checkpoint import CheckpointStore
from rlplastic.errors import CheckpointWriteError, SegmentMissingError

ROWS = {"observation": torch.arange(12.0).reshape(4, 3)}


@pytest.mark.parametrize("way", ["gone", "cut short"])
def test_vanished_segment_is_told_apart_and_saving_its_tensors_anew_helps(tmp_path: Path, way: str) -> None:
    store = CheckpointStore(tmp_path, 3)
    first = store.save(1, {}, {}, new_segments=[ROWS])
    path = tmp_path / "segments" / first.segments[0].name
    path.unlink() if way == "gone" else os.truncate(path, 10)
    with pytest.raises(SegmentMissingError, match=path.name) as caught:
        store.save(2, {}, {}, kept_segments=first.segments)
    assert isinstance(caught.value, CheckpointWriteError) and not list(tmp_path.glob("step_*2"))
    store.save(2, {}, {}, new_segments=[ROWS])
    loaded = CheckpointStore(tmp_path, 3).newest()
    assert loaded is not None and loaded.step == 2
    [segment] = loaded.segments()
    assert torch.equal(segment["observation"], ROWS["observation"])
