"""How well alarms and probes tell ill networks from healthy ones, where the truth is known.

    python benchmarks/detection.py benchmarks/illnesses

Reads ``truth.yaml`` (what is known of each case), ``curves/``, and ``plasticity.jsonl`` of the runs
``<case>__probed__<seed>`` while their directories are there; writes ``moments.csv`` (a row per probe of a critic: what
the probe and the screen's metrics said), ``detection.md`` and ``detection.png``.

A *moment* is one probe. Moments of healthy cases count as healthy, those of ill cases from ``sure`` on as ill, and what
lies between the beginning of the cause and that is not judged. The oracle is independent of the probe: a case is ill by
it where the runs ``<case>__reset__<seed>``, whose networks were reset once, end better than their untouched twins, the
95 % t interval of the paired differences lying above 0. Rules are calibrated on all cases but one and tried on that one
(leave one case out), so that no threshold is judged by the moments it was chosen on.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from grid_results import interval, read_table, replace_file, with_interval
from rlplastic.plasticity.monitor import SCREENS, Rules

Scores = Mapping[str, float]
RULES = Rules()
SCREENED = ("weight_factor", "rank_factor", "dormant")
"""Metrics beside the probe: weight norm and last layer's effective rank over those of a fresh critic, and a share."""

RATIOS = (0.25, 0.5, 1, 2, 4, 8)
"""Ticks of the picture."""


@dataclass(frozen=True)
class Moment:
    """What was said of a critic at one update; NaN where it was not read. The worst member counts."""

    case: str
    seed: int
    updates: int
    ratio: float
    """Area of the probe over a fresh network's."""
    gap: float
    """Area of the probe minus a fresh network's, of the member with the largest ratio."""
    weight_factor: float
    rank_factor: float
    dormant: float
    alarm: int
    """Whether an alarm stood."""
    truth: str
    """Of this moment, where the run itself tells: ``ill``, ``healthy``, ``open``; else empty."""

    @property
    def run(self) -> tuple[str, int]:
        """Case and seed."""
        return self.case, self.seed


@dataclass(frozen=True)
class Case:
    """A line of ``truth.yaml``."""

    truth: str
    why: str
    begins: int = 0
    sure: int = 0


def moments_of(path: Path, case: str, seed: int) -> list[Moment]:
    """The probes of a run's critic, with the newest reading of every metric at each."""
    found: list[Moment] = []
    newest: dict[str, float] = {}
    truths: dict[int, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        event = json.loads(line)
        if event["event"] == "measurement":
            newest |= screened(event["values"], event["fresh"])
        elif event["event"] == "truth":
            truths[event["updates"]] = {True: "ill", False: "healthy", None: "open"}[event["ill"]]
        elif event["event"] == "probe" and event["patient"] != "actor":
            members = zip(event["members"], event["areas"], event["fresh_areas"], strict=True)
            worst = max(members, key=lambda member: math.inf if member[0] is None else member[0])
            ratio, area, fresh = (math.inf if value is None else float(value) for value in worst)
            metrics = {name: newest.get(name, math.nan) for name in SCREENED}
            found.append(
                Moment(
                    case,
                    seed,
                    event["updates"],
                    ratio,
                    area - fresh,
                    **metrics,
                    alarm=int(bool(event["alarms"])),
                    truth="",
                )
            )
    return [Moment(**(asdict(moment) | {"truth": truths.get(moment.updates, "")})) for moment in found]


def screened(values: Mapping[str, float | None], fresh: Mapping[str, float | None]) -> dict[str, float]:
    """`SCREENED` as far as a measurement has them; what was not finite is as ill as it can be."""
    found: dict[str, float] = {}
    for name, value in values.items():
        parts = name.split("/")
        if len(parts) != 4 or parts[1] == "actor":
            continue
        whole, metric, normal = parts[2] == "all", parts[3], fresh.get(name) or math.nan
        known = value is not None and math.isfinite(value)
        if metric == "dormant" and whole:
            found["dormant"] = value if known else 1.0  # type: ignore[assignment]
        elif metric == "weight_norm" and whole:
            found["weight_factor"] = value / normal if known else math.inf  # type: ignore[operator]
        elif metric == "effective_rank":
            found["rank_factor"] = value / normal if known else 0.0  # type: ignore[operator]
    return found


def update_moments(directory: Path, cases: Iterable[str]) -> list[Moment]:
    """``moments.csv``: new rows of runs whose directory is there, older ones of those whose is not."""
    path, kinds = directory / "moments.csv", {field.name: field.type for field in fields(Moment)}
    rows: dict[tuple[str, int], list[Moment]] = defaultdict(list)
    if path.exists():
        parse: dict[object, Callable[[str], object]] = {"str": str, "int": int, "float": float}
        for row in csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))):
            moment = Moment(**{name: parse[kinds[name]](value) for name, value in row.items()})  # type: ignore[arg-type]
            rows[moment.run].append(moment)
    for case in cases:
        for log in sorted(directory.glob(f"runs/{case}__probed__*/plasticity.jsonl")):
            seed = int(log.parent.name.rpartition("__")[2])
            rows[case, seed] = moments_of(log, case, seed)
    ordered = [moment for run in sorted(rows) for moment in rows[run]]
    text = io.StringIO()
    writer = csv.DictWriter(text, kinds, lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(moment) for moment in ordered)
    replace_file(path, text.getvalue())
    return ordered


