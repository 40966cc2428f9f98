"""The public names, pinned; and what importing the package costs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import flashtune

HEAVY = ("torch", "triton", "numpy", "jinja2", "optuna", "click", "sqlalchemy", "sqlite_utils")
TORCH = ("torch", "triton")
SEARCH_ONLY = ("optuna", "click", "sqlalchemy", "sqlite_utils", "rich")


def loaded_by(statement: str, names: tuple[str, ...]) -> list[str]:
    """Which of `names` a fresh process has loaded after `statement`."""
    program = f"import sys; {statement}; print(*(n for n in {names} if n in sys.modules))"
    source = str(Path(flashtune.__file__).parents[1])
    found = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": source},
        capture_output=True,
        text=True,
        check=True,
    )
    return found.stdout.split()


def test_the_public_names() -> None:
    names = ["FlashHead", "FlashtuneError", "Problem", "__version__", "apply"]
    assert flashtune.__all__ == [*names, "best", "remove", "search", "tables"]
    assert dir(flashtune) == sorted(flashtune.__all__)
    for name in flashtune.__all__:
        assert getattr(flashtune, name) is not None


def test_the_public_names_of_tables() -> None:
    for name in ("check", "diff", "export", "import_", "merge", "show"):
        assert callable(getattr(flashtune.tables, name))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'FlashTail'"):
        flashtune.FlashTail  # noqa: B018


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert loaded_by("import flashtune", HEAVY) == []
    assert loaded_by("from flashtune import Problem, FlashtuneError", HEAVY) == []
    assert loaded_by("import flashtune; flashtune.tables.diff", (*TORCH, "click", "optuna")) == []
    assert loaded_by("import flashtune; flashtune.search", ("click",)) == []


def test_the_runtime_loads_nothing_of_the_search() -> None:
    decode = (
        "import torch; from flashtune.kernels.head import FlashHead; "
        "w = torch.eye(4); FlashHead(w, w, torch.arange(4), n_probes=2, tune='never')(w); "
        "from flashtune.kernels.runtime.binding import compile_step; "
        "from flashtune.kernels.runtime.records import read_sources; "
        "from flashtune.tuning_db.device import find_device; "
        "read_sources(find_device('h200'), None, [])"
    )
    assert loaded_by(decode, SEARCH_ONLY) == []
