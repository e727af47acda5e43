"""What the real packages write offline, read back; skipped where they are not installed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_runs import SMALL

from rlplastic import reporting, train_agent

BLOCK = 32_768
"""Of LevelDB's log format, which W&B's offline files have behind a header of seven bytes."""


def records(path: Path) -> Iterator[bytes]:
    content, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if (left := BLOCK - place % BLOCK) < 7:
            place += left
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        whole = (whole if kind in (3, 4) else b"") + content[place + 7 : place + 7 + length]  # middle, last
        place += 7 + length
        if kind in (1, 4):  # full, last
            yield whole


def interrupted_and_resumed(folder: Path, service: str) -> Path:
    arguments = [*SMALL, "env_steps=400", f"runs={folder / 'runs'}", "name=robots/run", f"tracking.writers=[{service}]"]
    with pytest.raises(RuntimeError), pytest.MonkeyPatch.context() as patch:
        patch.setattr(reporting.Reporter, "evaluate", lambda *_: (_ for _ in ()).throw(RuntimeError))
        train_agent(arguments, quiet=True)
    train_agent(arguments, quiet=True)
    return folder / "runs" / "robots" / "run"


def evaluations(run: Path) -> list[tuple[int, float]]:
    _, *rows = (run / "eval.csv").read_text().splitlines()
    return [(int(row.split(",")[0]), float(row.split(",")[3])) for row in rows]


@pytest.mark.slow
def test_mlflow_has_one_run_with_every_point_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rlplastic.writers.services.PATIENCE", 300.0)
    run = interrupted_and_resumed(tmp_path, "mlflow")
    client = mlflow.MlflowClient(json.loads((run / "mlflow.json").read_text())["tracking_uri"])
    (found,) = client.search_runs([client.get_experiment_by_name("rlplastic").experiment_id])
    assert found.info.status == "FINISHED" and found.info.run_name == "robots/run"
    assert found.data.params["agent.critic_width"] == "8"
    history = client.get_metric_history(found.info.run_id, "eval/return_mean")
    assert [(point.step, point.value) for point in history] == evaluations(run) != []
    steps = [point.step for point in client.get_metric_history(found.info.run_id, "replay/transitions")]
    assert steps == sorted(set(steps)) and steps[0] < 100 and steps[-1] == 400
    assert [entry.path for entry in client.list_artifacts(found.info.run_id)] == ["configuration"]
    assert "nothing more" not in capsys.readouterr().err


@pytest.mark.slow
def test_wandb_writes_both_starts_offline_under_one_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr("rlplastic.writers.services.PATIENCE", 300.0)
    run = interrupted_and_resumed(tmp_path, "wandb")
    attempts = sorted((run / "wandb").glob("offline-run-*"))
    assert len(attempts) == 2
    points: dict[int, dict[str, float]] = {}
    for attempt in attempts:
        (file,) = attempt.glob("*.wandb")
        for content in records(file):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(content)
            if record.HasField("run"):
                assert record.run.run_id == json.loads((run / "wandb.json").read_text())["id"]
                assert (record.run.project, record.run.display_name) == ("rlplastic", "robots/run")
            for item in record.history.item:
                name = ".".join(item.nested_key) or item.key
                points.setdefault(record.history.step.num, {})[name] = json.loads(item.value_json)
    assert [
        (step, point["eval/return_mean"]) for step, point in sorted(points.items()) if "eval/return_mean" in point
    ] == (evaluations(run))
    assert min(step for step, point in points.items() if "replay/transitions" in point) < 100 and max(points) == 400
    assert "nothing more" not in capsys.readouterr().err
