"""What a grid of treated and untreated runs says: who recovers, who is harmed, and what the monitor decided.

    python benchmarks/treatments.py benchmarks/priming_sac [--healthy pendulum]

Reads the grid's ``results.csv`` and ``curves/``, and each run's ``plasticity.jsonl`` while its directory is there;
writes ``decisions.csv`` (a row per run) and ``treatments.md``. A run's *late return* is the mean of its evaluations in
the last quarter of its steps: a single evaluation of plain SAC moves by more than any treatment. Differences, with 95 %
t intervals, and the share of the unprimed agent's late return are those of the same seeds. Interventions in tasks named
by ``--healthy``, and in arms named ``...unprimed``, are false ones.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import statistics
from collections import Counter
from pathlib import Path

from grid_results import Result, interval, read_results, read_table, replace_file, with_interval

EVENTS = (
    "alarm",
    "probe",
    "false_alarm",
    "branch",
    "extended",
    "committed",
    "dropped",
    "kept",
    "taken_back",
    "scheduled",
)
"""Counted in ``plasticity.jsonl``; a false alarm is a probe that an alarm led to and that found nothing."""
UNTREATED, UNPRIMED = "untreated", "unprimed"
Returns = dict[tuple[str, str], dict[int, float]]
"""By task and arm, then by seed."""


def late_return(directory: Path, run: Result) -> float:
    """Mean of the evaluations in the last quarter of a run's steps."""
    table = read_table(directory / "curves" / f"{run.name}.csv")
    last = 0.75 * float(table["step"][-1])
    return float(table["return_mean"][table["step"] >= last].mean())


def decisions(path: Path) -> dict[str, object]:
    """Events of a run by kind, what was committed and at which update, and what probes and branches cost."""
    counts: Counter[str] = Counter()
    committed, spent = [], 0.0
    for line in path.read_text(encoding="utf-8").splitlines():
        event = json.loads(line)
        counts[event["event"]] += 1
        counts["false_alarm"] += bool(event.get("false_alarm"))
        spent = max(spent, event.get("spent_updates", 0.0))
        if event["event"] == "committed":
            committed.append(f"{event['intervention']} of the {event['patient']} at {event['updates']}")
    return {name: counts[name] for name in EVENTS} | {"what": "; ".join(committed), "spent_updates": round(spent)}


def update_decisions(directory: Path, runs: list[Result]) -> dict[str, dict[str, str]]:
    """``decisions.csv`` by run: new rows of runs whose directory is there, older ones of those whose is not."""
    path = directory / "decisions.csv"
    rows: dict[str, dict[str, str]] = {}
    if path.exists():
        rows = {row["run"]: row for row in csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")))}
    for run in runs:
        log = directory / "runs" / run.name / "plasticity.jsonl"
        if log.exists():
            rows[run.name] = {"run": run.name} | {key: str(value) for key, value in decisions(log).items()}
    text = io.StringIO()
    writer = csv.DictWriter(text, ("run", *EVENTS, "what", "spent_updates"), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows[name] for name in sorted(rows))
    replace_file(path, text.getvalue())
    return rows


def paired(mine: dict[int, float], other: dict[int, float]) -> str:
    """Mean difference over the seeds that both have, with its interval."""
    differences = [value - other[seed] for seed, value in mine.items() if seed in other]
    return with_interval(*interval(differences)) if differences else ""


def table(late: Returns, areas: Returns, decided: dict[str, dict[str, str]]) -> list[str]:
    """Rows of ``treatments.md``."""
    lines = [
        "| task | arm | seeds | late return | of unprimed | against untreated | area | area against untreated "
        "| interventions | false alarms |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (task, arm), returns in late.items():
        healthy = late.get((task, UNPRIMED), {})
        common = [seed for seed in returns if seed in healthy]
        base = statistics.fmean(healthy[seed] for seed in common) if common else math.nan
        share = statistics.fmean(returns[seed] for seed in common) / base if base > 0 else math.nan
        rows = [decided[name] for seed in returns if (name := f"{task}__{arm}__{seed}") in decided]
        done = ", ".join(str(int(row["committed"]) + int(row["scheduled"]) // 2) for row in rows)
        false = ", ".join(row["false_alarm"] for row in rows)
        cells = (
            *(task, arm, str(len(returns)), with_interval(*interval(list(returns.values())))),
            f"{share:.2f}" if math.isfinite(share) else "",
            "" if arm == UNTREATED else paired(returns, late.get((task, UNTREATED), {})),
            with_interval(*interval(list(areas[task, arm].values()))),
            "" if arm == UNTREATED else paired(areas[task, arm], areas.get((task, UNTREATED), {})),
            *(done, false),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--healthy", nargs="*", default=[], help="tasks in which nothing is ill")
    arguments = parser.parse_args()
    directory: Path = arguments.directory
    runs = [run for run in read_results(directory / "results.csv").values() if run.complete]
    decided = update_decisions(directory, runs)
    late: Returns = {}
    areas: Returns = {}
    for run in runs:
        late.setdefault((run.task, run.arm), {})[run.seed] = late_return(directory, run)
        areas.setdefault((run.task, run.arm), {})[run.seed] = run.area
    acted = [
        run.name
        for run in runs
        if (run.task in arguments.healthy or run.arm.endswith(UNPRIMED))
        and int(decided.get(run.name, {}).get("committed", 0))
    ]
    lines = [f"# Treatments: {directory.name}", "", *table(late, areas, decided), ""]
    lines += [
        "Interventions and false alarms by seed; scheduled ones treat actor and critic at once and count once.",
        f"False interventions (committed where nothing was ill): {', '.join(acted) or 'none'}.",
    ]
    replace_file(directory / "treatments.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
