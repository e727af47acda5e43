"""Both curves on one plot: our two seeds and the recorded run of the published code at the same settings.

    python benchmarks/reference/plot.py

`published.csv` holds what the published FlashSAC code returned at these settings (8 envpool environments, width 64/32,
batch 256, 0.5 updates per transition, bf16 products), one seed, recorded by hand.
"""

from __future__ import annotations

import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent


def columns(path: Path) -> tuple[list[float], list[float]]:
    """Updates and mean returns of a CSV file with these columns."""
    with open(path, encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [float(row["updates"]) for row in rows], [float(row["return_mean"]) for row in rows]


def main() -> None:
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for number, path in enumerate(sorted((HERE / "curves").glob("*.csv"))):
        label = "rlplastic, seeds 0 and 1" if number == 0 else None
        axes.plot(*columns(path), color="tab:blue", marker="o", markersize=3, label=label, alpha=0.9)
    axes.plot(*columns(HERE / "published.csv"), color="tab:orange", marker="s", label="published code, one seed")
    axes.set_xlabel("critic updates")
    axes.set_ylabel("evaluation return")
    axes.set_title("HalfCheetah-v5, equal settings, equal updates")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(HERE / "comparison.png", dpi=120)


if __name__ == "__main__":
    main()
