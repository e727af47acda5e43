"""The report as one HTML page that needs nothing else: no network, figures inline, dark or light as its reader is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

from rlplastic.analysis import style
from rlplastic.analysis.arms import Arm, Row, differences

MOST_EVENTS = 200
"""Rows of a table of the monitor's events."""

DIPS = {
    "changes": "switches, interventions",
    "dip": "depth",
    "dip area": "return × transitions",
    "recovery": "transitions (share)",
}
"""Columns of runs with switches or interventions."""


class Picture(NamedTuple):
    """A figure on the page: a heading, its SVG element, and how to read it."""

    title: str
    svg: str
    caption: str


@dataclass(frozen=True)
class Section:
    """A part of the page below a heading: a task and its arms, or all tasks together (no arms)."""

    title: str
    pictures: Sequence[Picture]
    arms: Sequence[Arm] = ()


class Cell(NamedTuple):
    """What a cell shows, and what its column is sorted by."""

    html: str
    key: float | str


def page(rows: Sequence[Row], sections: Sequence[Section], colours: Mapping[str, Mapping[str, str]]) -> str:
    """The whole document.

    Args:
        rows: results, one per arm, for the table on top.
        sections: in their order.
        colours: of arms by label.
    """
    runs, tasks = sum(row.seeds for row in rows), len({row.task for row in rows})
    counted = f"{_count(runs, 'run')} · {_count(len(rows), 'arm')} · {_count(tasks, 'task')}"
    links = "".join(f'<a href="#s{i}">{escape(section.title)}</a>' for i, section in enumerate(sections))
    body = "".join(_section(i, section) for i, section in enumerate(sections))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>rlplastic report: {counted}</title>
<style>{_css()}</style>
</head>
<body>
<header><h1>Report</h1><p>{counted}</p><nav>{links}</nav></header>
<main>
<section>{results_table(rows, colours)}{_explanation(rows)}</section>
{body}</main>
<script>{SCRIPT}</script>
</body>
</html>
"""


def results_table(rows: Sequence[Row], colours: Mapping[str, Mapping[str, str]]) -> str:
    """The summary: a row per arm, sortable by a click on a heading."""
    changed = any(row.changes for row in rows)
    heads = {
        "task": "",
        "arm": "",
        "seeds": "",
        "final return": "mean [95 % interval]",
        "interquartile mean": "[95 % interval]",
        "area under the curve": "mean [95 % interval]",
        **(DIPS if changed else {}),
        "transitions": "",
        "updates": "",
        "training time": "",
        "wall time": "",
    }
    lines = []
    for row in rows:
        chip = f'<i style="background: var({style.variable(colours[row.arm]["color"])})"></i>'
        unfinished = row.seeds - row.finished
        cells = (
            Cell(escape(row.task), row.task),
            Cell(chip + escape(row.arm), row.arm),
            Cell(f"{row.seeds}" + (f" <small>({unfinished} unfinished)</small>" if unfinished else ""), row.seeds),
            _interval(row.return_mean, row.return_low, row.return_high),
            _interval(row.return_iqm, row.iqm_low, row.iqm_high),
            _interval(row.area_mean, row.area_low, row.area_high),
            *(_dip_cells(row) if changed else ()),
            Cell(f"{row.steps:,.0f}", row.steps),
            Cell(f"{row.updates:,.0f}", row.updates),
            Cell(duration(row.train_seconds), row.train_seconds),
            Cell(duration(row.wall_seconds), row.wall_seconds),
        )
        lines.append("".join(f'<td data-key="{escape(str(cell.key))}">{cell.html}</td>' for cell in cells))
    head = "".join(
        f'<th><button type="button">{name}</button>{f"<small>{below}</small>" if below else ""}</th>'
        for name, below in heads.items()
    )
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return (
        f'<div class="wide"><table class="sortable"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def number(value: float) -> str:
    """Four significant digits below a thousand, whole numbers above; ``–`` for none."""
    if not math.isfinite(value):
        return "–"
    return (f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}").replace("-", "\N{MINUS SIGN}")


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever reads best."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def _interval(middle: float, low: float, high: float) -> Cell:
    spread = f" <small>[{number(low)}, {number(high)}]</small>" if math.isfinite(low) else ""
    return Cell(number(middle) + spread, middle)


def _dip_cells(row: Row) -> tuple[Cell, ...]:
    """What switches and interventions cost, in the order of `DIPS`."""
    time = f"{number(row.recovery_steps)} <small>({row.recovered:.0%})</small>" if row.changes else "–"
    return (
        Cell(number(row.changes), row.changes),
        Cell(number(row.dip_depth), row.dip_depth),
        Cell(number(row.dip_area), row.dip_area),
        Cell(time, row.recovery_steps),
    )


def _count(number_of: int, what: str) -> str:
    return f"{number_of} {what}{'' if number_of == 1 else 's'}"


def _explanation(rows: Sequence[Row]) -> str:
    few = min((row.seeds for row in rows), default=0)
    sentences = [
        "Returns are undiscounted means of every seed's newest evaluation of the deterministic policy; the area under "
        "the evaluation curve is divided by its length; counters and times are means over seeds.",
        "Intervals are 95 % stratified-bootstrap intervals over seeds (arXiv 2108.13264).",
    ]
    if any(row.changes for row in rows):
        sentences.append(
            "A dip is how far, and how long, evaluations fell below the mean of the last three before a switch of the "
            "task or an intervention of the monitor, until the next; recovery is the time until the first that is as "
            "good again, of the share of dips that have one."
        )
    if few < 5:
        sentences.append("With fewer than five seeds they are narrower than they should be; a single seed has none.")
    return f'<p class="note">{" ".join(sentences)}</p>'


def _section(index: int, section: Section) -> str:
    figures = "".join(
        f"<figure><h3>{escape(picture.title)}</h3><div class='wide'>{picture.svg}</div>"
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
        for picture in section.pictures
    )
    return (
        f'<section id="s{index}"><h2>{escape(section.title)}</h2>{figures}{_events(section.arms)}'
        f"{_settings(section.arms)}</section>\n"
    )


def _events(arms: Sequence[Arm]) -> str:
    """What the monitor suspected, tried and did, in its own words."""
    told = [
        (
            arm.label,
            str(run.seed),
            f"{record.step:,}",
            f"{record.updates:,}",
            record.event.replace("_", " "),
            record.sentence,
        )
        for arm in arms
        for run in arm.runs
        for record in run.records
        if record.sentence
    ]
    if not told:
        return ""
    rest = (
        f"<p class='note'>{len(told) - MOST_EVENTS:,} more are in plasticity.jsonl.</p>"
        if len(told) > MOST_EVENTS
        else ""
    )
    table = _plain_table(("arm", "seed", "transitions", "updates", "what", "in words"), told[:MOST_EVENTS])
    return f"<details open><summary>What the plasticity monitor saw and did</summary>{table}{rest}</details>"


def _settings(arms: Sequence[Arm]) -> str:
    """Where the arms' configurations differ, and which runs they are."""
    if not arms:
        return ""
    different = [(key, *values) for key, values in differences(arms).items()]
    table = _plain_table(("setting", *(arm.label for arm in arms)), different) if different else ""
    runs = _plain_table(
        ("arm", "seed", "run", "state"),
        [
            (arm.label, str(run.seed), str(run.path), "finished" if run.finished else "unfinished")
            for arm in arms
            for run in arm.runs
        ],
    )
    return f"<details><summary>Runs, and how their settings differ</summary>{runs}{table}</details>"


