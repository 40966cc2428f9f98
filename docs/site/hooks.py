"""What mkdocs adds to the folder docs/: pages and files of the repository that the pages link to.

README.md is the site's first page. Links are written for the repository, so that they work there;
here they are turned into links of the site.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from posixpath import relpath
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).parent))
from commands import reference

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "reporting.md",
    "examples/README.md": "examples.md",
}
SOURCES = {name: ROOT / source for source, name in PAGES.items()}
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)")


def on_config(config: Any) -> Any:
    """List the decisions, by their titles."""
    decisions = [
        {path.read_text("utf-8").partition("\n")[0].lstrip("# "): f"decisions/{path.name}"}
        for path in sorted((DOCS / "decisions").glob("*.md"))
    ]
    config.nav = [*config.nav, {"Decisions": decisions}]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages outside docs/, and every file that a page links to."""
    for name, source in SOURCES.items():
        files.append(File.generated(config, name, content=source.read_text("utf-8")))
    pages = [path for path in DOCS.rglob("*.md")]
    for target in sorted({path for page in (*pages, *SOURCES.values()) for path in _links(page)}):
        if target.is_file() and not target.is_relative_to(DOCS) and _uri(target) not in SOURCES:
            files.append(File.generated(config, _uri(target), abs_src_path=str(target)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Turn a page's links into links of the site."""
    uri = page.file.src_uri
    markdown = markdown.replace("<!-- commands -->", reference())
    folder = SOURCES.get(uri, DOCS / uri).parent
    start = uri.rpartition("/")[0] or "."
    return LINK.sub(lambda found: relpath(_uri(_resolved(folder, found[1])), start), markdown)


def _links(page: Path) -> Iterator[Path]:
    """The files that a page links to."""
    for target in LINK.findall(page.read_text("utf-8")):
        yield _resolved(page.parent, target)


def _resolved(folder: Path, target: str) -> Path:
    """A link's file; of a folder, its first page."""
    path = (folder / target).resolve()
    return min(path.glob("*.md")) if path.is_dir() else path


def _uri(path: Path) -> str:
    """Where a file of the repository lies in the site's sources."""
    name = path.relative_to(ROOT).as_posix()
    if name in PAGES:
        return PAGES[name]
    return path.relative_to(DOCS).as_posix() if path.is_relative_to(DOCS) else f"files/{name}"
