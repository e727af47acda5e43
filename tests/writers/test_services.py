from __future__ import annotations

import threading
import time
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from small_runs import SMALL, final_state
from torch import Tensor, nn

from rlplastic import train_agent
from rlplastic.errors import ConfigurationError
from rlplastic.tracking import EvaluationRow, Tracker
from rlplastic.writers import services
from rlplastic.writers.services import Background, Run


class Recorder:
    """A writer that keeps what it is told, after a while if asked, and fails from the ``failing``-th call on."""

    def __init__(self, failing: float = np.inf, wait: Callable[[], object] = lambda: None) -> None:
        self.told: list[tuple[Any, ...]] = []
        self._failing, self._wait = failing, wait

    def __getattr__(self, name: str) -> Callable[..., None]:
        def tell(*values: Any) -> None:
            self._wait()
            if len(self.told) + 1 >= self._failing:
                raise OSError(28, "No space left on device")
            self.told.append((name, *values))

        return tell


def test_a_service_is_told_what_tensorboard_shows_in_its_order(tmp_path: Path) -> None:
    recorder, warnings = Recorder(), []
    layer = nn.Linear(1, 2, bias=False)
    with Tracker(tmp_path, [Background("it", lambda: recorder, warnings.append)], tensorboard=False) as tracker:
        tracker.text("configuration", "seed: 3", 0)
        tracker.scalars(5, {"loss/critic": 0.5})
        tracker.evaluation(EvaluationRow(10, 2, 4, 3.0, 1.0, 2.5, 3.5, 100.0))
        tracker.finding(12, {"event": "probe"}, {"plasticity/decisions/ratio": 2.0}, "ill")
        tracker.histograms(12, {"weight": weights(layer, 7.0)})
        weights(layer, 8.0)  # training goes on while the service takes its time
        tracker.video("eval/episode", Path("film.mp4"), 12)
    *plain, (kind, step, arrays), film, end = recorder.told
    assert plain == [
        ("text", "configuration", "seed: 3", 0),
        ("scalars", 5, {"loss/critic": 0.5}),
        ("scalars", 10, {"eval/return_mean": 3.0, "eval/return_ci95": 0.5}),
        ("scalars", 12, {"plasticity/decisions/ratio": 2.0}),
        ("text", "plasticity/decisions", "ill", 12),
    ]
    assert (kind, step) == ("histograms", 12) and np.array_equal(arrays["weight"], [[7.0], [7.0]])
    assert film == ("video", "eval/episode", Path("film.mp4"), 12) and end == ("close", True)
    assert not warnings and not list(tmp_path.glob("*tfevents*"))


def weights(layer: nn.Linear, value: float) -> Tensor:
    nn.init.constant_(layer.weight, value)
    return layer.weight


def test_a_run_that_failed_is_closed_as_not_completed(tmp_path: Path) -> None:
    recorder = Recorder()
    with pytest.raises(ZeroDivisionError), Tracker(tmp_path, [Background("it", lambda: recorder, print)]):
        raise ZeroDivisionError
    assert recorder.told == [("close", False)]


@pytest.mark.parametrize("failing", [0, 1, 3])
def test_a_service_that_fails_is_told_once_and_left_alone(failing: int) -> None:
    recorder, warnings = Recorder(failing), []

    def opened() -> Recorder:
        if failing == 0:
            raise SystemExit("rejected key")
        return recorder

    writer = Background("it", opened, warnings.append)
    for step in range(9):
        writer.scalars(step, {"a": 1.0})
        writer._thread.join(0.05)
    writer.close(True)
    (warning,) = warnings
    reason = "No space left on device" if failing else "SystemExit: rejected key"
    assert reason in warning and "training and its own logs go on" in warning
    assert recorder.told == [("scalars", step, {"a": 1.0}) for step in range(failing - 1)]


def test_a_service_that_hangs_delays_nothing_and_is_given_up_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "PATIENCE", 0.2)
    monkeypatch.setattr(services, "MOST_WAITING", 50)
    for messages, reason in ((20, "has not taken everything within 0.2 s"), (200, "is 50 messages behind")):
        hanging, warnings = threading.Event(), []
        writer = Background("it", lambda hanging=hanging: Recorder(wait=hanging.wait), warnings.append)
        began = time.monotonic()
        for step in range(messages):
            writer.scalars(step, {})
        assert time.monotonic() - began < 0.2
        writer.close(True)
        assert time.monotonic() - began < 5
        (warning,) = warnings
        assert reason in warning
        hanging.set()


@pytest.mark.slow
@pytest.mark.parametrize("failing", [2, np.inf])
def test_a_service_changes_no_bit_of_a_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], failing: float
) -> None:
    recorder = Recorder(failing)
    monkeypatch.setattr(services, "require", lambda names: None)
    monkeypatch.setattr(services, "_open", lambda name, run: recorder)
    for name, writers in (("with", "[tensorboard,wandb]"), ("without", "[]")):
        train_agent([*SMALL, f"runs={tmp_path / name}", "name=run", f"tracking.writers={writers}"], quiet=True)
    assert final_state(tmp_path / "with" / "run") == final_state(tmp_path / "without" / "run")
    assert capsys.readouterr().err.count("gets nothing more of this run") == (failing == 2)
    assert bool(list((tmp_path / "with" / "run").glob("*tfevents*"))) > bool(
        list((tmp_path / "without" / "run").glob("*tfevents*"))
    )


