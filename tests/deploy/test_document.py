"""A document survives JSON with every digit, and one that contradicts itself is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pytest
from deploy_document import DOCUMENT

from rlplastic.deploy.document import Document, Observation, ObservationTerm
from rlplastic.errors import ConfigurationError


def changed(path: str, value: object) -> str:
    """The document's JSON with one value replaced; ``path`` such as ``action.box.scale``."""
    raw: Any = json.loads(DOCUMENT.to_json())
    place: Any = raw
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    for part in parents:
        place = place[part]
    place[last] = value
    return json.dumps(raw)


def test_a_document_comes_back_from_json_with_every_digit() -> None:
    assert Document.from_json(DOCUMENT.to_json()) == DOCUMENT


def test_lists_of_numbers_take_a_line_and_the_text_says_the_same() -> None:
    text = DOCUMENT.to_json()
    assert '"low": [ -0.4, -0.4 ]' in text
    assert json.loads(text) == json.loads(json.dumps(asdict(DOCUMENT)))


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("schema_version", 2, "has schema_version 2; expected 1"),
        ("action.box.scale", [1.0], "action.box has lists of [1, 2] numbers for 2 outputs"),
        ("action.names", ["m_hip", "m_hip"], "the actuator 'm_hip' is there twice"),
        ("action.joints", ["knee", "hip"], "joint knee names output 1, which drives hip"),
        ("action.joints", ["hip", "toe"], "which drives toe"),
        ("action.kind", ["position"], "action.kind has 1 entries for 2 outputs"),
        ("action.kind", ["position", "rotation"], "'rotation'; expected"),
        ("action.target.low", [2.0, 0.0], "action.target has a lower bound above the upper one"),
        ("observation.terms.1.start", 7, "term joint_positions covers columns 7 to 8 where 6 comes next"),
        ("observation.terms.0.name", "last_action", "the observation term 'last_action' is there twice"),
        ("observation.terms.0.history", 4, "term gyro has 6 columns for a history of 4"),
        ("observation.terms.0.scale", [1.0], "term gyro has 1 scales and 3 offsets for 3 elements"),
        ("observation.terms.1.elements", ["knee"], "term joint_positions has 1 names for 2 elements"),
        ("observation.width", 11, "1 frames of 10 columns are not the width 11"),
        ("observation.frames", "1", "document.observation.frames in the policy's document is '1'"),
        ("joints.0.name", "hip", "the joint 'hip' is there twice"),
        ("joints.0.lower", 3.0, "joint knee has a lower limit above the upper one"),
        ("joints.0.lower", True, "document.joints[0].lower in the policy's document is True"),
        ("timing.decimation", 4, "4 simulation steps of 0.002 s are not 0.02 s"),
        ("commands.0.low", 2.0, "the range of forward is empty"),
        ("surprise", 1, "has the unknown ['surprise']"),
    ],
)
def test_a_document_that_contradicts_itself_is_refused_in_one_sentence(path: str, value: object, sentence: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Document.from_json(changed(path, value))
    assert sentence in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", '{"schema_version": 1}'])
def test_what_is_no_document_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError):
        Document.from_json(text)


def test_a_missing_key_is_named() -> None:
    raw = json.loads(DOCUMENT.to_json())
    del raw["timing"]["decimation"]
    with pytest.raises(ConfigurationError, match=r"document\.timing .* lacks \['decimation'\]"):
        Document.from_json(json.dumps(raw))


@pytest.mark.parametrize(
    ("change", "columns"),
    [
        (lambda o, t: (o, t), [3, 4, 5]),
        (lambda o, t: (o, replace(t, order="newest_first")), [0, 1, 2]),
        (lambda o, t: (replace(o, frames=3, width=30), t), [23, 24, 25]),
        (lambda o, t: (replace(o, frames=3, width=30, order="newest_first"), t), [3, 4, 5]),
    ],
)
def test_newest_columns_of_a_term_follow_from_history_and_frames(
    change: Callable[[Observation, ObservationTerm], tuple[Observation, ObservationTerm]], columns: list[int]
) -> None:
    observation, term = change(DOCUMENT.observation, DOCUMENT.observation.terms[0])
    found = observation.newest(term)
    assert list(range(found.start, found.stop)) == columns
