"""The arrows between the folders, held by walking every module's imports."""

import ast
from pathlib import Path

import pytest

import flashtune

ROOT = Path(flashtune.__file__).parent
MAY_IMPORT = {
    "tuner": {"tuner", "kernels", "tuning_db"},
    "kernels": {"kernels", "templates", "tuning_db"},
    "templates": {"templates"},
    "tuning_db": {"tuning_db"},
}


def imports(source: str) -> set[str]:
    """The dotted names that a module imports; a relative import starts with a dot."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def wrong_imports(folder: str, source: str) -> list[str]:
    """The imports of a module in `folder` that no arrow allows."""
    allowed = [[name] for name in MAY_IMPORT[folder]]
    wrong = []
    for name in imports(source):
        head, *rest = name.split(".")
        by_bare_name = head in ("", *MAY_IMPORT)  # relative counts as such
        if by_bare_name or (head == "flashtune" and rest[:1] not in allowed):
            wrong.append(name)
    return sorted(wrong)


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_modules_import_only_along_the_arrows(folder: str) -> None:
    modules = list((ROOT / folder).rglob("*.py"))
    assert modules
    wrong = {
        path.name: found for path in modules if (found := wrong_imports(folder, path.read_text()))
    }
    assert not wrong


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_the_folders_are_no_packages_of_their_own(folder: str) -> None:
    assert not list((ROOT / folder).rglob("__init__.py"))


def test_the_rule_sees_every_way_to_import() -> None:
    assert wrong_imports("kernels", "from flashtune.tuner.search.search import run") != []
    assert wrong_imports("kernels", "def f():\n    import flashtune.tuner.search.search") != []
    assert wrong_imports("tuner", "from flashtune import templates") != []
    assert wrong_imports("tuning_db", "from flashtune.kernels import config") != []
    assert wrong_imports("kernels", "from .config import knob") != []
    assert wrong_imports("kernels", "import kernels.config") != []
    assert wrong_imports("kernels", "import torch\nfrom flashtune.tuning_db import store") == []
