"""Run directories as they are read back: configuration, tables, TensorBoard scalars, the monitor's records.

Only logs are read, so a run may go on meanwhile. What is damaged is named in a warning and left out.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from glob import glob
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from rlplastic.analysis.statistics import Curve, Floats, as_curve
from rlplastic.command_line import flatten
from rlplastic.errors import ConfigurationError

Warn = Callable[[str], None]

AXES = {"step": "environment transitions", "updates": "gradient updates", "seconds": "training time"}
"""What a learning curve may be drawn over."""
EVALUATION = ("step", "updates", "return_mean")
TIMING = ("attempt", "step", "updates", "wall_seconds", "train_seconds")
"""Columns that a report cannot do without."""
CHANGES = ("committed", "scheduled", "taken_back")
"""Events of the monitor that changed the network."""
MOVED_ASIDE = re.compile(r"\.old-\d+$")
"""Names of runs that ``fresh=true`` replaced."""


@dataclass(frozen=True)
class Record:
    """A line of ``plasticity.jsonl``: what the monitor measured, suspected, tried or did."""

    event: str
    """``measurement``, ``alarm``, ``probe``, ``committed``, …"""
    step: int
    updates: int
    sentence: str
    """For people; empty for measurements."""
    values: Mapping[str, float]
    """By metric, ``<module>/<layer>/<name>``; of a probe ``<module>/all/probe_ratio``."""
    fresh: Mapping[str, float]
    """The same of networks that never learned."""


@dataclass(frozen=True)
class Run:
    """One run directory; tables are columns (rows,) by name, and empty where nothing was written yet."""

    path: Path
    config: Mapping[str, Any]
    """The resolved configuration by dotted key."""
    evaluations: Mapping[str, Floats]
    timings: Mapping[str, Floats]
    scalars: Mapping[str, Curve] = field(default_factory=dict)
    """TensorBoard's, over environment transitions."""
    records: tuple[Record, ...] = ()
    profile: Mapping[str, float] = field(default_factory=dict)
    """Seconds by section, of ``profile.json``; empty without."""
    finished: bool = False
    critic: Mapping[str, Any] = field(default_factory=dict)
    """What `rlplastic.diagnose` said of its critic, of ``diagnosis.json``; empty without."""

    @property
    def task(self) -> str:
        """Such as ``Hopper-v5``."""
        return str(self.config["env.task"])

    @property
    def seed(self) -> int:
        """What everything random in it followed from."""
        return int(self.config["seed"])

    @property
    def final_return(self) -> float:
        """Mean return of the newest evaluation."""
        return float(self.evaluations["return_mean"][-1])

    @property
    def updates(self) -> int:
        """Gradient updates so far, as last logged."""
        return int(max((table["updates"][-1] for table in (self.evaluations, self.timings) if table), default=0))

    @property
    def steps(self) -> int:
        """Environment transitions so far, as last logged."""
        return int(max((table["step"][-1] for table in (self.evaluations, self.timings) if table), default=0))

    @property
    def train_seconds(self) -> float:
        """Time of training, evaluation excluded, on the way to the newest log."""
        return float(self.clock[1][-1])

    @property
    def wall_seconds(self) -> float:
        """Time of all attempts from the first step on, lost ones included: each counts its own from zero."""
        attempts, wall = self.timings.get("attempt", np.zeros(0)), self.timings.get("wall_seconds", np.zeros(0))
        return float(sum(wall[attempts == attempt].max() for attempt in np.unique(attempts)))

    @cached_property
    def clock(self) -> Curve:
        """Seconds of training over transitions, from (0, 0); an attempt replaces what others did after its start."""
        if not self.timings:
            return np.zeros(1), np.zeros(1)
        step, attempt = self.timings["step"], self.timings["attempt"]
        kept, bound = np.zeros(len(step), bool), np.inf
        for number in np.unique(attempt)[::-1]:
            kept |= (attempt == number) & (step < bound)
            bound = min(bound, step[attempt == number].min())
        return np.append(0.0, step[kept]), np.append(0.0, self.timings["train_seconds"][kept])

    @property
    def changes(self) -> list[int]:
        """Transitions at which the task was switched, or the monitor changed a network."""
        every = self.config.get("env.switch_every")
        switches = range(int(every), self.steps, int(every)) if every else range(0)
        return sorted({*switches, *(record.step for record in self.records if record.event in CHANGES)})

    def curve(self, axis: str) -> Curve:
        """Evaluation returns over one of `AXES`."""
        x = np.interp(self.evaluations["step"], *self.clock) if axis == "seconds" else self.evaluations[axis]
        return x, self.evaluations["return_mean"]


