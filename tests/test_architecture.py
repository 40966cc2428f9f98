"""The arrows between folders and between their rooms, held by walking every module's imports."""

import ast
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import flashtune
from flashtune.kernels.plans.candidate import PLANS

ROOT = Path(flashtune.__file__).parent
MAY_IMPORT = {
    "tuner": {"tuner", "kernels", "tuning_db"},
    "kernels": {"kernels", "templates", "tuning_db"},
    "templates": {"templates"},
    "tuning_db": {"tuning_db"},
}
# From top to bottom: a room imports only from itself and from rooms below it. A room is a
# sub-package, or a module that lies in the folder itself.
ROOMS = {
    "tuner": (
        "cli",
        "api",
        "report",
        "bench",
        "clustering",
        "search",
        "predict",
        "fleet",
        "workers",
        "objective",
        "tables",
        "table_check",
        "probe",
        "here",
        "progress",
    ),
    "kernels": (
        "testing",
        "integrations",
        "head",
        "head_tensors",
        "model_folder",
        "runtime",
        "backends",
        "measure",
        "predict",
        "plans",
        "special_token",
        "weights",
        "epilogues",
        "formats",
    ),
}
MOST_FILES = 12  # of a folder, beside its __init__


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


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name, without `flashtune.`."""
    found = {}
    for folder in MAY_IMPORT:
        for path in (ROOT / folder).rglob("*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def arrows(sources: Mapping[str, str]) -> set[tuple[str, str]]:
    """Which module imports which, of modules by name; imports inside functions count too."""
    found = set()
    for module, source in sources.items():
        for name in imports(source):
            parts = name.removeprefix("flashtune.").split(".")
            starts = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
            target = next((start for start in starts if start in sources), module)
            if target != module:
                found.add((module, target))
    return found


def upward(folder: str, found: set[tuple[str, str]]) -> list[tuple[str, str]]:
    """The arrows inside a folder that lead to a room above."""
    floor = {room: number for number, room in enumerate(ROOMS[folder])}
    inside = (
        (one, other) for one, other in found if one.startswith(f"{folder}.")
        and other.startswith(f"{folder}.")
    )  # fmt: skip
    return sorted(
        (one, other)
        for one, other in inside
        if floor[one.split(".")[1]] > floor[other.split(".")[1]]
    )


def circle(found: set[tuple[str, str]]) -> list[str]:
    """The modules of one circle of imports; empty where there is none."""
    graph: dict[str, set[str]] = {}
    for one, other in found:
        graph.setdefault(one, set()).add(other)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


@pytest.fixture(scope="module")
def found() -> set[tuple[str, str]]:
    """Every arrow of the package."""
    return arrows({name: path.read_text("utf-8") for name, path in modules().items()})


@pytest.mark.parametrize("folder", ROOMS)
def test_every_module_is_in_a_room(folder: str) -> None:
    names = {name.split(".")[1] for name in modules() if name.startswith(f"{folder}.")}
    assert names <= set(ROOMS[folder]), "a new room gets its place in ROOMS"


@pytest.mark.parametrize("folder", ROOMS)
def test_arrows_inside_a_folder_lead_downwards(folder: str, found: set[tuple[str, str]]) -> None:
    assert upward(folder, found) == []


def test_no_modules_import_one_another_in_a_circle(found: set[tuple[str, str]]) -> None:
    assert circle(found) == []


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_a_folder_is_not_a_package_of_its_own(folder: str) -> None:
    """It is imported as a part of flashtune only."""
    assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize("folder", ROOMS)
def test_every_room_says_what_it_is_and_is_not_crowded(folder: str) -> None:
    folders = {path.parent for path in (ROOT / folder).rglob("*.py")}
    for each in sorted(folders):
        files = [path for path in each.glob("*.py") if path.name != "__init__.py"]
        assert len(files) <= MOST_FILES, each
        if each != ROOT / folder:
            assert (each / "__init__.py").exists(), each
            tree = ast.parse((each / "__init__.py").read_text("utf-8"))
            assert ast.get_docstring(tree), each


def asks_what_is_a_plans_own(source: str) -> list[str]:
    """Where a module asks which plan a config is of, or which kind a device is of, by name."""
    wrong = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
            if "config" in ast.unparse(node.args[0]) and "Config" in ast.unparse(node.args[1]):
                wrong.append(ast.unparse(node))
        elif isinstance(node, ast.Compare):
            text = ast.unparse(node)
            parts = [node.left, *node.comparators]
            words = {
                each.value
                for part in parts
                for each in ast.walk(part)
                if isinstance(each, ast.Constant) and isinstance(each.value, str)
            }
            if ("plan" in text and words & set(PLANS)) or ("vendor" in text and words):
                wrong.append(text)
    return wrong


def test_no_module_asks_what_is_a_plans_own_or_a_targets() -> None:
    homes = ("kernels.plans", "kernels.backends")
    asked = {
        name: found
        for name, path in modules().items()
        if not name.startswith(homes)
        and (found := asks_what_is_a_plans_own(path.read_text("utf-8")))
    }
    assert not asked
    assert asks_what_is_a_plans_own("if isinstance(config, StagedConfig): pass")
    assert asks_what_is_a_plans_own("x = config.plan == 'staged'")
    assert asks_what_is_a_plans_own("x = plan.name in ('a', 'streamed')")
    assert asks_what_is_a_plans_own("x = device.vendor == 'nvidia'")
    assert not asks_what_is_a_plans_own("x = device.vendor == other.vendor")


def test_a_candidate_is_seldom_taken_apart() -> None:
    """Problem, config and device go together: few functions take the three one by one."""
    apart = []
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef):
                arguments = [*node.args.args, *node.args.kwonlyargs]
                if {"problem", "config", "device"} <= {each.arg for each in arguments}:
                    apart.append(f"{name}.{node.name}")
    assert len(apart) <= 10, apart


def test_the_rule_sees_every_way_to_import() -> None:
    assert wrong_imports("kernels", "from flashtune.tuner.search.search import run") != []
    assert wrong_imports("kernels", "def f():\n    import flashtune.tuner.search.search") != []
    assert wrong_imports("tuner", "from flashtune import templates") != []
    assert wrong_imports("tuning_db", "from flashtune.kernels import config") != []
    assert wrong_imports("kernels", "from .config import knob") != []
    assert wrong_imports("kernels", "import kernels.config") != []
    assert wrong_imports("kernels", "import torch\nfrom flashtune.tuning_db import store") == []


def test_the_rules_for_rooms_see_what_breaks_them() -> None:
    up = arrows(
        {"tuner.search.session": "import flashtune.tuner.cli.report", "tuner.cli.report": ""}
    )
    assert upward("tuner", up) == [("tuner.search.session", "tuner.cli.report")]
    assert upward("tuner", {(other, one) for one, other in up}) == []
    sources = {
        "kernels.a": "from flashtune.kernels import b",
        "kernels.b": "from flashtune.kernels.c import thing",
        "kernels.c": "def late():\n    from flashtune.kernels.a import thing",
    }
    assert set(circle(arrows(sources))) == set(sources)
    assert circle(arrows({**sources, "kernels.c": ""})) == []
