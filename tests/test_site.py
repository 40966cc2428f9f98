"""The documents' pictures and tables are as committed results give them, and the site builds."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from loaded import loaded

ROOT = Path(__file__).parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
PHONE, DESKTOP = 390, 1280


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly."""
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    command = (sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder))
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return folder


def pages(site: Path) -> list[Path]:
    return sorted(path for path in site.rglob("*.html") if path.name != "404.html")


class Loaded(HTMLParser):
    """What a page loads by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = dict(attrs)
        if tag in ("img", "script", "iframe"):
            self.found.append(told.get("src") or "")
        elif tag == "link" and told.get("rel") in ("stylesheet", "preconnect", "icon"):
            self.found.append(told.get("href") or "")


class Quiet(SimpleHTTPRequestHandler):
    """A server of files that logs nothing."""

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_pages_load_nothing_from_the_network(site: Path) -> None:
    for page in pages(site):
        reader = Loaded()
        reader.feed(page.read_text("utf-8"))
        assert reader.found
        assert not [each for each in reader.found if "//" in each], page.name


def test_lists_and_tables_of_the_documents_are_lists_and_tables(site: Path) -> None:
    """Markdown of GitHub's begins them without an empty line; Python's does not."""
    for page in pages(site):
        text = re.sub(r"<(pre|code).*?</\1>", "", page.read_text("utf-8"), flags=re.DOTALL)
        assert not re.findall(r"<p>[^<]*\n(?:- |\d+\. |\| ?-)", text), page.name


def test_the_site_has_every_public_name_and_every_command(site: Path) -> None:
    import flashtune
    from flashtune.tuner.cli.main import cli

    names = (site / "reference" / "api.html").read_text("utf-8")
    for name in {*flashtune.__all__} - {"__version__"}:
        assert re.search(rf">\s*flashtune\.{name}\s*<", names), name
    commands = (site / "reference" / "commands.html").read_text("utf-8")
    for name in cli.commands:
        assert f'id="flashtune-{name}' in commands, name
    assert "Knobs of plan=staged" in commands and "flashtune tables check --compile" in commands


@pytest.fixture(scope="module")
def look(site: Path) -> Iterator[list[list[str]]]:
    """What a browser says of every page at two widths: page, width, its own width, headings."""
    frames = "".join(
        f'<iframe data-width="{width}" style="width:{width}px;height:800px" '
        f'src="{page.relative_to(site)}"></iframe>'
        for page in pages(site)
        for width in (PHONE, DESKTOP)
    )
    script = """
    addEventListener("load", () => {
      const lines = [...document.querySelectorAll("iframe")].map(frame => {
        const inside = frame.contentDocument.documentElement
        return [frame.getAttribute("src"), frame.dataset.width, inside.scrollWidth,
                inside.querySelectorAll("article h1").length].join(" ")
      })
      document.body.innerHTML = "<pre>" + lines.join("\\n") + "</pre>"
    })
    """
    (site / "look.html").write_text(f"<script>{script}</script><body>{frames}</body>", "utf-8")
    handler = partial(Quiet, directory=str(site))
    command = (
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
        "--enable-logging=stderr",
    )  # fmt: skip
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        shown = subprocess.run(
            [*command, f"http://127.0.0.1:{server.server_port}/look.html"],
            capture_output=True,
            text=True,
            timeout=250,
            check=True,
        )
        server.shutdown()
    (site / "look.html").unlink()
    errors = [line for line in shown.stderr.splitlines() if "CONSOLE" in line]
    assert errors == []
    text = shown.stdout.rpartition("<pre>")[2].partition("</pre>")[0]
    yield [line.split() for line in text.splitlines()]


@pytest.mark.skipif(CHROMIUM is None, reason="no browser")
def test_no_page_is_wider_than_a_phone_or_logs_an_error(site: Path, look: list[list[str]]) -> None:
    assert len(look) == 2 * len(pages(site))
    assert [line for line in look if int(line[2]) > int(line[1])] == []
    assert [line for line in look if line[3] != "1"] == []


def test_the_readmes_tables_are_those_of_the_results() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert text.count("<!-- table: ") == 2
    assert loaded(ROOT / "docs" / "site" / "readme.py").written(text) == text


def test_the_pictures_are_those_of_the_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = loaded(ROOT / "docs" / "site" / "pictures.py")
    monkeypatch.setattr(script, "FOLDER", tmp_path)
    script.main()
    drawn = {path.name: path.read_text("utf-8") for path in tmp_path.glob("*.svg")}
    committed = (ROOT / "docs" / "pictures").glob("*.svg")
    assert {path.name: path.read_text("utf-8") for path in committed} == drawn
