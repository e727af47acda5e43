"""The report: the same files every time, a page that needs nothing else, readable in a real browser; bad input."""

from __future__ import annotations

import csv
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made_runs import made_run, made_sweep

from rlplastic import report
from rlplastic.command_line import run_verb

TASKS = ("Hopper-v5", "Pendulum-v1")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
VOID = {"meta", "br", "path", "use", "rect"}


def written(runs: str | Path, out: Path) -> Path:
    report.main([f"runs={runs}", f"out={out}"])
    return out


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_sweep(tmp_path_factory.mktemp("sweep") / "runs", seeds=2)


@pytest.fixture(scope="module")
def made(sweep: Path) -> Path:
    return written(sweep, sweep.parent / "report")


def test_a_sweep_over_tasks_has_a_section_for_each_and_one_for_all(made: Path) -> None:
    page = (made / "index.html").read_text()
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["All tasks", *TASKS]
    names = ("curves", "results", "plasticity", "training", "norms", "time")
    expected = {"all_tasks"} | {f"{task}_{name}" for task in TASKS for name in names}
    for kind in ("png", "svg"):
        assert {path.stem for path in (made / "figures").glob(f"*.{kind}")} == expected
    assert page.count("<svg ") == len(expected)


def test_dips_are_columns_where_something_changed_and_nowhere_else(made: Path, tmp_path: Path) -> None:
    page, rows = (made / "index.html").read_text(), json.loads((made / "results.json").read_text())["arms"]
    assert "switches, interventions" in page and {row["changes"] for row in rows} == {1.0}
    made_run(tmp_path / "run")
    report.main([f"runs={tmp_path / 'run'}", f"out={tmp_path / 'plain'}"])
    assert "switches, interventions" not in (tmp_path / "plain" / "index.html").read_text()


