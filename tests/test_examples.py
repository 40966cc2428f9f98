"""The examples run as they stand, and print what examples/README.md says."""

import doctest
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import flashtune

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
NOTEBOOK = EXAMPLES / "reads_finds_takes.ipynb"
NOT_RUN = "vllm_openai.py"  # needs vLLM


def sections() -> dict[str, str]:
    """The part of examples/README.md about each file, by its name."""
    parts = re.split(
        r"^## `(.+)`$", (EXAMPLES / "README.md").read_text("utf-8"), flags=re.MULTILINE
    )
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def printed(name: str) -> str:
    """What the page says that an example prints."""
    [block] = re.findall(r"^```text\n(.*?)^```$", sections()[name], re.MULTILINE | re.DOTALL)
    return str(block)


def as_told(told: str, found: str) -> bool:
    """Whether an output is the one that was told, in which `...` stands for anything."""
    return doctest.OutputChecker().check_output(told, found, doctest.ELLIPSIS)


def test_the_page_lists_every_example() -> None:
    listed = {path.name for path in EXAMPLES.iterdir() if path.is_file()} - {"README.md"}
    assert set(sections()) == listed


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_examples_are_short_and_compile(script: Path) -> None:
    source = script.read_text("utf-8")
    compile(source, script.name, "exec")
    assert len(source.splitlines()) < 40
    assert f"python examples/{script.name}" in source


@pytest.mark.parametrize("name", [path.name for path in SCRIPTS if path.name != NOT_RUN])
def test_examples_print_what_the_page_says(name: str, tmp_path: Path) -> None:
    source = (EXAMPLES / name).read_text("utf-8")
    if "from transformers" in source:
        pytest.importorskip("transformers")
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(flashtune.__file__).parents[1]),
        "FLASHTUNE_DB": str(tmp_path / "tuning.db"),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    run = subprocess.run(
        [sys.executable, EXAMPLES / name],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert as_told(printed(name), run.stdout), run.stdout


def test_another_output_is_told_apart() -> None:
    assert as_told("kernel ... on ...\n", "kernel cpp_fused on a-cpu\n")
    assert not as_told("kernel ... on ...\n", "kernel cpp_fused\n")


RUN = """
import sys, nbclient, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
nbclient.NotebookClient(notebook, timeout=240, kernel_name="python3").execute()
nbformat.write(notebook, sys.argv[2])
"""


def test_the_notebook_runs_and_draws_its_plots(tmp_path: Path) -> None:
    """In a process of its own: the client's sockets and threads are no part of the tests."""
    nbformat = pytest.importorskip("nbformat")
    for name in ("nbclient", "ipykernel", "matplotlib"):
        pytest.importorskip(name)
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(flashtune.__file__).parents[1]),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    written = tmp_path / "run.ipynb"
    run = subprocess.run(
        [sys.executable, "-c", RUN, NOTEBOOK, written],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    notebook = nbformat.read(written, as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert [output.output_type for output in outputs].count("display_data") == 4
    [winner] = [output for output in outputs if output.output_type == "execute_result"]
    assert "cpp_" in winner.data["text/plain"]