# Truth


def truth_of(moment: Moment, case: Case, oracle: str) -> bool | None:
    """Whether the critic is ill; None where it is not known."""
    if case.truth == "moments":
        return {"ill": True, "healthy": False}.get(moment.truth)
    truth = case.truth if case.truth != "unknown" else {"better": "ill", "not better": "healthy"}.get(oracle, "unknown")
    if truth == "healthy":
        return False
    return True if truth == "ill" and moment.updates >= case.sure else None


def reset_gains(directory: Path, case: str) -> list[float]:
    """Late return with one reset minus that of the untouched twin, by seed: means of the last quarter of the steps."""
    gains = []
    for path in sorted(directory.glob(f"curves/{case}__reset__*.csv")):
        twin = path.with_name(path.name.replace("__reset__", "__probed__"))
        if twin.exists():
            gains.append(_late(path) - _late(twin))
    return gains


def _late(path: Path) -> float:
    table = read_table(path)
    return float(table["return_mean"][table["step"] >= 0.75 * table["step"][-1]].mean())


def oracle_of(gains: Sequence[float]) -> str:
    """``better``, ``not better``, or ``open`` where fewer than two seeds tell."""
    if len(gains) < 2:
        return "open"
    mean, half_width = interval(gains)
    return "better" if mean - half_width > 0 else "not better"


# Judging


def area_under_roc(ill: Sequence[float], healthy: Sequence[float]) -> float:
    """Chance that an ill moment scores above a healthy one, ties counting half; NaN without either."""
    if not ill or not healthy:
        return math.nan
    pairs = np.asarray(ill)[:, None] - np.asarray(healthy)[None]
    return float((pairs > 0).mean() + (pairs == 0).mean() / 2)


def precision_and_recall(said: Sequence[bool], truth: Sequence[bool]) -> tuple[float, float]:
    """Of what was said to be ill, the share that is; of what is ill, the share that was said to be."""
    right = sum(a and b for a, b in zip(said, truth, strict=True))
    return (right / sum(said) if any(said) else math.nan), (right / sum(truth) if any(truth) else math.nan)


Rule = Callable[[Moment, tuple[float, ...]], bool]
CANDIDATES: dict[str, tuple[Rule, list[tuple[float, ...]], tuple[float, ...]]] = {
    "probe: ratio above, and gap above": (
        lambda moment, at: not (moment.ratio <= at[0] or moment.gap <= at[1]),
        list(
            product(np.round(np.arange(1.1, 3.01, 0.1), 2).tolist(), np.round(np.arange(0.0, 0.31, 0.02), 2).tolist())
        ),
        (RULES.ill, RULES.ill_gap),
    ),
    "screen: rank over a fresh network's below": (
        lambda moment, at: moment.rank_factor < at[0],
        [(value,) for value in np.round(np.arange(0.02, 0.61, 0.01), 2).tolist()],
        (SCREENS["effective_rank"].fresh,),
    ),
    "screen: weights over a fresh network's above": (
        lambda moment, at: moment.weight_factor > at[0],
        [(value,) for value in np.round(np.arange(1.0, 12.1, 0.25), 2).tolist()],
        (SCREENS["weight_norm"].fresh,),
    ),
}
"""What is calibrated: the rule, thresholds to choose from, and those that the monitor has."""


