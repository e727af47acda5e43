"""What a run shows while it runs: a live view on a terminal, plain lines anywhere else; warnings go to standard error.

Every number of a run comes from the caller; clocks are read for the elapsed time of the live view and for the bar of
`View.track`. Plain output is ASCII without control characters, one line per `View.update`, so a log file reads as well
as the live view. A reader that went away, or a full disk behind ``>``, silences the output and nothing else.
"""

from __future__ import annotations

import dataclasses
import io
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import IO, TextIO, TypeVar, cast

import rich.progress
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

T = TypeVar("T")

REFRESHES_PER_SECOND = 4.0
"""Of the live view, by a thread that only reads: enough to see that something moves, at a cost nobody notices."""
LIVE_ROWS = (
    ("step", "return", "env steps/s"),
    ("updates", "eval", "updates/s"),
    ("replay ratio", "critic loss", "alpha"),
)
"""The numbers of the live view; in their widest form its rows still fit 80 columns."""


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
    env_steps_per_s: float | None
    updates_per_s: float | None
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
        if self.env_steps is not None and self.env_steps_per_s:
            left.append((self.env_steps - self.step) / self.env_steps_per_s)
        if self.max_minutes is not None:
            left.append((self.max_minutes - self.minutes) * 60)
        return max(min(left), 0.0) if left else None


@dataclass(frozen=True)
class Moment:
    """What moves between two updates of a view; the fields are those of `Status`."""

    phase: str
    """A word for what the run is doing."""
    step: int
    minutes: float
    updates: int


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
        self._status: Status | None = None
        self._look: Callable[[], Moment] | None = None
        self._phase: str | None = None
        self._spinner = Spinner("line")
        self._started = self._console.get_time()
        self._live: Live | None = None
        # Asked here, since the live view replaces sys.stderr.
        self._warns_here = sys.stderr.isatty()
        if live and not quiet and self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(
                console=self._console,
                get_renderable=self._render,
                refresh_per_second=REFRESHES_PER_SECOND,
                redirect_stderr=self._warns_here,
            )

    def watch(self, look: Callable[[], Moment], status: Status) -> None:
        """Keep a live view moving between updates; plain output takes no notice.

        Args:
            look: called a few times a second from another thread: it may read plain numbers and do nothing else.
            status: shown until the first `update`.
        """
        self._look, self._status = look, status

    def update(self, status: Status) -> None:
        """Show the present state: redraw the live view, or print one line."""
        if self.quiet:
            return
        self._status = status
        if self._live is None:
            _print_plain(self._console.file, plain_line(status))
        else:
            self._live.refresh()

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """A live view says ``phase``, such as ``evaluating``, until the block ends."""
        self._phase = phase
        try:
            yield
        finally:
            self._phase = None

    def note(self, sentence: str) -> None:
        """Print a sentence that stays, such as an evaluation, a checkpoint or a decision."""
        if self.quiet:
            return
        if self._live is None:
            _print_plain(self._console.file, sentence)
        else:
            self._console.print(Text(sentence), soft_wrap=True)

    def warn(self, sentence: str) -> None:
        """Print ``warning: <sentence>`` to standard error; shown even by a quiet view."""
        line = f"warning: {sentence}"
        if self._live is not None and self._live.is_started and self._warns_here:
            self._console.print(Text(line), soft_wrap=True)  # above the live view, not through it
        else:
            _print_plain(unfailing(sys.stderr), line)

    def track(self, items: Sequence[T], what: str) -> Iterable[T]:
        """``items``, with a progress bar in front of a live view, and after a line of announcement elsewhere."""
        if self.quiet:
            return items
        if self._live is None:
            self.note(f"{what}: {len(items):,}")
            return items
        return rich.progress.track(items, description=what, console=self._console, transient=True)

    def __enter__(self) -> View:
        self._started = self._console.get_time()
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._status, self._look = self._now()[0], None  # the last picture stays: it shows no activity
            self._live.stop()

    def _now(self) -> tuple[Status | None, Moment | None]:
        """The last status with what has moved since; called by the refreshing thread, too, so it only reads."""
        status, look = self._status, self._look
        if status is None or look is None:
            return status, None
        moment = look()
        moved = dataclasses.replace(status, step=moment.step, minutes=moment.minutes, updates=moment.updates)
        return moved, moment

    def _render(self) -> Group:
        """The picture of this moment: the bar over the budget, what goes on, and the numbers; none of it ever wraps."""
        status, moment = self._now()
        line = [f"{duration(self._console.get_time() - self._started)} elapsed"]
        if status is None:
            return Group(Text(line[0]))
        picture: list[RenderableType] = []
        if status.fraction is not None:
            # Padding ends the line, which the bar itself does not.
            picture.append(Padding(ProgressBar(total=1.0, completed=status.fraction), 0))
            line += [f"{status.fraction:.1%} done", f"{duration(status.seconds_left)} left"]
        head = Table.grid(padding=(0, 1))
        if moment is None:
            head.add_row(Text("   ".join(line)))
        else:
            phase = self._phase or moment.phase
            head.add_row(self._spinner, Text.assemble((f"{phase:<10}", "bold"), "   ", "   ".join(line)))
        table = Table.grid(padding=(0, 2))
        values = dict(_fields(status)) | {"step": f"{status.step:,}"}
        for row in LIVE_ROWS:
            table.add_row(*(Text.assemble((f"{name} ", "dim"), (values[name], "bold")) for name in row))
        for column in (*head.columns, *table.columns):
            column.no_wrap, column.overflow = True, "ellipsis"
        return Group(*picture, head, table)


class _Unfailing(io.TextIOBase):
    """A text stream that loses what cannot be written, and says nothing."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()


def unfailing(stream: IO[str]) -> TextIO:
    """``stream``, but a failing write is no error: ``| head`` or a full disk must not end what goes on behind it."""
    return cast(TextIO, _Unfailing(stream))


def standard_console() -> Console:
    """Standard output, a terminal only if it is one: variables that force colour must not put control codes in logs."""
    return Console(file=unfailing(sys.stdout), force_terminal=sys.stdout.isatty(), highlight=False)


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
        _print_plain(console.file, f"{what:<{widths[0]}}  {value:<{widths[1]}}  {reason}".rstrip())


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
        ("env steps/s", _number(status.env_steps_per_s, ",.0f")),
        ("updates/s", _number(status.updates_per_s, ",.1f")),
        ("updates", f"{status.updates:,}"),
        ("replay ratio", f"{status.replay_ratio:.4g}"),
        ("critic loss", _number(status.critic_loss, ".4g")),
        ("alpha", _number(status.alpha, ".3g")),
    ]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _print_plain(file: IO[str], text: str) -> None:
    """Past rich, which would wrap at a guessed width; a stream that knows ASCII only gets question marks."""
    encoding = getattr(file, "encoding", None) or "utf-8"
    printable = "".join(character if character.isprintable() else " " for character in text)
    print(printable.encode(encoding, "replace").decode(encoding), file=file, flush=True)