def find_runs(patterns: str, warn: Warn) -> list[Path]:
    """Run directories that match: each pattern may be a run, a folder of runs at any depth, or a glob of either.

    Args:
        patterns: separated by commas; a name that exists is taken as it is, be there a comma in it or not.
        warn: told of runs that ``fresh=true`` moved aside: they only count when they are named in full.

    Raises:
        ConfigurationError: a pattern matches no run.
    """
    found: dict[Path, None] = {}
    for pattern in [patterns] if Path(patterns).exists() else [part.strip() for part in patterns.split(",")]:
        named = Path(pattern).exists()
        matches = [Path(pattern)] if named else [Path(match) for match in sorted(glob(pattern, recursive=True))]
        inside = [run for match in matches for run in _runs_below(match)]
        if not inside:
            raise ConfigurationError(
                f"runs={pattern} matches no run: looked for config.yaml in "
                f"{f'{len(matches)} matching paths' if matches and not named else Path(pattern).absolute()} and below; "
                "expected a run directory, a folder of them, or a glob such as runs='runs/hopper*'"
            )
        for run in inside:
            if MOVED_ASIDE.search(run.name) and not (named and run == Path(pattern)):
                warn(f"{run} was moved aside by a fresh start and is left out; name it in full to see it")
            else:
                found[run] = None
    return list(found)


def _runs_below(path: Path) -> list[Path]:
    if (path / "config.yaml").is_file():
        return [path]
    return sorted(file.parent for file in path.rglob("config.yaml") if ".hydra" not in file.parts)


def read_run(path: Path, warn: Warn) -> Run | None:
    """All that a report shows of a run; None, and a warning, if its configuration is damaged."""
    config = _reading(path / "config.yaml", warn, _configuration)
    if config is None:
        return None
    return Run(
        path,
        config,
        evaluations=_reading(path / "eval.csv", warn, partial(_table, columns=EVALUATION)) or {},
        timings=_reading(path / "timing.csv", warn, partial(_table, columns=TIMING)) or {},
        scalars=_scalars(path, warn),
        records=_reading(path / "plasticity.jsonl", warn, _records) or (),
        profile=_reading(path / "profile.json", warn, _profile) or {},
        finished=_finished(path),
        critic=_reading(path / "diagnosis.json", warn, _critic) or {},
    )


def _reading(path: Path, warn: Warn, read: Callable[[Path], Any]) -> Any:  # noqa: ANN401 - whatever `read` gives
    """What ``read`` makes of a file; None without the file, or with a warning where it is damaged."""
    if not path.exists():
        return None
    try:
        return read(path)
    except Exception as error:  # the YAML reader's own exceptions have no common base with the others'
        warn(f"{path} is damaged and left out ({' '.join(str(error).split())[:120]})")
        return None


def _configuration(path: Path) -> dict[str, Any]:
    config = OmegaConf.to_container(OmegaConf.load(path))
    flat = flatten(config)
    if not {"env.task", "seed"} <= set(flat):
        raise ValueError("no env.task or no seed in it")
    return flat