def calibrate(
    rule: Rule, candidates: list[tuple[float, ...]], judged: Sequence[tuple[Moment, bool]]
) -> tuple[float, ...]:
    """Thresholds of the highest balanced accuracy, every case weighing the same; of equally good ones the middle one.

    A case with many moments would otherwise drown the others.
    """
    groups: dict[tuple[str, bool], list[Moment]] = defaultdict(list)
    for moment, ill in judged:
        groups[moment.case, ill].append(moment)

    def accuracy(at: tuple[float, ...]) -> float:
        shares: dict[bool, list[float]] = {True: [], False: []}
        for (_, ill), moments in groups.items():
            shares[ill].append(sum(rule(moment, at) is ill for moment in moments) / len(moments))
        return sum(statistics.fmean(each) for each in shares.values() if each)

    scores = {at: accuracy(at) for at in candidates}
    best = [at for at in candidates if scores[at] >= max(scores.values()) - 1e-9]
    middle = [statistics.median(at[i] for at in best) for i in range(len(best[0]))]
    return min(best, key=lambda at: sum(abs(a - m) for a, m in zip(at, middle, strict=True)))


def left_out(
    rule: Rule, candidates: list[tuple[float, ...]], judged: Sequence[tuple[Moment, bool]]
) -> tuple[list[bool], list[tuple[float, ...]]]:
    """What the rule says of every judged moment when it is calibrated on the other cases, and its thresholds.

    Cases that leave no ill or no healthy moment to calibrate on are judged by thresholds of all, which is said.
    """
    thresholds: dict[str, tuple[float, ...]] = {}
    for case in dict.fromkeys(moment.case for moment, _ in judged):
        others = [(moment, ill) for moment, ill in judged if moment.case != case]
        enough = len({ill for _, ill in others}) == 2
        thresholds[case] = calibrate(rule, candidates, others if enough else judged)
    return [rule(moment, thresholds[moment.case]) for moment, _ in judged], list(thresholds.values())


# Telling


def is_said_ill(moment: Moment) -> bool:
    """The monitor's verdict at its present thresholds."""
    rule, _, at = CANDIDATES["probe: ratio above, and gap above"]
    return rule(moment, at)