def _plain_table(heads: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return _table(head, body)


def _table(head: str, body: str, kind: str = "") -> str:
    table = f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="wide">{table}</div>'


def _css() -> str:
    light, dark = (
        ";".join(f"{name}:{value}" for name, value in style.variables(dark).items()) for dark in (False, True)
    )
    ink, faint, paper = (style.variable(colour) for colour in (style.INK, style.FAINT, style.PAPER))
    return f"""
:root {{ color-scheme: light dark; {light}; --font: system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }}
@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: var({paper}); color: var({ink}); font: 15px/1.5 var(--font); }}
header, main {{ max-width: 1240px; margin: 0 auto; padding: 0 28px; }}
header {{ padding-top: 30px; }}
h1 {{ font-size: 28px; margin: 0; letter-spacing: -0.01em; }}
header p {{ margin: 2px 0 12px; opacity: 0.7; }}
nav a {{ display: inline-block; margin: 0 8px 8px 0; padding: 2px 12px; border: 1px solid var({faint});
  border-radius: 99px; color: inherit; text-decoration: none; font-size: 13px; }}
h2 {{ font-size: 21px; margin: 44px 0 4px; padding-top: 14px; border-top: 1px solid var({faint}); }}
h3 {{ font-size: 15px; margin: 22px 0 6px; }}
figure {{ margin: 0; }}
figure svg {{ display: block; width: 100%; min-width: 760px; height: auto; }}
figcaption, .note {{ font-size: 13px; opacity: 0.72; max-width: 78em; margin: 6px 0 0; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; margin: 12px 0;
  min-width: 60%; }}
th {{ text-align: left; vertical-align: bottom; font-weight: 600; border-bottom: 2px solid var({faint});
  padding: 4px 12px 4px 0; }}
th small {{ display: block; font-weight: 400; opacity: 0.65; white-space: nowrap; }}
td {{ border-bottom: 1px solid var({faint}); padding: 5px 12px 5px 0; white-space: nowrap; }}
.sortable td:nth-child(2) {{ white-space: normal; min-width: 90px; }}
details td {{ white-space: normal; vertical-align: top; }}
td i {{ display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 7px; }}
td small {{ opacity: 0.72; }}
th button {{ all: unset; cursor: pointer; white-space: nowrap; }}
th button:hover, th button:focus-visible {{ text-decoration: underline; }}
th[aria-sort=ascending] button::after {{ content: " ↑"; }}
th[aria-sort=descending] button::after {{ content: " ↓"; }}
details {{ margin: 18px 0 0; }}
summary {{ cursor: pointer; font-weight: 600; }}
section:last-of-type {{ margin-bottom: 60px; }}
"""


SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const sign = head.getAttribute("aria-sort") === "descending" ? 1 : -1;
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const key = row => row.cells[column].dataset.key;
    const compare = (a, b) => isNaN(key(a)) || isNaN(key(b)) ? key(a).localeCompare(key(b)) : key(a) - key(b);
    const rows = [...table.tBodies[0].rows].sort((a, b) => sign * compare(a, b));
    table.tBodies[0].append(...rows);
  }));
}
"""
