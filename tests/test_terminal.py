"""What is drawn on a terminal fits it."""

from __future__ import annotations

import io

from rich.console import Console

from rlplastic.terminal import Status, View

STATUS = Status(
    step=3000,
    minutes=1.2,
    env_steps=6000,
    max_minutes=None,
    updates=1049,
    env_steps_per_s=100,
    updates_per_s=25,
    replay_ratio=0.25,
)


def test_the_bar_does_not_push_the_first_row_off_the_screen() -> None:
    """A progress bar ends without a new line: what follows it must begin one."""
    file = io.StringIO()
    with View(console=Console(force_terminal=True, width=120, file=file, color_system=None)) as view:
        view.update(STATUS)
    rows = file.getvalue().split("\n")
    assert any(row.startswith("step 3,000 (50.0%, 30s left)") for row in rows)
    assert any(row.startswith("updates 1,049") for row in rows)
