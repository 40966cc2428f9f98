"""Which tests run: what needs a GPU is left out without one, and one line says so."""

import os
import re
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def test_what_needs_a_gpu_is_left_out_without_one() -> None:
    asked = (str(TESTS / "kernels" / "test_head_gpu.py"), "-p", "no:cacheprovider", "-n", "0")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *asked],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 5, done.stdout  # no test was left
    assert re.search(r"^\d+ tests need a GPU, and there is none: left out$", done.stdout, re.M)
    assert "SKIPPED" not in done.stdout
