"""`python -m rlplastic.bench`: what cannot be measured is refused at once; a quick run ends with a table and JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlplastic.bench import main
from rlplastic.benchmarking import replay, update
from rlplastic.command_line import run_verb

FIELDS = ["what", "command", "processor", "cores", "device", "threads", "versions", "caption", "rows"]
COLUMNS = {
    "replay": ["batch", "n", "buffer", "us per sample", "times rlplastic's", "bytes per transition"],
    "loop": ["task", "envs", "threads", "raw envpool", "loop", "ratio"],
    "scaling": ["part", "size", "us", "relative", "of raw"],
    "monitor": ["agent", "width", "batch", "update ms", "forward ms", "ranks ms", "share"],
    "export": ["width", "runtime", "p50 us", "p99 us", "p99 below 1 ms"],
    "update": ["agent", "width", "batch", "precision", "compile", "graphs", "update ms", "floor ms", "ratio", "GFLOP"],
}
QUICK = ["quick=true", "repeats=2", "threads=1"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("", "missing what=…"),
        ("what=nope", "what='nope' cannot be measured; did you mean 'loop'?"),
        ("what=replay repeats=0", "repeats=0 is out of range; expected a number of 1 or more"),
        ("what=replay threads=-1", "threads=-1 is out of range; expected a number of 1 or more"),
        ("what=replay threads=many", "threads=many was refused"),
        ("what=update critic=flaw", "critic='flaw' cannot be measured; did you mean 'flow'"),
        ("what=replay quik=true", "did you mean 'quick'?"),
        ("what=replay out={folder}", "(Is a directory); move the folder away"),
        ("what=replay out={folder}/none/bench.json", "(No such file or directory); make the folder"),
        ("what=replay out=/proc/bench.json", "/proc/bench.json cannot be written"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is(
    arguments: str,
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(replay, "measure", lambda options: pytest.fail("it was measured"))
    assert run_verb(main, arguments.format(folder=tmp_path).split()) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", COLUMNS)
def test_a_quick_measurement_ends_with_a_table_and_the_same_as_json(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bench.json"
    file.write_text("an older one")
    main([f"what={what}", f"out={file}", *QUICK])
    document = json.loads(file.read_text())
    assert list(document) == FIELDS
    assert (document["what"], document["threads"]) == (what, 1)
    assert document["command"] == f"python -m rlplastic.bench what={what} out={file} quick=true repeats=2 threads=1"
    assert document["versions"]["torch"] != "not installed"
    assert document["rows"] and all(list(row) == COLUMNS[what] for row in document["rows"])
    for row in document["rows"]:
        assert all(value > 0 for value in row.values() if not isinstance(value, str))
    shown = capsys.readouterr().out
    assert f"written to {file}" in shown and "\u2026" not in shown, "no cell is cut off"
    assert list(tmp_path.iterdir()) == [file]


def test_flow_critics_are_measured_by_steps_and_noises_beside_the_others_of_both_agents(tmp_path: Path) -> None:
    main(["what=update", "critic=flow", f"out={tmp_path / 'bench.json'}", *QUICK])
    both = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [row["agent"] for row in both] == ["flashsac"] * 4 + ["sac"] * 4
    for rows in (both[:4], both[4:]):
        assert [(row["steps"], row["noises"]) for row in rows] == [(1, 1), (1, 2), (2, 1), (2, 2)]
        assert len({(row["categorical ms"], row["scalar ms"]) for row in rows}) == 1
        for row in rows:
            assert row["times categorical"] == pytest.approx(row["update ms"] / row["categorical ms"])
        work = [row["GFLOP"] for row in rows]
        assert work[0] < work[1] < work[3] and work[0] < work[2] < work[3]


def test_peers_that_are_not_installed_are_left_out_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(replay, "find_spec", lambda module: None)
    main(["what=replay", f"out={tmp_path / 'bench.json'}", *QUICK])
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [row["buffer"] for row in rows[:3]] == ["rlplastic", "rlplastic, float16", "rlplastic, int8"]
    assert all(row["buffer"].startswith("rlplastic") for row in rows)
    told = capsys.readouterr().err.splitlines()
    assert told == [
        f"{name} is not installed, and left out: pip install 'rlplastic[peers]'"
        for name in ("Stable-Baselines3", "TorchRL")
    ]


def test_the_floor_counts_matrix_products_and_nothing_else() -> None:
    """(a, b) @ (b, c) are 2abc operations; the first tensor of addmm is no factor."""
    import torch

    left, right, bias = torch.ones(3, 5), torch.ones(5, 7), torch.ones(7)
    products = update._products(
        lambda: (left @ right, torch.addmm(bias, left, right), left + 1, left.unsqueeze(0) @ right)
    )
    assert [update._flop(product) for product in products] == [2 * 3 * 5 * 7] * 3
