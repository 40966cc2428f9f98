"""The files around the code: what they name is there, and the version is in one place."""

import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import flashtune

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[1]
HIDDEN = [ROOT / ".github", ROOT / ".pre-commit-config.yaml"]
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))

in_a_checkout = pytest.mark.skipif(
    not all(path.exists() for path in HIDDEN), reason="the archive of sources lacks these files"
)


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text("utf-8"))


def commands() -> list[str]:
    """What the workflows and the hooks run."""
    found = []
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        for job in read(path)["jobs"].values():
            found += [step["run"] for step in job["steps"] if "run" in step]
    for repository in read(HIDDEN[1])["repos"]:
        found += [hook["entry"] for hook in repository["hooks"]]
    return found


@in_a_checkout
def test_workflows_and_hooks_call_targets_that_make_has() -> None:
    targets = re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert commands()
    for command in commands():
        assert re.match(r"make ([a-z]+)", command), command
        assert command.split()[1] in targets
    assert "make test PYTHON=python" in commands()


@in_a_checkout
@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.stem)
def test_issue_forms_are_whole(form: Path) -> None:
    data = read(form)
    assert {"name", "description", "body"} <= set(data)
    fields = [field for field in data["body"] if field["type"] != "markdown"]
    assert all(field["attributes"]["label"] for field in fields)
    assert len({field["id"] for field in fields}) == len(fields)
    assert any(field.get("validations", {}).get("required") for field in fields)


@in_a_checkout
def test_the_workflow_runs_every_python_that_is_supported() -> None:
    matrix = read(ROOT / ".github" / "workflows" / "ci.yml")["jobs"]["test"]["strategy"]["matrix"]
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    assert matrix["python"] == re.findall(r"Python :: (3\.\d+)\"", text)


def test_the_citation_names_the_licence_and_no_version() -> None:
    data = read(ROOT / "CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= set(data)
    assert data["license"] == metadata.metadata("flashtune")["License-Expression"]
    assert "version" not in data  # which would be a second place


@in_a_checkout
def test_the_paper_has_one_address() -> None:
    [paper] = read(ROOT / "CITATION.cff")["references"]
    for name in ("pyproject.toml", "README.md"):
        assert paper["url"] in (ROOT / name).read_text("utf-8")


def test_the_version_is_in_one_place() -> None:
    run = subprocess.run(
        ["git", "grep", "-lF", flashtune.__version__, "--", "*.py", "*.toml", "*.cff", "Makefile"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode == 128:
        pytest.skip("no checkout")
    assert run.stdout.split() == ["src/flashtune/__init__.py"]


def test_every_step_of_the_jetsons_container_says_whether_it_was_run() -> None:
    text = (ROOT / "examples" / "jetson.Dockerfile").read_text("utf-8")
    steps = [
        step for step in re.split(r"\n\s*\n", text)
        if re.search(r"^(FROM|RUN|COPY|CMD)", step, re.MULTILINE)
    ]  # fmt: skip
    assert len(steps) > 5
    for step in steps:
        assert re.match(r"# (not run|run on [\w-]+)\b.*: ", step), step