def case_table(cases: Mapping[str, Case], moments: Sequence[Moment], gains: Mapping[str, list[float]]) -> list[str]:
    """A row per case: runs, alarms, verdicts, delays, the oracle."""
    lines = [
        "| case | truth beforehand | gain by a reset ± 95 % CI | seeds | runs with an alarm | runs judged ill "
        "| updates to the alarm | updates to the verdict | judged ill, of moments | why |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, case in cases.items():
        runs: dict[int, list[Moment]] = defaultdict(list)
        for moment in moments:
            if moment.case == name:
                runs[moment.seed].append(moment)
        if not runs:
            continue
        alarms = [first(each, lambda moment: bool(moment.alarm)) for each in runs.values()]
        verdicts = [first(each, is_said_ill) for each in runs.values()]
        every = [moment for each in runs.values() for moment in each]
        told = f"{sum(map(is_said_ill, every))} of {len(every)}"
        gain = with_interval(*interval(gains[name])) if gains[name] else ""
        cells = (
            name,
            case.truth,
            gain,
            len(runs),
            _count(alarms),
            _count(verdicts),
            _delay(alarms, case),
            _delay(verdicts, case),
        )
        lines.append(f"| {' | '.join(map(str, (*cells, told, case.why)))} |")
    return lines


def first(moments: Sequence[Moment], said: Callable[[Moment], bool]) -> int | None:
    """Updates at the first moment of which something is said; None without any."""
    return next((moment.updates for moment in moments if said(moment)), None)


def _count(found: Sequence[int | None]) -> str:
    return f"{sum(at is not None for at in found)}"


def _delay(found: Sequence[int | None], case: Case) -> str:
    """Mean from the beginning of the cause, over the runs that have one; healthy cases have no beginning."""
    known = [at - case.begins for at in found if at is not None]
    return f"{statistics.fmean(known):,.0f}" if known and case.truth != "healthy" else ""


def rule_table(judged: Sequence[tuple[Moment, bool]]) -> list[str]:
    """Precision, recall and false alarms of alarms, of the present thresholds, and of calibrated ones."""
    truth = [ill for _, ill in judged]
    lines = [
        "| rule | thresholds | precision | recall | false, of healthy moments |",
        "|---|---|---|---|---|",
    ]

    def row(name: str, at: str, said: Sequence[bool]) -> None:
        precision, recall = precision_and_recall(said, truth)
        false = sum(a and not b for a, b in zip(said, truth, strict=True))
        lines.append(f"| {name} | {at} | {precision:.2f} | {recall:.2f} | {false} of {truth.count(False)} |")

    row("alarms as they were raised", "", [bool(moment.alarm) for moment, _ in judged])
    for name, (rule, candidates, present) in CANDIDATES.items():
        row(f"{name}, as it is", _numbers(present), [rule(moment, present) for moment, _ in judged])
        said, folds = left_out(rule, candidates, judged)
        ranges = [f"{min(values):g} to {max(values):g}" for values in zip(*folds, strict=True)]
        fitted = calibrate(rule, candidates, judged)
        row(f"{name}, calibrated on the other cases", f"{', '.join(ranges)} (all: {_numbers(fitted)})", said)
    return lines


def _numbers(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def draw(judged: Sequence[tuple[Moment, bool]], path: Path) -> None:
    """Left: receiver operating characteristics; right: both sides of the probe's rule, moment by moment."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    scores: dict[str, Callable[[Moment], float]] = {
        "probe: ratio": lambda moment: moment.ratio,
        "probe: gap of areas": lambda moment: moment.gap,
        "effective rank, over a fresh network's": lambda moment: -moment.rank_factor,
        "weight norm, over a fresh network's": lambda moment: moment.weight_factor,
        "dormant units": lambda moment: moment.dormant,
    }
    for name, score in scores.items():
        ill, healthy = (
            [score(moment) for moment, truth in judged if truth is side and not math.isnan(score(moment))]
            for side in (True, False)
        )
        if ill and healthy:
            _roc(
                left,
                ill,
                healthy,
                f"{name}: {area_under_roc(ill, healthy):.2f} ({len(ill)} ill, {len(healthy)} healthy)",
            )
    left.plot([0, 1], [0, 1], ":", color="0.6")
    left.set(
        xlabel="healthy moments called ill", ylabel="ill moments called ill", title="by metric: area under the curve"
    )
    left.legend(fontsize="small", loc="lower right")
    for side, colour, name in ((False, "#0072b2", "healthy"), (True, "#d55e00", "ill")):
        points = [
            (moment.ratio, moment.gap) for moment, truth in judged if truth is side and math.isfinite(moment.ratio)
        ]
        right.plot(
            *zip(*points, strict=True) if points else ([], []), "o", color=colour, alpha=0.5, markersize=4, label=name
        )
    right.axvline(RULES.ill, color="0.3", linewidth=0.9)
    right.axhline(RULES.ill_gap, color="0.3", linewidth=0.9)
    right.set(
        xlabel="probe: area over a fresh network's",
        ylabel="area minus a fresh network's",
        xscale="log",
        title="ill: right of, and above the lines",
    )
    right.minorticks_off()
    right.set_xticks(RATIOS, [f"{ratio:g}" for ratio in RATIOS])
    right.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def _roc(panel: Axes, ill: Sequence[float], healthy: Sequence[float], label: str) -> None:
    """Shares beyond every threshold."""
    thresholds = [math.inf, *sorted({*ill, *healthy}, reverse=True)]
    shares = [[np.mean(np.asarray(side) >= threshold) for threshold in thresholds] for side in (healthy, ill)]
    panel.step(*shares, where="post", label=label)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    directory: Path = parser.parse_args().directory
    lines = OmegaConf.to_container(OmegaConf.load(directory / "truth.yaml"))
    cases = {str(name): Case(**line) for name, line in lines.items()}  # type: ignore[union-attr]
    moments = update_moments(directory, cases)
    gains = {name: reset_gains(directory, name) for name in cases}
    known = ((moment, truth_of(moment, cases[moment.case], oracle_of(gains[moment.case]))) for moment in moments)
    judged = [(moment, truth) for moment, truth in known if truth is not None]
    text = ["# Detection of illnesses", "", *case_table(cases, moments, gains), ""]
    text += [
        f"{len(moments)} probes of critics, of which {len(judged)} are judged: "
        f"{sum(truth for _, truth in judged)} ill, {sum(not truth for _, truth in judged)} healthy. Updates to the "
        "first alarm and verdict are means over the runs that have one, from the beginning of the cause, and no finer "
        "than probes. A gain is that of the late return by one reset of both networks, paired by seed.",
        "",
        *rule_table(judged),
        "",
        "`detection.png` shows the same by threshold.",
    ]
    replace_file(directory / "detection.md", "\n".join(text) + "\n")
    draw(judged, directory / "detection.png")
    print("\n".join(text))


if __name__ == "__main__":
    main()
