"""The document that travels with a policy: what its inputs and outputs mean, in full precision.

One JSON object, the same in ``policy.json`` and in the ONNX file's metadata under the key ``rlplastic``. A fact that
the exporter could not read from the task or its model is null or an empty list: nothing here is ever guessed.
docs/deploy.md explains it key by key.

Two orders exist and are not the same: *outputs* (columns of ``actions``, the actuators' order) and *joints* (the
model's own order). Lists in `Action` are in the order of outputs; each `Joint` names the output that drives it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from rlplastic.errors import ConfigurationError

SCHEMA_VERSION = 1
METADATA_KEY = "rlplastic"
_FLAT_LIST = re.compile(r"(?<=\[)\n[^][{}]*(?=\])")
"""What an indented list holds that has no list or object in it; strings of JSON have no line breaks."""
T = TypeVar("T")
Order = Literal["oldest_first", "newest_first"]
Kind = Literal["position", "velocity", "torque", "other"]
Numbers = tuple[float, ...]


@dataclass(frozen=True)
class ObservationTerm:
    """Columns ``start`` to ``stop`` of one frame: clip(scale * value + offset), ``history`` values in order.

    scale and offset have one number for each of the ``(stop - start) / history`` elements of a value; they are what the
    *task* does to a value before the policy sees it, and what a robot has to do too. The policy's own normaliser is
    inside the graph. elements: names of a value's elements, joints by their names, where they are known. delay: policy
    steps by which the newest value used is older than the newest there is.
    """

    name: str
    start: int
    stop: int
    scale: Numbers
    offset: Numbers
    elements: tuple[str, ...] = ()
    clip: tuple[float, float] | None = None
    history: int = 1
    order: Order = "oldest_first"
    delay: int = 0

    @property
    def width(self) -> int:
        """Elements of one value."""
        return (self.stop - self.start) // self.history


@dataclass(frozen=True)
class Observation:
    """The input ``obs`` (N, width): ``frames`` stacked rows in order, each made of all terms."""

    width: int
    terms: tuple[ObservationTerm, ...]
    frames: int = 1
    order: Order = "oldest_first"

    def newest(self, term: ObservationTerm) -> slice:
        """Columns of the newest value of a term."""
        frame = (self.frames - 1) * (self.width // self.frames) if self.order == "oldest_first" else 0
        start = frame + term.start + ((term.history - 1) * term.width if term.order == "oldest_first" else 0)
        return slice(start, start + term.width)


@dataclass(frozen=True)
class AffineMap:
    """y = clip(scale * x + offset, low, high), element by element; ``already_applied``: within the graph."""

    scale: Numbers
    offset: Numbers
    low: Numbers
    high: Numbers
    already_applied: bool


@dataclass(frozen=True)
class Action:
    """The outputs, in their order.

    box: from ``raw_actions`` in [-1, 1] to ``actions``; target: from ``actions`` to the actuators' commands where the
    task itself still maps them, else null and ``actions`` are the commands. names: of the actuators, as the task's
    model has them, empty without a model; joints: the one that each drives, null where it drives another thing; kind:
    what a command is (a torque is gear * command); gear: of each actuator.
    """

    width: int
    box: AffineMap
    target: AffineMap | None = None
    names: tuple[str, ...] = ()
    joints: tuple[str | None, ...] = ()
    kind: tuple[Kind, ...] = ()
    gear: Numbers = ()


@dataclass(frozen=True)
class Joint:
    """A hinge or slide of the model; radians or metres, newton metres or newtons.

    output: index of the output that drives it. default_position: of the model's keyframe ``home``, else its reference
    pose. kp, kd: gains of a position or velocity servo, null for torques. damping, friction, armature: of the joint
    itself. effort: limits of the actuator's force on it.
    """

    name: str
    default_position: float
    output: int | None = None
    kp: float | None = None
    kd: float | None = None
    damping: float | None = None
    friction: float | None = None
    armature: float | None = None
    lower: float | None = None
    upper: float | None = None
    effort: tuple[float, float] | None = None


@dataclass(frozen=True)
class Timing:
    """Seconds; policy_step = decimation * simulation_step."""

    simulation_step: float
    decimation: int
    policy_step: float


@dataclass(frozen=True)
class CommandRange:
    """What a commanded quantity was drawn from in training."""

    name: str
    low: float
    high: float


@dataclass(frozen=True)
class EvaluationResult:
    """Undiscounted return of whole episodes, with a 95 % Student-t interval of its mean."""

    mean: float
    ci95: tuple[float, float]
    episodes: int
    seed: int


@dataclass(frozen=True)
class Provenance:
    """Where the policy comes from."""

    environment: str
    backend: str
    training_steps: int
    checkpoint_sha256: str
    """Of the checkpoint's manifest, which has the hash of every tensor file."""
    rlplastic: str
    libraries: dict[str, str]
    configuration: dict[str, Any]
    model_file: str | None = None
    """The MJCF whose facts are in the document, relative to the package that ships it."""
    model_sha256: str | None = None
    evaluation: EvaluationResult | None = None


