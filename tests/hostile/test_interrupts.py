"""Ctrl-C while modules load, which modules in C lose or take for a fault of their own."""

import signal
import subprocess
import sys
from pathlib import Path

CAREFREE = """
import sys, time
print("loading", flush=True)
try:
    time.sleep(1)
except BaseException:
    print("lost", flush=True)
"""
PROGRAM = """
import signal, sys, time
sys.path.insert(0, sys.argv[1])
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started us may ignore it
import flashtune.tuner.cli.main
from flashtune.__main__ import main

def cli(prog_name):
    import carefree
    print("loaded", flush=True)
    time.sleep(60)
    print("went on", flush=True)

flashtune.tuner.cli.main.cli = cli
main()
"""


def test_ctrl_c_while_a_module_loads_ends_the_command_once_it_has(tmp_path: Path) -> None:
    (tmp_path / "carefree.py").write_text(CAREFREE)
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout and process.stdout.readline() == "loading\n"
        process.send_signal(signal.SIGINT)
        said, errors = process.communicate(timeout=50)
    assert process.returncode == 130
    assert said in ("", "loaded\n")
    assert errors == ""
