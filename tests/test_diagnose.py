"""What is told of a checkpoint is what its tensors and rows give; networks of other libraries; wrong requests."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import SMALL, run
from torch import Tensor, nn

import rlplastic
from rlplastic import diagnose, train_agent
from rlplastic.command_line import run_verb
from rlplastic.diagnosis import Report, diagnose_network, diagnose_run
from rlplastic.errors import ConfigurationError
from rlplastic.plasticity import units

ROWS = 64


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of every agent, SAC's with held-out episodes; both with two checkpoints."""
    folder = tmp_path_factory.mktemp("runs")
    short = [*SMALL, "env_steps=500", "evaluation.every=0", "monitor=off", f"runs={folder}"]
    train_agent([*short, "name=flashsac"], quiet=True)
    train_agent([*short, "name=sac", "agent=sac", "replay.holdout=0.4"], quiet=True)
    return {name: folder / name for name in ("flashsac", "sac")}


def checkpoints(path: Path) -> list[dict[str, Tensor]]:
    return [load_file(file) for file in sorted(path.glob("checkpoints/step_*/agent.safetensors"))]


def value(report: Report, network: str, layer: str, name: str) -> float:
    (found,) = (each for each in report.networks if each.network == network)
    (metric,) = (each for each in found.metrics if (each.layer, each.name) == (layer, name))
    return metric.value


def content(path: Path) -> dict[str, str]:
    files = [file for file in path.rglob("*") if file.is_file()]
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


# Of a run


def test_weights_are_those_of_the_newest_checkpoint_and_speed_is_from_the_one_before(runs: dict[str, Path]) -> None:
    report = diagnose_run(runs["sac"], rows=ROWS, probe_steps=0)
    before, now = checkpoints(runs["sac"])
    weights = {name: tensor.double() for name, tensor in now.items() if name.startswith("critic.")}
    norms = sum(tensor.flatten(1).square().sum(1) for tensor in weights.values()).sqrt()
    assert value(report, "critic", "all", "weight_norm") == pytest.approx(float(norms.mean()))
    rows = [tensors["critic.trunk.2.weight"].double() for tensors in (before, now)]
    cosine = torch.cosine_similarity(*rows, dim=-1)
    updates = int(now["updates"] - before["updates"])
    speed = value(report, "critic", "trunk.2", "angular_speed")
    assert speed == pytest.approx(float(torch.acos(cosine).mean()) / updates, rel=1e-3)
    assert f"after {int(now['updates']):,} updates" in report.subject


def test_activations_are_those_on_rows_of_the_replay_that_training_samples(runs: dict[str, Path]) -> None:
    """One hidden layer by hand, on all rows that could have been drawn: shares agree within their sampling error."""
    report = diagnose_run(runs["sac"], rows=400, probe_steps=0)
    tensors = checkpoints(runs["sac"])[-1]
    segments = [load_file(file) for file in runs["sac"].glob("checkpoints/segments/*.safetensors")]
    columns = {
        name: torch.cat([segment[name] for segment in segments]) for name in segments[0] if "observation" in name
    }
    observation = columns["replay.observation.policy"].float()
    hidden = torch.relu(observation @ tensors["actor.trunk.0.weight"].T + tensors["actor.trunk.0.bias"])
    expected = float(units.active_fraction(hidden))
    assert value(report, "actor", "trunk.1", "active_fraction") == pytest.approx(expected, abs=0.05)


def test_distance_from_the_start_is_from_the_weights_that_the_seed_gives(runs: dict[str, Path], tmp_path: Path) -> None:
    report = diagnose_run(runs["flashsac"], rows=ROWS, probe_steps=0)
    angle = value(report, "critic", "trunk.embed", "angle_from_init")
    assert 0 < angle < 0.5, "two random rows would be 1.57 apart"
    other = [
        *SMALL,
        "env_steps=300",
        "evaluation.every=0",
        "monitor=off",
        f"init_from={runs['flashsac']}",
        f"runs={tmp_path}",
        "name=b",
    ]
    train_agent(other, quiet=True)
    tuned = diagnose_run(tmp_path / "b", rows=ROWS, probe_steps=0)
    assert tuned.unavailable["distance_from_init, angle_from_init"] == "the run began with another run's networks"
    with pytest.raises(ValueError, match="unpack"):
        value(tuned, "critic", "trunk.embed", "angle_from_init")


def test_what_there_is_no_data_for_is_called_unavailable(runs: dict[str, Path]) -> None:
    held, all_sampled = (diagnose_run(runs[name], rows=ROWS, probe_steps=0) for name in ("sac", "flashsac"))
    assert held.td_error is not None and held.unavailable == {}
    assert all_sampled.td_error is None
    assert all_sampled.unavailable == {
        "held_out_td_error, td_gap": "the replay holds no held-out transition (replay.holdout=0)"
    }


