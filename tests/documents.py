"""What README.md and the pages of docs/ show in code blocks, and how commands of theirs are made cheap."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from rlplastic.command_line import override_key
from rlplastic.composition import compose
from rlplastic.training import name_of

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    path.name: path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}
CHEAP = (
    *(
        "preset=debug",
        "env_steps=300",
        "max_minutes=null",
        "compile=off",
        "threads=1",
        "env.threads=1",
        "env.num_envs=4",
    ),
    *("replay.minimum=100", "evaluation.every=0", "evaluation.final_episodes=1", "replay.batch_size=16"),
)
"""A training in seconds."""


@dataclass(frozen=True)
class Block:
    """A code block of a page."""

    page: str
    line: int
    language: str
    """`` of an indented block, which shows commands, a formula or paths."""
    text: str


@dataclass(frozen=True)
class Command:
    """A command line of a block, as a shell splits it."""

    page: str
    line: str
    words: tuple[str, ...]

    @property
    def module(self) -> str | None:
        """Of `python -m module`, also behind `torchrun`."""
        return self.words[self.words.index("-m") + 1] if "-m" in self.words[:-1] else None

    @property
    def arguments(self) -> list[str]:
        """What follows the module, or the program."""
        return list(self.words[self.words.index("-m") + 2 if self.module else 1 :])


def blocks(page: str) -> list[Block]:
    """All blocks of a page, fenced or indented, in their order."""
    found: list[Block] = []
    lines = PAGES[page].splitlines()
    at = 0
    while at < len(lines):
        fence = re.match(r" *```(\w*)$", lines[at])
        start = at
        if fence:
            at = lines.index(lines[at].replace(fence[1], ""), at + 1) if fence[1] else lines.index(lines[at], at + 1)
            found.append(Block(page, start + 1, fence[1] or "none", "\n".join(lines[start + 1 : at]) + "\n"))
        elif lines[at].startswith("    ") and not lines[at - 1].strip():
            while at < len(lines) and (lines[at].startswith("    ") or not lines[at].strip()):
                at += 1
            text = "\n".join(line[4:] for line in lines[start:at]).rstrip() + "\n"
            found.append(Block(page, start + 1, "", text))
            continue
        at += 1
    return found


def commands(block: Block, variables: dict[str, str]) -> list[Command]:
    """Its lines as bash splits them, with ``variables`` set: what is not quoted is expanded, as it would be there."""
    found = []
    for line in block.text.replace("\\\n", " ").splitlines():
        if line.strip():
            script = "while [[ $1 == [A-Z]*=* ]]; do shift; done; printf '%s\\0' \"$@\""
            setting = re.match(r"(?:[A-Z]+=\S+ )*", line)
            assert setting
            split = f"set -- {line[setting.end() :]}\n{script}"
            done = subprocess.run(["bash", "-c", split], env=variables, capture_output=True, text=True, check=True)
            found.append(Command(block.page, line, tuple(done.stdout.split("\0")[:-1])))
    return found


def made_cheap(overrides: list[str]) -> list[str]:
    """The same training in seconds, in the directory that the page's command would use."""
    flags = [word for word in overrides if "=" not in word]
    wanted = [word for word in overrides if "=" in word]
    replaced = {override_key(word) for word in CHEAP}
    kept = [word for word in wanted if override_key(word) not in replaced]
    named = [] if flags or any(word.startswith("name=") for word in kept) else [f"name={name_of(wanted, seed(wanted))}"]
    return [*flags, *kept, *CHEAP, *named]


def seed(overrides: list[str]) -> int:
    return compose(overrides).seed


def run(words: list[str], folder: Path, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *words], cwd=folder, env=variables, capture_output=True, text=True, check=False
    )