def test_unknown_writers_and_missing_packages_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"'mlfow'; did you mean 'mlflow'\?"):
        train_agent([*SMALL, "tracking.writers=[tensorboard,mlfow]"])
    with pytest.raises(ConfigurationError, match=r"pip install 'rlplastic\[wandb\]'"):
        train_agent([*SMALL, "tracking.writers=[wandb]"])


class FakeClient:
    """As much of MLflow's client as is used; what it was given is in ``calls``, and one database is shared by all."""

    calls: ClassVar[list[tuple[Any, ...]]] = []
    metrics: ClassVar[dict[str, list[SimpleNamespace]]] = {}
    params: ClassVar[dict[str, str]] = {}

    def __init__(self, tracking_uri: str) -> None:
        self.calls.append(("at", tracking_uri))

    def get_run(self, identity: str) -> SimpleNamespace:
        return SimpleNamespace(data=SimpleNamespace(params=self.params))

    def create_run(self, number: str, run_name: str) -> SimpleNamespace:
        self.calls.append(("create_run", number, run_name))
        return SimpleNamespace(info=SimpleNamespace(run_id="r1"))

    def get_experiment_by_name(self, name: str) -> None:
        return None

    def create_experiment(self, name: str) -> str:
        return f"number of {name}"

    def log_batch(self, identity: str, metrics: Any = (), params: Any = ()) -> None:
        assert len(metrics) + len(params) <= 100
        self.params |= dict(params)
        for key, value, _, step in metrics:
            self.metrics.setdefault(key, []).append(SimpleNamespace(step=step, value=value))

    def get_metric_history(self, identity: str, key: str) -> list[SimpleNamespace]:
        return self.metrics.get(key, [])

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *values, **named: self.calls.append((name, *values, *named.values()))


class FakeMetric(tuple[Any, ...]):
    key = property(lambda self: self[0])


def fake(monkeypatch: pytest.MonkeyPatch, name: str, **content: object) -> ModuleType:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    vars(module).update(content)
    monkeypatch.setitem(__import__("sys").modules, name, module)
    return module


def test_a_resumed_run_goes_on_under_its_id_at_mlflow_and_repeats_no_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entities = SimpleNamespace(Metric=lambda *values: FakeMetric(values), Param=lambda key, value: (key, value))
    fake(monkeypatch, "mlflow", MlflowClient=FakeClient, entities=entities, get_tracking_uri=lambda: "file:here")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    from rlplastic.writers.mlflow_service import open_run

    settings = {f"key{number}": number for number in range(150)}
    first = open_run(Run(tmp_path, "hopper", "robots", settings | {"env_steps": 5}))
    first.scalars(10, {"a": 1.0})
    first.scalars(20, {"a": 2.0, "b": 2.5})  # and then it is killed, having saved a checkpoint at 10
    again = open_run(Run(tmp_path, "hopper", "robots", settings | {"env_steps": 9}))
    for step in (20, 30):
        again.scalars(step, {"a": step / 10, "b": 0.0, "c": 1.0})
    again.text("plasticity/decisions", "kept", 30)
    again.close(True)
    assert {key: [point.step for point in points] for key, points in FakeClient.metrics.items()} == {
        "a": [10, 20, 30],
        "b": [20, 30],
        "c": [20, 30],
    }
    assert FakeClient.params == {key: str(value) for key, value in settings.items()} | {"env_steps": "5"}
    assert FakeClient.calls == [
        ("at", "file:here"),
        ("create_run", "number of robots", "hopper"),
        ("at", "file:here"),
        ("update_run", "r1", "RUNNING"),
        ("set_tag", "r1", "env_steps", "9"),
        ("log_text", "r1", "kept", "plasticity/decisions/step_000000000030.md"),
        ("set_terminated", "r1", "FINISHED"),
    ]


def test_a_resumed_run_goes_on_under_its_id_at_wandb_and_is_offline_without_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[dict[str, Any]] = []
    calls: ClassVar[list[tuple[Any, ...]]] = []
    key = True

    def init(**options: Any) -> SimpleNamespace:
        opened.append(options)
        return SimpleNamespace(
            config=SimpleNamespace(update=lambda *values, **_: calls.append(("config", *values))),
            log=lambda values, step: calls.append((step, values)),
            finish=lambda exit_code: calls.append(("finish", exit_code)),
        )

    fake(monkeypatch, "wandb", init=init, Settings=dict, login=lambda **_: key, Html=str, Histogram=None)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    from rlplastic.writers.wandb_service import open_run

    run = Run(tmp_path, "hopper", "robots", {"seed": 3})
    open_run(run).scalars(10, {"a": 1.0})
    key = False
    again = open_run(run)
    again.text("note", "a < b", 20)
    again.close(False)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    open_run(run)
    assert [options["mode"] for options in opened] == ["online", "offline", "disabled"]
    assert len({options["id"] for options in opened}) == 1 and {options["resume"] for options in opened} == {"allow"}
    assert {options["dir"] for options in opened} == {str(tmp_path)}
    told = ("config", {"seed": 3})
    assert calls == [told, (10, {"a": 1.0}), told, (20, {"note": "<pre>a &lt; b</pre>"}), ("finish", 1), told]