@dataclass(frozen=True)
class Document:
    """Everything; made by the exporter, read by `from_json`."""

    schema_version: int
    observation: Observation
    action: Action
    provenance: Provenance
    joints: tuple[Joint, ...] = ()
    timing: Timing | None = None
    quaternion_order: Literal["wxyz", "xyzw"] | None = None
    commands: tuple[CommandRange, ...] = ()
    absent: dict[str, str] = field(default_factory=dict)
    """Why facts are not here, by name."""

    def to_json(self) -> str:
        """The document as text; floats keep all their digits, and lists of them a line."""
        text = json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False)
        return _FLAT_LIST.sub(lambda found: re.sub(r"\n\s*", " ", found[0]), text) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Document:
        """Read and check a document.

        Raises:
            ConfigurationError: not a document of this schema, or `problems` finds some.
        """
        try:
            raw = json.loads(text)
            version = raw["schema_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigurationError(
                "the policy's document cannot be read; expected JSON of rlplastic.export"
            ) from error
        if version != SCHEMA_VERSION:
            raise ConfigurationError(
                f"the policy's document has schema_version {version}; expected {SCHEMA_VERSION}: export the run again "
                "with this version of rlplastic, or read it with that one"
            )
        document: Document = _read(cls, raw, "document")
        found = problems(document)
        if found:
            raise ConfigurationError(f"the policy's document contradicts itself: {found[0]}; export the run again")
        return document


def problems(document: Document) -> list[str]:
    """What contradicts itself in a document, a clause each: lengths, names, ranges; empty where all fits."""
    return [
        *_observation_problems(document.observation),
        *_action_problems(document.action),
        *_joint_problems(document),
        *_timing_problems(document.timing),
        *(f"the range of {c.name} is empty" for c in document.commands if c.low > c.high),
        *_repeated("command", [command.name for command in document.commands]),
    ]


def _observation_problems(observation: Observation) -> list[str]:
    found = _repeated("observation term", [term.name for term in observation.terms])
    at = 0
    for term in observation.terms:
        if term.start != at or term.stop <= term.start:
            found.append(f"term {term.name} covers columns {term.start} to {term.stop} where {at} comes next")
        if term.history < 1 or (term.stop - term.start) % term.history:
            found.append(f"term {term.name} has {term.stop - term.start} columns for a history of {term.history}")
        elif not len(term.scale) == len(term.offset) == term.width:
            lengths = f"{len(term.scale)} scales and {len(term.offset)} offsets"
            found.append(f"term {term.name} has {lengths} for {term.width} elements")
        elif term.elements and len(term.elements) != term.width:
            found.append(f"term {term.name} has {len(term.elements)} names for {term.width} elements")
        at = term.stop
    if observation.frames < 1 or at * observation.frames != observation.width:
        found.append(f"{observation.frames} frames of {at} columns are not the width {observation.width}")
    return found


