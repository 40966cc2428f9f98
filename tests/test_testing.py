"""`flashtune.testing` runs in a test module outside this repository, and sees what is wrong."""

import os
import re
import subprocess
import sys
from pathlib import Path

import flashtune

PAGE = Path(__file__).parents[1] / "docs" / "howto" / "test-a-backend.md"
RIGHT = "n_probes = min("


def outcome(module: str, folder: Path) -> tuple[int, str]:
    """The exit code and the output of pytest on a module, run as a user would."""
    (folder / "test_slate.py").write_text(module, "utf-8")
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(flashtune.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
    }
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "test_slate.py"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return run.returncode, run.stdout + run.stderr


def module_of_the_page() -> str:
    [module] = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.M | re.S)
    return str(module)


def test_the_pages_module_passes(tmp_path: Path) -> None:
    code, output = outcome(module_of_the_page(), tmp_path)
    assert code == 0, output
    passed = re.search(r"(\d+) passed", output)
    assert passed and int(passed[1]) > 150, output
    assert "skipped" not in output


def test_a_step_that_probes_too_few_clusters_fails(tmp_path: Path) -> None:
    module = module_of_the_page()
    assert RIGHT in module
    code, output = outcome(module.replace(RIGHT, "n_probes = -1 + min("), tmp_path)
    assert code == 1 and "judge.why_wrong(" in output, output


def test_a_module_without_a_runner_is_told_so(tmp_path: Path) -> None:
    module = "from flashtune.testing import DecodeContract\nclass TestIt(DecodeContract): pass\n"
    code, output = outcome(module, tmp_path)
    assert code == 1 and "override the fixture `runner`" in output, output
