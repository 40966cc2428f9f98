"""What a terminal, a shell and a pipe see of the command line, whatever they can do."""

import ast
import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete
from rich.console import Console

import flashtune
from flashtune.kernels.plans import STAGED
from flashtune.kernels.plans.config import config_data, short_config
from flashtune.tuner import progress
from flashtune.tuner.cli import terminal
from flashtune.tuner.cli.main import cli

SOURCE = Path(flashtune.__file__).parents[1]
HEAVY = ("torch", "triton", "numpy", "optuna", "rich", "jinja2", "sqlite_utils", "transformers")


def command(*words: str, path: Path = SOURCE, **settings: str) -> tuple[list[str], dict[str, str]]:
    """The words and the environment of a process that runs `python -m flashtune`."""
    paths = f"{path}{os.pathsep}{SOURCE}"
    environment = {**os.environ, "PYTHONPATH": paths, **settings}
    environment.pop("COLUMNS", None)
    return [sys.executable, "-m", "flashtune", *words], environment


def run(*words: str, path: Path = SOURCE, **settings: str) -> subprocess.CompletedProcess[str]:
    arguments, environment = command(*words, path=path, **settings)
    return subprocess.run(
        arguments, env=environment, capture_output=True, text=True, encoding="latin-1"
    )


def test_it_runs_as_a_module() -> None:
    found = run("--version")
    assert (found.returncode, found.stderr) == (0, "")
    assert flashtune.__version__ in found.stdout