def test_flat_metrics_of_a_bounded_agent_carry_the_reason_and_a_plain_ones_none(runs: dict[str, Path]) -> None:
    flat = {"active_fraction", "dormant", "dormant_0.1", "dead", "linearised", "weight_norm", "distance_from_init"}
    for name, expected in {"flashsac": flat, "sac": set()}.items():
        report = rlplastic.diagnose_run(runs[name], rows=ROWS, probe_steps=2)
        for network in report.networks:
            assert {metric.name for metric in network.metrics if metric.reason} == expected
            assert network.probe is not None and network.probe.ratio > 0
            tiers = {metric.tier for metric in network.metrics}
            assert tiers == {"forward", "ranks", "expensive"}


def test_a_run_in_use_is_diagnosed_and_nothing_of_it_changes(runs: dict[str, Path], tmp_path: Path) -> None:
    path = runs["flashsac"]
    before = content(path / "checkpoints")
    command = [f"run={path}", f"out={tmp_path}", f"rows={ROWS}", "probe_steps=2"]
    with open(path / "lock", "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # as a run that trains does
        assert run_verb(diagnose.main, command) == 0
    assert content(path / "checkpoints") == before
    assert {file.name for file in tmp_path.iterdir()} == {"diagnosis.json", "diagnosis.png", "critic.png"}


def test_the_same_command_finds_the_same(runs: dict[str, Path]) -> None:
    first, second = (diagnose_run(runs["flashsac"], rows=ROWS, probe_steps=3) for _ in range(2))
    assert first == second


def test_table_document_and_picture(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run_verb(diagnose.main, [f"run={runs['flashsac']}", f"out={tmp_path}", f"rows={ROWS}", "probe_steps=2"]) == 0
    shown = capsys.readouterr().out
    assert "critic: learns" in shown and "probe ratio" in shown and "effective_rank" in shown
    assert "says nothing here: dormant 0, dormant_0.1 0 (batch norm gives every unit the same scale" in shown
    assert "not measured: held_out_td_error, td_gap: the replay holds no held-out transition" in shown
    written = (tmp_path / "diagnosis.json").read_text()
    assert "healthy" not in (shown + written).lower()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    document = json.loads(written, parse_constant=refuse)
    actor, critic = document["networks"]
    assert (actor["network"], critic["network"]) == ("actor", "critic")
    assert len(critic["probe"]["members"]) == 2 and critic["probe"]["worst"] >= critic["probe"]["ratio"]
    assert (tmp_path / "diagnosis.png").read_bytes().startswith(b"\x89PNG")


# Of any network

FACTORY = """
import torch
from torch import nn

def critic():
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))

class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)

    def forward(self, observation, action):
        hidden = torch.relu(self.norm(self.first(torch.cat((observation, action), -1))))
        return self.last(hidden), hidden

def number():
    return 3
"""


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))


def states(rows: int = ROWS) -> Tensor:
    return torch.randn(rows, 3, generator=torch.Generator().manual_seed(0))


