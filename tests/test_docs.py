"""The documents and the command line say the same, and links lead somewhere."""

import ast
import re
import shlex
import subprocess
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import click
import pytest

from flashtune.tuner.cli.main import cli

ROOT = Path(__file__).parents[1]
CLI = ROOT / "docs" / "cli.md"
DOCUMENTS = [
    *sorted(ROOT.glob("*.md")),
    ROOT / "examples" / "README.md",
    *sorted(ROOT.glob("docs/**/*.md")),
]


def commands(
    group: click.Group = cli, path: tuple[str, ...] = ()
) -> Iterator[tuple[str, click.Command]]:
    """Every command that does something, with the words that call it."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


def sections() -> dict[str, str]:
    """The part of docs/cli.md about each command, by the words that call it."""
    parts = re.split(r"^#+ `flashtune (.+)`$", CLI.read_text("utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def options_of(command: click.Command) -> dict[str, click.Option]:
    """A command's options by each of their spellings."""
    return {
        text: option
        for option in command.params
        if isinstance(option, click.Option)
        for text in option.opts
    }


def test_every_command_has_a_section_and_no_other_has() -> None:
    assert sorted(sections()) == sorted(name for name, _ in commands())


@pytest.mark.parametrize("name", [name for name, _ in commands()])
def test_a_section_names_only_options_that_there_are(name: str) -> None:
    named = set(re.findall(r"`(--?[a-z][a-z-]*)[^`]*`", without_code(sections()[name])))
    assert named - options_of(dict(commands())[name]).keys() == set()


@pytest.mark.parametrize("name", [name for name, _ in commands()])
def test_help_says_in_sentences_what_every_option_is(name: str) -> None:
    """The reference of options is generated from it."""
    for text, option in options_of(dict(commands())[name]).items():
        assert option.help and option.help[0].isupper() and option.help.endswith("."), text


def fenced_commands() -> Iterator[tuple[str, list[str]]]:
    """Each `flashtune …` line of a fenced block: the document's name, and its words."""
    for document in DOCUMENTS:
        for block in re.findall(
            r"^```[a-z]*\n(.*?)^```$", document.read_text("utf-8"), re.MULTILINE | re.DOTALL
        ):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line.strip().removeprefix("$ "), comments=True)
                if words and words[0].rpartition("/")[2] == "flashtune":
                    yield document.name, words[1:]


@pytest.mark.parametrize(
    ("document", "words"),
    list(fenced_commands()),
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_commands_in_documents_parse(document: str, words: list[str]) -> None:
    command: click.Command = cli
    context = None
    words = list(words)
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        name = words.pop(0)
        assert name in command.commands, f"{document}: no command {name}"
        context = click.Context(
            command, parent=context, info_name=name, **command.context_settings
        )
        command = command.commands[name]
    while command.name == "search" and "--model" in words:  # the folder is on nobody's disk
        assert "models" in [option.name for option in command.params]
        at = words.index("--model")
        del words[at : at + 2]
    try:
        command.make_context(command.name, words, parent=context)
    except click.exceptions.Exit as asked:  # --help
        assert asked.exit_code == 0
    except click.ClickException as error:
        pytest.fail(f"{document}: flashtune {' '.join(words)}: {error.format_message()}")


def test_documents_show_commands() -> None:
    assert {name for name, _ in fenced_commands()} >= {"README.md", "cli.md"}


def anchors(path: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", without_code(path.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_resolve(document: Path) -> None:
    text = without_code(document.read_text("utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target or target.startswith("mailto:"):
            continue
        name, _, anchor = target.partition("#")
        path = (document.parent / name).resolve() if name else document
        assert path.exists(), f"{document.name}: {target}"
        assert path.is_relative_to(ROOT), f"{document.name}: {target} leads out of the repository"
        if anchor:
            assert anchor in anchors(path), f"{document.name}: {target}"


def test_no_file_names_a_path_of_one_machine() -> None:
    """Of what is tracked, or of what lies here where this is no checkout."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    names = listed.stdout.split("\0") if listed.returncode == 0 else ["README.md", "docs/cli.md"]
    pattern = re.compile(rb"(?<![\w./-])/(?:work|root|home/[a-z]\w*)(?:/|\b)")
    found = [
        name
        for name in names
        if name and (ROOT / name).is_file() and pattern.search((ROOT / name).read_bytes())
    ]
    assert found == []


@pytest.mark.parametrize(
    "script",
    sorted((*ROOT.glob("benchmarks/*.py"), *ROOT.glob("examples/*.py"))),
    ids=lambda p: p.stem,
)
def test_scripts_import_what_there_is(script: Path) -> None:
    for node in ast.walk(ast.parse(script.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flashtune"):
            module = import_module(str(node.module))
            for name in (alias.name for alias in node.names):
                assert hasattr(module, name) or find_spec(f"{node.module}.{name}"), name


ODD = r"\b(?:anew|whoever|whatsoever|for want of|mend(?:s|ed)?)\b|\d us\b"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_prose_is_plain_and_has_one_unit_for_microseconds(document: Path) -> None:
    text = re.sub(r"`[^`\n]*`", "", without_code(document.read_text("utf-8")))
    assert re.findall(ODD, text, re.IGNORECASE) == []


GLOSSARY = ROOT / "docs" / "glossary.md"


def test_the_glossary_says_each_word_once_in_one_sentence() -> None:
    rows = re.findall(r"^\| \*\*(.+)\*\* \| (.+) \|$", GLOSSARY.read_text("utf-8"), re.MULTILINE)
    words = [word for word, _ in rows]
    assert len(words) == len(set(words))
    assert all(not re.search(r"\. [A-Z]", text) and text.endswith(".") for _, text in rows)


def test_every_page_is_linked_from_the_readme_or_from_another_page() -> None:
    linked = {
        (document.parent / target.partition("#")[0]).resolve()
        for document in DOCUMENTS
        for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text("utf-8"))
    }
    pages = [path for path in ROOT.glob("docs/*.md") if path.resolve() not in linked]
    assert pages == []
