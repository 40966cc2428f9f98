"""What is in the archive of sources."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = (
    "benchmarks",
    "docs",
    "examples",
    "kernels",
    "src",
    "templates",
    "tests",
    "tuner",
    "tuning_db",
)


def test_the_source_archive_has_docs_benchmarks_examples_and_tests(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    copy = tmp_path / "copy"
    copy.mkdir()
    left_out = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for path in ROOT.iterdir():
        if path.name in FOLDERS:
            shutil.copytree(path, copy / path.name, symlinks=True, ignore=left_out)
        elif path.is_file() and not path.name.startswith("."):
            shutil.copy(path, copy)
    program = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run(
        [sys.executable, "-c", program], cwd=copy, env=environment, capture_output=True, check=True
    )
    [archive] = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    for folder in ("benchmarks", "docs", "examples", "tests"):
        expected = {
            str(path.relative_to(ROOT))
            for path in (ROOT / folder).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        assert expected <= names, folder
    assert {"src/flashtune/kernels/head.py", "CONTRIBUTING.md", "Makefile"} <= names
