"""Serve FlashHead models with vLLM, and hold what comes out against plain vLLM.

Usage (tests/serving/run.sh makes all of this):
    python compare.py [--short] [--jobs N] PLAIN FLASH WORK

PLAIN is a model folder, FLASH the FlashHead model made of it. Copies of FLASH in the folder WORK
probe all clusters, or just one. What is compared, and must hold, or the exit code is 1:
- all clusters probed: every answer is plain vLLM's.
- one cluster probed: answers that need the dense head are plain vLLM's all the same, the others
  are not, which shows that FlashHead gave them.
- FLASHHEAD_ENABLED=0: one probe, and every answer is plain vLLM's.
With as many probes as FLASH says, agreement is reported.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flashtune.kernels.model_folder.folder import ModelFolder

HERE = Path(__file__).parent
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",  # of which two processes on two cores get the most
}
Answers = dict[str, dict[str, Any]]


def probing(flash: Path, work: Path, name: str, n_probes: int) -> Path:
    """A copy of a FlashHead model with another number of probes.

    Of hard links: a folder whose files lead out of it is not read.
    """
    copy = work / name
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(flash, copy, copy_function=os.link)
    config = json.loads((flash / "config.json").read_text("utf-8"))
    (copy / "config.json").unlink()
    (copy / "config.json").write_text(json.dumps({**config, "n_probes": n_probes}))
    return copy


@contextmanager
def engines(jobs: int) -> Iterator[ThreadPoolExecutor]:
    """Where engines run, so many at a time; after a failure no other one is begun."""
    pool = ThreadPoolExecutor(jobs)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def answers(script: str, model: Path, *, enabled: bool = True) -> Answers:
    """What a script of this folder prints last for a model: each case's answer, by name."""
    run = subprocess.run(
        [sys.executable, str(HERE / script), str(model)],
        env={**os.environ, **SETTINGS, "FLASHHEAD_ENABLED": "always" if enabled else "0"},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if run.returncode:
        raise SystemExit(f"{script} {model.name} ended with {run.returncode}: see above")
    # vLLM logs there as well, on a GPU even after the last answer
    said = [line for line in run.stdout.splitlines() if line.startswith("{")]
    found: Answers = json.loads(said[-1])
    return found


def held(what: str, expected: Answers, found: Answers, names: list[str], *, same: bool) -> bool:
    """Print and return whether each named answer is the expected one (or none is)."""
    wrong = [name for name in names if (expected[name]["said"] == found[name]["said"]) is not same]
    equal = "equal to" if same else "different from"
    print(f"{'FAIL' if wrong else 'ok  '} {what}: {len(names)} answers {equal} plain vLLM's")
    print(f"       {', '.join(names)}")
    for name in wrong:
        print(f"       {name}: {expected[name]['said']!r} and {found[name]['said']!r}")
    return not wrong


def compare(script: str, expected: Answers, everything: Answers, one: Answers) -> bool:
    """Hold the answers with all clusters probed, and with one, against plain vLLM's."""
    dense = [name for name, answer in expected.items() if answer["dense"]]
    fast = [name for name, answer in expected.items() if answer["differs"]]
    good = held(f"{script}, all clusters probed", expected, everything, [*expected], same=True)
    good &= held(f"{script}, one probed, dense", expected, one, dense, same=True)
    return good & held(f"{script}, one probed, FlashHead", expected, one, fast, same=False)


def report(n_probes: int, expected: Answers, found: Answers) -> None:
    """Print how well the usual number of probes agrees."""
    equal = [name for name in expected if expected[name]["said"] == found[name]["said"]]
    pairs = [
        pair
        for name in expected
        if not expected[name]["dense"]
        for row, other in zip(expected[name]["tokens"], found[name]["tokens"], strict=True)
        for pair in _up_to_first_difference(row, other)
    ]
    same = sum(token == other for token, other in pairs)
    print(f"     {n_probes} probed: {len(equal)} of {len(expected)} answers equal plain vLLM's;")
    print(f"     of FlashHead's tokens up to an answer's first difference {same} of {len(pairs)}")


def _up_to_first_difference(row: list[int], other: list[int]) -> list[tuple[int, int]]:
    """Pairs of tokens that followed equal text."""
    pairs = list(zip(row, other, strict=False))
    first = next((index for index, (a, b) in enumerate(pairs) if a != b), len(pairs))
    return pairs[: first + 1]


def main() -> None:
    parser = argparse.ArgumentParser(description="Hold FlashHead in vLLM against plain vLLM.")
    parser.add_argument("--short", action="store_true", help="in process only, no API server")
    parser.add_argument("--jobs", type=int, default=1, help="engines that run at a time")
    parser.add_argument("plain", type=Path)
    parser.add_argument("flash", type=Path)
    parser.add_argument("work", type=Path)
    arguments = parser.parse_args()
    problem = ModelFolder.open(arguments.flash).problem()
    plain, flash = arguments.plain, arguments.flash
    every = probing(flash, arguments.work, "all", problem.n_clusters)
    one = probing(flash, arguments.work, "one", 1)
    with engines(arguments.jobs) as pool:

        def started(script: str, *models: Path) -> list[Future[Answers]]:
            return [pool.submit(answers, script, model) for model in models]

        asked = started("in_process.py", plain, every, one, flash)
        off = pool.submit(answers, "in_process.py", one, enabled=False)
        served = [] if arguments.short else started("over_http.py", plain, every, one)
        expected, *found, usual = (each.result() for each in asked)
        good = compare("in_process.py", expected, *found)
        name = "in_process.py, FLASHHEAD_ENABLED=0"
        good &= held(name, expected, off.result(), [*expected], same=True)
        report(problem.n_probes, expected, usual)
        if served:
            good &= compare("over_http.py", *(each.result() for each in served))
    print("all as it must be" if good else "see FAIL above")
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