def _action_problems(action: Action) -> list[str]:
    found = _repeated("actuator", action.names)
    for name, values in (
        ("names", action.names),
        ("joints", action.joints),
        ("kind", action.kind),
        ("gear", action.gear),
    ):
        if values and len(values) != action.width:
            found.append(f"action.{name} has {len(values)} entries for {action.width} outputs")
    for name, affine in (("box", action.box), ("target", action.target)):
        if affine is None:
            continue
        lengths = {len(affine.scale), len(affine.offset), len(affine.low), len(affine.high)}
        if lengths != {action.width}:
            found.append(f"action.{name} has lists of {sorted(lengths)} numbers for {action.width} outputs")
        elif any(low > high for low, high in zip(affine.low, affine.high, strict=True)):
            found.append(f"action.{name} has a lower bound above the upper one")
    return found


def _joint_problems(document: Document) -> list[str]:
    found = _repeated("joint", [joint.name for joint in document.joints])
    driven = dict(enumerate(document.action.joints))
    for joint in document.joints:
        if joint.output is not None and driven.get(joint.output) != joint.name:
            found.append(f"joint {joint.name} names output {joint.output}, which drives {driven.get(joint.output)}")
        if joint.lower is not None and joint.upper is not None and joint.lower > joint.upper:
            found.append(f"joint {joint.name} has a lower limit above the upper one")
    known = {joint.name for joint in document.joints}
    found += [
        f"output {i} drives {name}, which is no joint" for i, name in driven.items() if name and name not in known
    ]
    return found


def _timing_problems(timing: Timing | None) -> list[str]:
    if timing is None or math.isclose(timing.policy_step, timing.decimation * timing.simulation_step, rel_tol=1e-9):
        return []
    return [f"{timing.decimation} simulation steps of {timing.simulation_step} s are not {timing.policy_step} s"]


def _repeated(what: str, names: typing.Sequence[str]) -> list[str]:
    return [f"the {what} {name!r} is there twice" for name in sorted({n for n in names if names.count(n) > 1})]


def _read(kind: Any, value: Any, place: str) -> Any:  # noqa: ANN401 - as the annotations of the dataclasses say
    """A JSON value as an instance of an annotation; numbers, strings and lists are checked as they are converted."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(kind, value, place)
    if origin in (types.UnionType, typing.Union):
        others = [argument for argument in arguments if argument is not type(None)]
        return None if value is None else _read(others[0], value, place)
    if origin is tuple and isinstance(value, list):
        if arguments[-1] is Ellipsis:
            return tuple(_read(arguments[0], one, f"{place}[{i}]") for i, one in enumerate(value))
        if len(value) == len(arguments):
            return tuple(
                _read(a, one, f"{place}[{i}]") for i, (a, one) in enumerate(zip(arguments, value, strict=True))
            )
    if origin is dict and isinstance(value, dict):
        return dict(value)
    if origin is Literal and value in arguments:
        return value
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind in (int, str, bool) and type(value) is kind:
        return value
    raise ConfigurationError(f"{place} in the policy's document is {value!r}; expected {kind}: export the run again")


def _read_dataclass(kind: Any, value: Any, place: str) -> Any:  # noqa: ANN401
    if not isinstance(value, dict):
        raise ConfigurationError(f"{place} in the policy's document is no object; export the run again")
    hints = typing.get_type_hints(kind)
    missing, unknown = hints.keys() - value.keys(), value.keys() - hints.keys()
    if missing or unknown:
        what = f"lacks {sorted(missing)}" if missing else f"has the unknown {sorted(unknown)}"
        raise ConfigurationError(f"{place} in the policy's document {what}; export the run again with this version")
    return kind(**{name: _read(hint, value[name], f"{place}.{name}") for name, hint in hints.items()})
