"""What a run shows while it runs: a live view on a terminal, plain lines anywhere else.

Every number of a run comes from the caller; only the bar of `View.track` reads a clock, for the time it has left. Plain
output is ASCII without control characters, one line per `View.update`, so a log file reads as well as the live view.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

import rich.progress
from rich.console import Console, Group
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

T = TypeVar("T")


@dataclass(frozen=True)
class Status:
    """Where a run stands; None means not known yet, or for a budget: no limit."""

    step: int
    """Environment transitions so far."""
    minutes: float
    """Minutes of training so far, evaluation excluded, all attempts together."""
    env_steps: int | None
    """Budget in environment transitions."""
    max_minutes: float | None
    """Budget in minutes."""
    updates: int
    """Gradient updates so far."""
    env_steps_per_s: float
    updates_per_s: float
    replay_ratio: float
    """Gradient updates per environment transition."""
    train_return: float | None = None
    """Mean return of the last training episodes."""
    train_episodes: int = 0
    """How many episodes that mean covers."""
    eval_return: float | None = None
    """Mean return of the last evaluation."""
    eval_ci95: float | None = None
    """Half the width of its 95 % confidence interval."""
    critic_loss: float | None = None
    alpha: float | None = None

    @property
    def fraction(self) -> float | None:
        """Used fraction of the budget that is nearer to its end, in [0, 1]; None without a budget."""
        used = []
        if self.env_steps is not None:
            used.append(self.step / max(self.env_steps, 1))
        if self.max_minutes is not None:
            used.append(self.minutes / max(self.max_minutes, 1e-9))
        return min(max(used), 1.0) if used else None

    @property
    def seconds_left(self) -> float | None:
        """Seconds of training until the first budget is spent, at the present rate; None where nobody can say."""
        left = []
        if self.env_steps is not None and self.env_steps_per_s > 0:
            left.append((self.env_steps - self.step) / self.env_steps_per_s)
        if self.max_minutes is not None:
            left.append((self.max_minutes - self.minutes) * 60)
        return max(min(left), 0.0) if left else None


class View:
    """The view of one run; a context manager, since a live view must give the terminal back.

    Args:
        live: False asks for plain lines on a terminal, too.
        console: where to show it; None: standard output.
        quiet: show nothing but warnings.
    """

    def __init__(self, live: bool = True, console: Console | None = None, quiet: bool = False) -> None:
        self._console = console or standard_console()
        self.quiet = quiet
        self._live: Live | None = None
        if live and not quiet and self._console.is_terminal and not self._console.is_dumb_terminal:
            # No refreshing thread: the view changes when the run says so.
            self._live = Live(console=self._console, auto_refresh=False)

    def update(self, status: Status) -> None:
        """Show the present state: redraw the live view, or print one line."""
        if self.quiet:
            return
        if self._live is None:
            _print_plain(self._console, plain_line(status))
        else:
            self._live.update(_renderable(status), refresh=True)

    def note(self, sentence: str) -> None:
        """Print a sentence that stays, such as an evaluation, a checkpoint or a decision."""
        if not self.quiet:
            self._print(sentence)

    def warn(self, sentence: str) -> None:
        """Print ``warning: <sentence>``, which stays; shown even by a quiet view."""
        self._print(f"warning: {sentence}")

    def _print(self, sentence: str) -> None:
        if self._live is None:
            _print_plain(self._console, sentence)
        else:
            self._console.print(Text(sentence), soft_wrap=True)

    def track(self, items: Sequence[T], what: str) -> Iterable[T]:
        """``items`` with a progress bar on a terminal, and one line of announcement elsewhere."""
        if self.quiet:
            return items
        if not self._console.is_terminal:
            self.note(f"{what}: {len(items):,}")
            return items
        return rich.progress.track(items, description=what, console=self._console, transient=True)

    def __enter__(self) -> View:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()


def standard_console() -> Console:
    """Standard output, a terminal only if it is one: variables that force colour must not put control codes in logs."""
    return Console(force_terminal=sys.stdout.isatty())


def banner(rows: Iterable[tuple[str, str, str]], console: Console | None = None) -> None:
    """Print what a run decided at its start as a table of (what, value, reason)."""
    console = console or standard_console()
    cells = [(what, value, reason) for what, value, reason in rows]
    if console.is_terminal and not console.is_dumb_terminal:
        table = Table("what", "value", "why", box=None, pad_edge=False, header_style="bold")
        for what, value, reason in cells:
            table.add_row(Text(what), Text(value, style="cyan"), Text(reason, style="dim"))
        console.print(table)
        return
    widths = [max((len(row[column]) for row in cells), default=0) for column in range(2)]
    for what, value, reason in cells:
        _print_plain(console, f"{what:<{widths[0]}}  {value:<{widths[1]}}  {reason}".rstrip())


def plain_line(status: Status) -> str:
    """One line of ASCII; fields keep their order and are separated by `` | ``, so it can be searched and cut."""
    return " | ".join(f"{name} {value}" for name, value in _fields(status))


def duration(seconds: float | None) -> str:
    """``2h05m``, ``3m20s`` or ``41s``; ``?`` when unknown."""
    if seconds is None:
        return "?"
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"


def _fields(status: Status) -> list[tuple[str, str]]:
    """(name, value) of everything both views show, in reading order."""
    fraction = "" if status.fraction is None else f" ({status.fraction:.1%}, {duration(status.seconds_left)} left)"
    interval = "" if status.eval_ci95 is None else f" +/- {status.eval_ci95:.4g}"
    episodes = f" ({status.train_episodes} episodes)" if status.train_episodes else ""
    return [
        ("step", f"{status.step:,}{fraction}"),
        ("return", _number(status.train_return, ".5g") + episodes),
        ("eval", _number(status.eval_return, ".5g") + interval),
        ("env steps/s", f"{status.env_steps_per_s:,.0f}"),
        ("updates/s", f"{status.updates_per_s:,.1f}"),
        ("updates", f"{status.updates:,}"),
        ("replay ratio", f"{status.replay_ratio:.4g}"),
        ("critic loss", _number(status.critic_loss, ".4g")),
        ("alpha", _number(status.alpha, ".3g")),
    ]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _renderable(status: Status) -> Group:
    """The bar over the budget above one row of names and one of values."""
    table = Table.grid(padding=(0, 3))
    fields = _fields(status)
    for half in (fields[:5], fields[5:]):
        table.add_row(*(Text.assemble((f"{name} ", "dim"), (value, "bold")) for name, value in half))
    if status.fraction is None:
        return Group(table)
    return Group(Padding(ProgressBar(total=1.0, completed=status.fraction), 0), table)


def _print_plain(console: Console, text: str) -> None:
    """Past rich, which would wrap at a guessed width; a stream that knows ASCII only gets question marks."""
    encoding = getattr(console.file, "encoding", None) or "utf-8"
    printable = "".join(character if character.isprintable() else " " for character in text)
    print(printable.encode(encoding, "replace").decode(encoding), file=console.file, flush=True)
