"""TensorBoard's event files, in TensorFlow's record format: length, its CRC, content, its CRC.

Whole records are appended by the caller's thread. TensorBoard's own writer writes from another one, where a full disk
ends in a traceback and in events that are lost.
"""

from __future__ import annotations

import importlib
import io
import itertools
import math
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlplastic.record_files import RecordFiles, writing
from rlplastic.writers import HISTOGRAM_BINS

MAX_GIF_FRAMES = 300
"""Frames of a video shown in TensorBoard, which holds images in memory; longer videos are thinned out evenly."""


class TensorBoard:
    """A `Writer` into a new event file; what it writes waits in ``files`` until these are written.

    Args:
        directory: of the run.
        files: where records are added.
        layout: of the custom-scalars page, as TensorBoard's own writer takes it.

    Raises:
        LogWriteError: the directory cannot be written.
    """

    def __init__(self, directory: Path, files: RecordFiles, layout: Mapping[str, Any]) -> None:
        self._files = files
        with writing(directory):
            self._path = _new_event_file(directory)
        self._event(file_version="brain.Event:2")
        self._event(summary=_torch_summaries().custom_scalars(layout))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Points of curves."""
        points = [{"tag": name, "simple_value": float(value)} for name, value in values.items()]
        self._event(step=step, summary={"value": points})

    def text(self, tag: str, markdown: str, step: int) -> None:
        """A text in the text tab."""
        self._event(step=step, summary=_torch_summaries().text(tag, markdown))

    def histograms(self, step: int, values: Mapping[str, NDArray[np.float32]]) -> None:
        """Distributions, in the histogram tab."""
        for name, array in values.items():
            self._event(step=step, summary=_torch_summaries().histogram(name, array, HISTOGRAM_BINS))

    def video(self, tag: str, film: Path, step: int) -> None:
        """A film as an animation in the image tab, at its own speed."""
        import imageio.v3

        about = imageio.v3.immeta(film, plugin="FFMPEG")
        stride = max(1, math.ceil(about["fps"] * about["duration"] / MAX_GIF_FRAMES))
        frames = list(itertools.islice(imageio.v3.imiter(film, plugin="FFMPEG"), 0, None, stride))
        height, width = frames[0].shape[:2]
        # SummaryWriter.add_video wants moviepy; the event it would write is an image whose bytes are a GIF.
        gif = _gif(frames, about["fps"] / stride)
        picture = {"height": height, "width": width, "colorspace": 3, "encoded_image_string": gif}
        self._event(step=step, summary={"value": [{"tag": tag, "image": picture}]})

    def close(self, completed: bool) -> None:
        """Nothing is left open."""

    def hyperparameters(self, step: int, settings: Mapping[str, Any], metric: str) -> None:
        """What the HParams tab compares runs by; of several in a run it shows the first."""
        plain = {key: value if type(value) in (int, float) else str(value) for key, value in settings.items()}
        for summary in _torch_summaries().hparams(plain, {metric: 0.0}):  # the names of metrics count, not the values
            self._event(step=step, summary=summary)

    def _event(self, step: int = 0, **content: Any) -> None:  # noqa: ANN401 - fields of a protocol buffer
        protocol = importlib.import_module("tensorboard.compat.proto.event_pb2")
        records = importlib.import_module("tensorboard.summary.writer.record_writer")
        record = io.BytesIO()
        event = protocol.Event(wall_time=time.time(), step=int(step), **content)
        records.RecordWriter(record).write(event.SerializeToString())
        self._files.add(self._path, record.getvalue())


def _gif(frames: list[NDArray[np.uint8]], frames_per_second: float) -> bytes:
    from PIL import Image

    first, *rest = (Image.fromarray(frame) for frame in frames)
    target = io.BytesIO()
    milliseconds = max(20, round(1000 / frames_per_second))  # browsers slow down anything faster
    first.save(target, "GIF", save_all=True, append_images=rest, duration=milliseconds, loop=0)
    return target.getvalue()


def _torch_summaries() -> Any:  # noqa: ANN401 - a module without types
    return importlib.import_module("torch.utils.tensorboard.summary")  # takes a second, and most commands never log


def _new_event_file(directory: Path) -> Path:
    """An empty file; TensorBoard reads those of a directory in the order of their names."""
    stem, number = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}", 0
    while (path := directory / f"{stem}.{number}").exists():
        number += 1
    path.touch()
    return path
