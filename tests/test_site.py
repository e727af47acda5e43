"""The documentation builds as a site without a warning, shows every page, and asks no other host for anything."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CONFIGURATION = ROOT / "docs" / "site" / "mkdocs.yml"


class Fetched(HTMLParser):
    """Addresses that a browser fetches for a page; what a reader may click on is none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in ("script", "img", "iframe", "video", "source"):
            self.addresses.append(given.get("src") or "")
        elif tag == "link" and given.get("rel") not in ("canonical", "next", "prev"):
            self.addresses.append(given.get("href") or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if any(find_spec(name) is None for name in ("mkdocs", "material", "mkdocstrings")):
        pytest.skip("the extra docs is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--config-file", str(CONFIGURATION)]
    built = subprocess.run([*command, "--site-dir", str(folder)], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_every_page_of_docs_is_in_the_navigation() -> None:
    named = set(re.findall(r": (docs/\w+\.md)$", CONFIGURATION.read_text(encoding="utf-8"), re.MULTILINE))
    assert named == {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")}


@pytest.mark.slow
def test_site_builds_without_a_warning_and_fetches_nothing_from_elsewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 20
    foreign = []
    for page in pages:
        fetched = Fetched()
        fetched.feed(page.read_text(encoding="utf-8"))
        foreign += [f"{page.relative_to(site)}: {address}" for address in fetched.addresses if "//" in address]
    assert foreign == []


@pytest.mark.slow
def test_reference_shows_what_the_package_exports(site: Path) -> None:
    import rlplastic
    from rlplastic.plasticity.interventions import INTERVENTIONS

    page = (site / "reference" / "rlplastic" / "index.html").read_text(encoding="utf-8")
    assert [name for name in rlplastic.__all__ if name != "__version__" and f'id="rlplastic.{name}"' not in page] == []
    page = (site / "reference" / "interventions" / "index.html").read_text(encoding="utf-8")
    assert [name for name in INTERVENTIONS if f".{name}" not in page] == []