def test_commands_print_through_one_module() -> None:
    """It alone makes what others wrote harmless; generated source goes out as it is."""
    printing = {"click.echo", "print", "click.secho", "sys.stdout.write", "console.print"}
    found = set()
    for path in Path(terminal.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in printing:
                found.add((path.stem, ast.unparse(node.func)))
    assert found == {
        ("terminal", "click.echo"),
        ("terminal", "console.print"),
        ("main", "print"),  # errors, which are one printable line
        ("records", "click.echo"),  # generated source
        ("search_report", "print"),  # numbers
    }


HOSTILE = "\x1b[2J [/b] [bold]x[/bold] :smile: \u202e\ud800\n."
SPELLED = "\\x1b[2J [/b] [bold]x[/bold] :smile: \\u202e\\ud800\\n."


def test_what_others_wrote_only_reads(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.say(HOSTILE)
    assert capsys.readouterr().out == SPELLED + "\n"
    terminal.say(HOSTILE, err=True)
    assert capsys.readouterr().err == SPELLED + "\n"
    for width in ("40", "400"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("COLUMNS", width)
            terminal.print_rows(HOSTILE, ("one", "two"), [(HOSTILE, "x")], notes=[HOSTILE])
        said = capsys.readouterr().out
        assert all(line.isprintable() for line in said.splitlines())
        assert SPELLED[:30] in said
    terminal.say_json({HOSTILE: [HOSTILE]})
    assert json.loads(capsys.readouterr().out) == {HOSTILE: [HOSTILE]}


def test_a_config_of_another_version_is_shown() -> None:
    good = dict(config_data(STAGED.config()))
    assert short_config(good) == "staged"
    assert short_config({**good, "score_rows": 8}) == "staged score_rows=8"
    lacking = {name: value for name, value in good.items() if name != "pdl"}
    assert short_config(lacking) == "staged (of another version of flashtune: see pdl)"
    assert short_config({**good, "x": 1}) == "staged (of another version of flashtune: see x)"
    assert (
        short_config({"plan": "later", "x": 1})
        == "later, which this version of flashtune does not know"
    )


def test_help_completion_and_version_load_nothing_heavy() -> None:
    program = (
        "import sys; from flashtune.tuner.cli.main import cli; "
        "cli(['search', '--help'], standalone_mode=False); "
        f"print('loaded:', *(name for name in {HEAVY} if name in sys.modules))"
    )
    arguments, environment = command()
    found = subprocess.run(
        [arguments[0], "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout.splitlines()[-1] == "loaded:"


@pytest.mark.parametrize(
    ("words", "beginning", "expected"),
    [
        (["search", "--device"], "nvidia-h", {"nvidia-h100", "nvidia-h200"}),
        (["tables", "export", "--device"], "a4", {"a40"}),
        (["quality", "--device"], "", {"cpu", "gpu"}),
        (["best", "--shape"], "gemma", {"gemma-3-1b", "gemma-3-270m"}),
        (["search", "--fix"], "plan=st", {"plan=staged", "plan=streamed"}),
        (["search", "--fix"], "selection=t", {"selection=torch_topk", "selection=threshold"}),
    ],
)  # fmt: skip
def test_names_are_completed(words: list[str], beginning: str, expected: set[str]) -> None:
    shell = ShellComplete(cli, {}, "flashtune", "_FLASHTUNE_COMPLETE")
    found = {item.value for item in shell.get_completions(words, beginning)}
    assert found == expected


def test_ctrl_c_while_modules_load_ends_quietly(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt\n")
    found = run("devices", path=tmp_path)
    assert found.returncode == 130
    assert "Traceback" not in found.stderr and found.stdout == ""


def test_ctrl_c_before_the_command_line_is_loaded_ends_quietly(tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text("raise KeyboardInterrupt\n")
    found = run("devices", path=tmp_path)
    assert (found.returncode, found.stderr) == (130, "")


def test_a_full_disk_is_one_line() -> None:
    arguments, environment = command("show", "--device", "h200")
    with open("/dev/full", "w") as full:
        found = subprocess.run(
            arguments, env=environment, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert found.returncode == 2
    assert found.stderr == "Error: the output cannot be written: No space left on device\n"


def test_a_reader_that_has_enough_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    arguments, environment = command("show", "--device", "h200")
    found = subprocess.run(
        arguments, env=environment, stdout=writing, stderr=subprocess.PIPE, text=True
    )
    os.close(writing)
    assert found.stderr == ""


def test_without_any_output_it_still_works() -> None:
    arguments, environment = command("show", "--device", "h200")
    line = " ".join(arguments) + " >&-"
    found = subprocess.run(line, shell=True, env=environment, stderr=subprocess.PIPE, text=True)
    assert (found.returncode, found.stderr) == (0, "")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_an_encoding_lacks_is_spelled(encoding: str) -> None:
    found = run("best", "--device", "h200", "--shape", "odd", PYTHONIOENCODING=encoding)
    assert found.returncode == 2
    assert "vocab=...,hidden=...,clusters=..." in found.stderr
    assert "Traceback" not in found.stderr
    assert run("show", "--device", "h200", PYTHONIOENCODING=encoding).returncode == 0


def test_colours_can_be_turned_off() -> None:
    inner, outer = pty.openpty()
    arguments, environment = command("show", "--device", "h200", NO_COLOR="1", TERM="xterm")
    subprocess.run(arguments, env=environment, stdout=outer, check=True)
    os.close(outer)
    with open(inner, "rb", closefd=True) as terminal_end:
        text = terminal_end.read1(100_000)
    assert b"nvidia-h200" in text
    assert b"\x1b[3" not in text and b"\x1b[9" not in text


CONFIG = "staged " + " ".join(f"knob_{number}={number}" for number in range(20))
ROWS = [("3f2a", "amd-epyc-9b14-2c-avx512-bf16", "151936x2048 c9496 p256", "330.5", CONFIG)]
HEADINGS = ("record", "device", "problem", ">us", "config")


def printed(capsys: pytest.CaptureFixture[str]) -> list[str]:
    terminal.print_rows("a title", HEADINGS, ROWS, notes=["what it means"])
    return [line.rstrip() for line in capsys.readouterr().out.splitlines()]


def test_a_pipe_gets_whole_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    title, headings, row, note = printed(capsys)
    assert (title, headings.split(), note) == (
        "a title",
        ["record", "device", "problem", "us", "config"],
        "what it means",
    )
    assert all(cell in row for cell in ROWS[0])


def test_a_narrow_terminal_gets_configs_and_devices_whole(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = printed(capsys)
    assert f"3f2a: {CONFIG}" in lines
    assert any("amd-epyc-9b14-2c-avx512-bf16" in line for line in lines)
    assert all(len(line) <= 80 for line in lines if CONFIG not in line)


@pytest.mark.parametrize("width", [80, 120])
def test_the_live_line_keeps_count_and_time_left(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def console(**_: object) -> Console:
        return Console(file=io.StringIO(), width=width, force_terminal=True)

    monkeypatch.setattr(progress, "Console", console)
    monkeypatch.setattr(progress.time, "monotonic", lambda: 100.0)
    bar = progress.ProgressBar()
    task = bar._add("128256x2048 c8016 p256 t32 logits", 150)
    bar._show(task, 42, 150, "best 737.2 us measured = 1.11 x floor, 31 failed " * 3, 283.0)
    screen = io.StringIO()
    Console(file=screen, width=width).print(bar._bar.get_renderable())
    [line] = screen.getvalue().splitlines()
    assert len(line) <= width
    assert all(each in line for each in ("t32 logits", " 42/150", "3:03 left", "best 737.2 us"))