def _table(path: Path, columns: Collection[str]) -> dict[str, Floats]:
    """A CSV file of numbers by column, without a last row that is still being written; empty without rows.

    Raises:
        ValueError: a cell is no number, or one of ``columns`` is missing.
    """
    text = path.read_text(encoding="utf-8")
    header, *rows = csv.reader(io.StringIO(text[: text.rfind("\n") + 1]))
    if not set(columns) <= set(header):
        raise ValueError(f"no column {', '.join(sorted(set(columns) - set(header)))}")
    values = np.array(rows, np.float64).reshape(len(rows), len(header)).T
    return dict(zip(header, values, strict=True)) if rows else {}


def _records(path: Path) -> tuple[Record, ...]:
    text = path.read_text(encoding="utf-8")
    lines = text[: text.rfind("\n") + 1].splitlines()
    return tuple(_record(json.loads(line)) for line in lines)


def _record(line: Mapping[str, Any]) -> Record:
    event, values = str(line["event"]), _metrics(line.get("values", {}))
    if event == "probe":
        values[f"{line['patient']}/all/probe_ratio"] = _number(line["ratio"])
    place = int(line["step"]), int(line["updates"])
    return Record(event, *place, str(line.get("sentence", "")), values, _metrics(line.get("fresh", {})))


def _metrics(values: Mapping[str, Any]) -> dict[str, float]:
    return {name.removeprefix("plasticity/"): _number(value) for name, value in values.items()}


def _number(value: Any) -> float:  # noqa: ANN401 - JSON's
    """NaN for null, as what is not finite is written."""
    return math.nan if value is None else float(value)


def _profile(path: Path) -> dict[str, float]:
    sections = json.loads(path.read_text(encoding="utf-8"))["sections"]
    return {name: float(part["seconds"]) for name, part in sections.items()}


def _critic(path: Path) -> dict[str, Any] | None:
    found: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")).get("critic")
    return found


def _finished(path: Path) -> bool:
    """Whether the newest checkpoint is that of a run whose budget is spent."""
    newest = max((path / "checkpoints").glob("step_*"), default=None)
    try:
        return newest is not None and bool(json.loads((newest / "finished.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return False


def _scalars(path: Path, warn: Warn) -> dict[str, Curve]:
    """Points of every scalar, in the order of the event files' names, which is that of the attempts."""
    points: dict[str, list[tuple[float, float]]] = {}
    for file in sorted(path.glob("*tfevents*")):
        try:
            for tag, step, value in _events(file):
                points.setdefault(tag, []).append((step, value))
        except ValueError as error:
            warn(f"{file} is damaged, and what follows there is left out ({error})")
    return {tag: as_curve(pairs) for tag, pairs in points.items()}


def _events(file: Path) -> Iterator[tuple[str, int, float]]:
    """Tag, step and value of every scalar in a file of records: length, its CRC, content, its CRC.

    TensorBoard's own reader ends at a damaged record and does not tell. An incomplete last one is being written.

    Raises:
        ValueError: a record is damaged.
    """
    protocol = import_module("tensorboard.compat.proto.event_pb2")
    crc = import_module("tensorboard.compat.tensorflow_stub.pywrap_tensorflow").masked_crc32c
    content, begin = file.read_bytes(), 0
    while begin + 12 <= len(content):
        header = content[begin : begin + 8]
        first, last = begin + 12, begin + 12 + int.from_bytes(header, "little")
        if crc(header) != int.from_bytes(content[begin + 8 : first], "little"):
            raise ValueError(f"byte {begin:,} begins no record")
        if last + 4 > len(content):
            return
        if crc(content[first:last]) != int.from_bytes(content[last : last + 4], "little"):
            raise ValueError(f"the record at byte {begin:,} has another checksum")
        event = protocol.Event.FromString(content[first:last])
        for value in event.summary.value:
            if value.HasField("simple_value"):
                yield value.tag, event.step, value.simple_value
        begin = last + 4