def test_a_network_that_is_fresh_itself_equals_the_fresh_one() -> None:
    torch.manual_seed(5)
    module = mlp()
    before = torch.get_rng_state()
    report = diagnose_network(module, mlp, (states(),), target=torch.ones(ROWS, 1), probe_steps=20, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    (network,) = report.networks
    assert network.probe is not None and network.probe.ratio == pytest.approx(1)
    assert len(network.metrics) > 20
    assert all(metric.fresh is None or metric.value == pytest.approx(metric.fresh) for metric in network.metrics)


def test_a_network_with_dead_units_is_seen_to_and_learns_more_slowly() -> None:
    torch.manual_seed(0)
    module = mlp()
    with torch.no_grad():
        module[0].bias[:6] = -100
    report = diagnose_network(module, mlp, (states(),), probe_steps=200)
    assert value(report, "network", "1", "dead") >= 0.75
    assert report.networks[0].probe is not None and report.networks[0].probe.ratio > 1.1
    assert "gradients, curvature" in report.unavailable


def test_numbers_that_are_not_finite_are_told_and_still_json(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    torch.manual_seed(0)
    module = mlp()
    with torch.no_grad():
        module[0].weight[0] = math.nan
    report = diagnose_network(module, mlp, (states(),), probe_steps=2)
    (network,) = report.document()["networks"]
    assert network["probe"]["ratio"] is None
    assert next(metric for metric in network["metrics"] if metric["name"] == "dormant")["value"] is None
    from rlplastic.diagnosis_views import draw, verdict

    assert verdict(report.networks[0]) == "network: the probe met numbers that are not finite"
    draw(report, tmp_path / "picture.png")


def files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """A saved network, its factory in the working directory, and its states."""
    monkeypatch.chdir(folder)
    (folder / "my_networks.py").write_text(FACTORY)
    torch.manual_seed(0)
    save_file(mlp().state_dict(), folder / "model.safetensors")
    torch.save(mlp().state_dict(), folder / "model.pt")
    np.savez(folder / "states.npz", states=states().numpy(), target=np.ones((ROWS, 1)))
    np.savez(folder / "pairs.npz", observation=states()[:, :2].numpy(), action=states()[:, 2:].numpy())
    np.savez(folder / "uneven.npz", a=np.ones((3, 3)), b=np.ones((4, 3)))
    np.savez(folder / "narrow.npz", a=np.ones((ROWS, 2)))
    np.savez(folder / "few.npz", a=np.ones((9, 3)))
    np.savez(folder / "objects.npz", a=np.array([{}, []], dtype=object))
    (folder / "evil.pt").write_bytes(pickle.dumps(print))
    (folder / "text.npz").write_text("not an archive")
    return {file.stem: file for file in folder.iterdir()}


@pytest.mark.parametrize("state", ["model.safetensors", "model.pt"])
def test_the_verb_measures_a_network_of_any_library(
    state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    files(tmp_path, monkeypatch)
    command = [f"state={state}", "factory=my_networks:critic", "states=states.npz", "probe_steps=2"]
    assert run_verb(diagnose.main, command) == 0
    assert "sharpness" in capsys.readouterr().out
    assert json.loads((tmp_path / "diagnosis.json").read_text())["rows"] == ROWS


def test_functional_networks_with_several_inputs_and_outputs_and_batch_norm_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files(tmp_path, monkeypatch)
    monkeypatch.syspath_prepend(tmp_path)
    import my_networks

    torch.manual_seed(0)
    torch.save(my_networks.Functional().state_dict(), tmp_path / "functional.pt")
    command = ["state=functional.pt", "factory=my_networks:Functional", "states=pairs.npz", "probe_steps=2"]
    assert run_verb(diagnose.main, command) == 0
    document = json.loads((tmp_path / "diagnosis.json").read_text())
    found = {(metric["layer"], metric["name"]): metric for metric in document["networks"][0]["metrics"]}
    assert ("relu_0", "active_fraction") in found
    lag = found["norm", "batch_norm_lag"]
    assert lag["value"] > 0 and lag["reason"] is None and lag["fresh"] == pytest.approx(0, abs=1e-5)


FOREIGN = {"state": "model.safetensors", "factory": "my_networks:critic", "states": "states.npz"}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"state": "nothing.pt"}, "state=nothing.pt cannot be read (No such file"),
        ({"state": "evil.pt"}, "state=evil.pt cannot be read (Weights only load failed"),
        ({"state": "states.npz"}, "expected safetensors, or a state dict"),
        ({"factory": "my_networks"}, "is not of the form module:function"),
        ({"factory": "my_network:critic"}, "factory=my_network:critic cannot be imported (ModuleNotFoundError"),
        ({"factory": "my_networks:kritic"}, "has no function 'kritic'; did you mean 'critic'"),
        ({"factory": "my_networks:number"}, "returned a int; expected a torch.nn.Module"),
        ({"factory": "my_networks:Functional"}, "does not fit what factory=my_networks:Functional makes"),
        ({"states": "uneven.npz"}, "holds arrays of {'a': 3, 'b': 4} rows"),
        ({"states": "objects.npz"}, "states=objects.npz cannot be read (Object arrays"),
        ({"states": "text.npz"}, "states=text.npz cannot be read"),
        ({"states": "narrow.npz"}, "the network cannot be measured on states=narrow.npz"),
        ({"states": "few.npz"}, "ranks of layer 3 with 8 units were asked of 9 rows"),
        ({"states": None}, "state, factory was given; expected run=… for a run, or state=…, factory=… and states=…"),
        ({"run": "runs/x"}, "run, state, factory, states was given"),
        ({"profile": "bound"}, "profile=bound is not a choice; did you mean 'bounded'"),
        ({"probe_steps": -1}, "probe_steps=-1 is out of range"),
        ({"out": "nowhere"}, "nowhere"),
    ],
)
def test_a_mistake_ends_with_exit_code_2_and_one_sentence(
    changes: dict[str, object],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    files(tmp_path, monkeypatch)
    given = {name: value for name, value in (FOREIGN | {"probe_steps": 2} | changes).items() if value is not None}
    assert run_verb(diagnose.main, [f"{name}={value}" for name, value in given.items()]) == 2
    complaint = capsys.readouterr().err
    assert sentence in complaint and complaint.count("\n") == 1
    assert not (tmp_path / "diagnosis.json").exists()


def test_wrong_runs_are_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="does not exist; expected a run directory"):
        diagnose_run(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.yaml").write_bytes((runs["sac"] / "config.yaml").read_bytes())
    with pytest.raises(ConfigurationError, match="has no checkpoint yet"):
        diagnose_run(tmp_path / "empty")
    with pytest.raises(ConfigurationError, match="ranks of layer"):
        diagnose_run(runs["sac"], rows=15)
    with pytest.raises(ConfigurationError, match=r"rows=1,000,000 is more than the .* transitions of the replay"):
        diagnose_run(runs["sac"], rows=1_000_000)


def test_the_command_itself_says_what_it_takes() -> None:
    told = run("--help", verb="diagnose")
    assert told.returncode == 0 and "factory" in told.stdout
    assert "loaded without unpickling code" in " ".join(told.stdout.split())
    refused = run(verb="diagnose")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "nothing was given" in refused.stderr