@pytest.mark.slow
def test_the_same_runs_give_the_same_files(sweep: Path, made: Path, tmp_path: Path) -> None:
    again = written(sweep, tmp_path / "report")
    files = sorted(path.relative_to(made) for path in made.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert [file for file in files if (made / file).read_bytes() != (again / file).read_bytes()] == []


class Elements(HTMLParser):
    """Every attribute that could name another file, and whether elements are closed as they were opened."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.references += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.references += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def test_the_page_needs_no_other_file_and_no_network(made: Path) -> None:
    page = (made / "index.html").read_text()
    elements = Elements()
    elements.feed(page)
    assert elements.open == [] and elements.references
    assert all(reference.startswith("#") for reference in elements.references)
    assert set(re.findall(r"url\((.)", page)) == {"#"} and "@import" not in page and "fetch(" not in page


def test_colours_of_figures_follow_the_theme_of_the_page(made: Path) -> None:
    page = (made / "index.html").read_text()
    drawn = "".join(re.findall(r"<svg .*?</svg>", page, re.DOTALL))
    assert set(re.findall(r"#[0-9a-f]{6}\b", drawn)) <= {"#ffffff", "#101214"}, "numbers in bars, on colours"
    used = set(re.findall(r"var\((--[\w-]+)\)", page))
    light, dark = (set(re.findall(r"(--[\w-]+):", part)) for part in re.findall(r":root \{([^}]*)\}", page))
    assert used <= light and light - dark == {"--font"}
    for figure in (made / "figures").glob("*.svg"):
        assert "var(" not in figure.read_text()


def test_words_from_outside_are_text_and_no_markup(tmp_path: Path) -> None:
    name = "<b>run</b>&\"'"
    made_run(
        tmp_path / name,
        settings={"env.task": "<i>Task</i>"},
        records=[{"event": "kept", "step": 1, "updates": 1, "sentence": "<script>alert(1)</script>"}],
    )
    page = (written(tmp_path, tmp_path / "out") / "index.html").read_text()
    assert "<script>alert" not in page and "<i>Task" not in page and "<b>run" not in page
    assert html.escape(name) in page and "&lt;script&gt;alert(1)" in page


def test_results_are_a_table_and_a_document_too(made: Path) -> None:
    with open(made / "results.csv") as file:
        rows = list(csv.DictReader(file))
    document = json.loads((made / "results.json").read_text())["arms"]
    assert [(row["task"], row["arm"]) for row in rows] == [(task, arm) for task in TASKS for arm in ("flashsac", "sac")]
    for row, arm in zip(rows, document, strict=True):
        assert float(row["return_mean"]) == arm["return_mean"] and arm["settings"]["env.task"] == row["task"]
        assert float(row["return_low"]) <= float(row["return_mean"]) <= float(row["return_high"])
        assert [run["seed"] for run in arm["runs"]] == [0, 1]


def test_one_run_that_has_only_begun_makes_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made_run(tmp_path / "evaluated", returns=[3.0], finished=False)
    made_run(tmp_path / "not", task="Ant-v5", returns=[], finished=False)
    for path in (*(tmp_path / "not").glob("*tfevents*"), *(tmp_path / "not").glob("*.csv")):
        path.unlink()
    out = written(f"{tmp_path}/evaluated,{tmp_path}/not", tmp_path / "out")
    captured = capsys.readouterr()
    assert "(1 unfinished)" in (out / "index.html").read_text()
    assert json.loads((out / "results.json").read_text())["arms"][0]["return_mean"] is None
    assert "not has no evaluation yet" in captured.err and captured.err.count("\n") == 1
    assert f"page: {out}/index.html" in captured.out.replace("\n", "")


def test_what_the_monitor_did_is_told_in_its_words(made: Path) -> None:
    page = (made / "index.html").read_text()
    assert page.count("reset &lt;kept&gt; &amp; verified") == 8
    assert "critic probe ratio" in page and "trunk" not in page


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "missing runs=…"),
        (["runs=nowhere"], "runs=nowhere matches no run: looked for config.yaml in"),
        (["runs={}/damaged"], "matches no run that can be read"),
        (["runs={}/good", "out={}/good/config.yaml"], "config.yaml cannot be written"),
        (["run={}/good"], "did you mean 'runs'?"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_two(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    made_run(tmp_path / "good")
    (made_run(tmp_path / "damaged") / "config.yaml").write_text("a: [")
    assert run_verb(report.main, [argument.replace("{}", str(tmp_path)) for argument in arguments]) == 2
    *_, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and sentence in error


PROBE = """
<script>
const boxes = svg => [...svg.querySelectorAll("text")].filter(t => t.textContent.trim()).map(
  t => [t.textContent, t.getBoundingClientRect()]);
const meet = (a, b) => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1;
const overlaps = [], outside = [];
for (const svg of document.querySelectorAll("figure svg")) {
  const all = boxes(svg), frame = svg.getBoundingClientRect();
  for (const [text, box] of all)
    if (box.left < frame.left - 2 || box.right > frame.right + 2) outside.push(text);
  all.forEach(([text, box], i) => all.slice(i + 1).forEach(
    ([other, second]) => meet(box, second) && overlaps.push(`${text} | ${other}`)));
}
const column = index => [...document.querySelectorAll("table.sortable tbody tr")].map(
  row => row.cells[index].dataset.key);
const head = document.querySelectorAll("table.sortable th button")[3];
head.click(); const falling = column(3);
head.click(); const rising = column(3);
document.title = JSON.stringify({overlaps, outside, falling, rising, wide: document.body.scrollWidth});
</script>
"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
def test_in_a_browser_no_text_overlaps_and_the_table_sorts(made: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text((made / "index.html").read_text().replace("</body>", PROBE + "</body>"))
    assert BROWSER is not None
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--window-size=1300,900",
        f"--user-data-dir={tmp_path}/home",
    ]
    shown = subprocess.run(
        [BROWSER, *flags, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    title = re.search(r"<title>(.*?)</title>", shown.stdout, re.DOTALL)
    assert title is not None
    seen = json.loads(html.unescape(title[1]))
    assert seen["overlaps"] == [] and seen["outside"] == []
    returns = sorted(arm["return_mean"] for arm in json.loads((made / "results.json").read_text())["arms"])
    assert [float(key) for key in seen["rising"]] == returns
    assert [float(key) for key in seen["falling"]] == returns[::-1]
    assert seen["wide"] <= 1300
