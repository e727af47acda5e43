"""What `--help` says of a verb: its keys with their defaults, each explained by the docstring of its field."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from functools import cache

COLUMNS = 100
"""Width of help."""


@cache
def explained(schema: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, on one line; fields without one are left out."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(schema))).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for node, following in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(following, ast.Expr):
            found[node.target.id] = " ".join(str(ast.literal_eval(following.value)).split())
    return found


def verb_help(schema: type, verb: str) -> str:
    """Usage, what the verb does, and a line or more for each key: `key=…` must be given, `[key=default]` may be.

    Args:
        schema: the dataclass of its arguments; a field that is a dataclass has its fields listed as `key.field`.
        verb: as in `python -m rlplastic.<verb>`.
    """
    rows = list(_rows(schema))
    required = [left for left, _ in rows if not left.startswith("[")]
    return "\n".join(
        [
            " ".join([f"usage: python -m rlplastic.{verb}", *required, "[key=value …]"]),
            *textwrap.wrap(" ".join((inspect.getdoc(schema) or "").split()), COLUMNS),
            "",
            *aligned(rows),
        ]
    )


def aligned(rows: list[tuple[str, str]], indent: str = "  ") -> list[str]:
    """Two columns, of which the second is wrapped."""
    width = max(len(left) for left, _ in rows)
    lines = []
    for left, right in rows:
        first, *rest = textwrap.wrap(right, COLUMNS - width - len(indent) - 2) or [""]
        lines.append(f"{indent}{left:<{width}}  {first}".rstrip())
        lines += [" " * (len(indent) + width + 2) + line for line in rest]
    return lines


def spelled(value: object) -> str:
    """A default as it would be typed."""
    if isinstance(value, list):
        return "[" + ",".join(spelled(entry) for entry in value) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _rows(schema: type, prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    meanings = explained(schema)
    for name, default in vars(schema()).items():
        if dataclasses.is_dataclass(default):
            rows += _rows(type(default), f"{prefix}{name}.")
        else:
            given = "…" if default is None else spelled(default)
            required = default == "???"  # OmegaConf's MISSING, without its import
            rows.append((f"{prefix}{name}=…" if required else f"[{prefix}{name}={given}]", meanings.get(name, "")))
    return rows
