"""The site has the folders of the repository: pages of the navigation, what they link to, and a reference.

So a link in a page means the same in a checkout, on a code host and on the site. mkdocs calls `on_files` with what it
found in docs/; the pages themselves are read from the root.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)")
"""The target of a Markdown link or image within the repository."""

REFERENCE = {
    "rlplastic": ("From Python", ["rlplastic", "rlplastic.training.Result", "rlplastic.policy.Policy"]),
    "settings": ("Settings", ["rlplastic.config", "rlplastic.plasticity_config"]),
    "environments": ("Environments", [f"rlplastic.envs.{name}" for name in ("base", "torch_adapter", "checker")]),
    "metrics": (
        "Metrics",
        [
            *("rlplastic.plasticity.measure", "rlplastic.plasticity.activations", "rlplastic.plasticity.profile"),
            *("rlplastic.plasticity.units", "rlplastic.plasticity.ranks", "rlplastic.plasticity.weights"),
            *("rlplastic.plasticity.gradients", "rlplastic.plasticity.curvature"),
            *("rlplastic.plasticity.representation", "rlplastic.plasticity.flow_diagnostics"),
        ],
    ),
    "interventions": (
        "Probe and interventions",
        [
            *("rlplastic.plasticity.patient", "rlplastic.plasticity.probe"),
            *(f"rlplastic.plasticity.interventions.{name}" for name in ("treatment", "resets", "units")),
            *(f"rlplastic.plasticity.interventions.{name}" for name in ("regularisers", "injection")),
            "rlplastic.plasticity.optimizers",
        ],
    ),
    "monitor": (
        "Monitor and replay ratio",
        [
            *("rlplastic.plasticity.monitor", "rlplastic.plasticity.decision_loop"),
            *("rlplastic.plasticity.recovery", "rlplastic.plasticity.replay_ratio"),
        ],
    ),
    "deploy": ("On robots", [f"rlplastic.deploy.{name}" for name in ("policy", "control", "document")]),
    "errors": ("Errors", ["rlplastic.errors"]),
}
"""Pages that are made of docstrings: a title, and the modules or objects it shows."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Pages of the navigation from the repository's root, in place of the files of docs/."""
    pages = [File.generated(config, f"reference/{name}.md", content=_reference(name)) for name in REFERENCE]
    named = [name for name in _leaves(config.nav) if not name.startswith("reference/")]
    for path in sorted(_linked([*named, *config.extra_css])):
        name = str(path.relative_to(ROOT))
        if path.is_dir():
            pages.append(File.generated(config, f"{name}/index.md", content=_listing(path)))
        else:
            pages.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    theme = [file for file in files if file.src_dir != config.docs_dir]
    return Files([*theme, *pages])


def _leaves(nav: object) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    else:
        for part in nav.values() if isinstance(nav, dict) else nav:
            yield from _leaves(part)


def _linked(names: Iterable[str]) -> set[Path]:
    """These files, what they link to, what that links to, and so on; folders with all their files."""
    found: set[Path] = set()
    waiting = [ROOT / name for name in names]
    while waiting:
        path = waiting.pop()
        if path in found or not path.exists():  # mkdocs itself tells of what is missing
            continue
        found.add(path)
        if path.is_dir():
            waiting += path.iterdir()
        elif path.suffix == ".md":
            waiting += [(path.parent / target).resolve() for target in LINK.findall(path.read_text(encoding="utf-8"))]
    return found


def _listing(folder: Path) -> str:
    """A page that links the files of a folder."""
    lines = [f"- [{path.name}]({path.name})" for path in sorted(folder.iterdir())]
    return "\n".join([f"# {folder.relative_to(ROOT)}", "", *lines])


def _reference(name: str) -> str:
    title, shown = REFERENCE[name]
    return "\n\n".join([f"# {title}", *(f"::: {what}" for what in shown)])
