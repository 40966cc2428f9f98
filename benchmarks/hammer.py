"""Whether steps hang or go wrong next to a kernel that occupies half of the GPU.

    python benchmarks/hammer.py [--shape NAME] [--calls N] [--json FILE]

Each plan's steps run on two streams at a time, each with its own scratch, while a third stream
keeps launching a kernel that occupies half of the multiprocessors for a while: its blocks take all
of the shared memory, so that no other block fits beside one. If the blocks of a kernel wait for
one another, at a barrier of the grid or for another block's data, only some of them may be
running. Every token is compared with the one that a verified call gave for the same hidden state.
Prints how many calls were made, how many tokens were wrong, and how often the other kernel ran;
exits with 1 if a token was wrong, or a round did not end in time.
"""

import ctypes
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch

from flashtune.kernels.backends.cuda.nvrtc import compile_cuda
from flashtune.kernels.backends.host import device_of
from flashtune.kernels.backends.nvidia.driver import Binary, Shape
from flashtune.kernels.backends.target import backend_of
from flashtune.kernels.epilogues.epilogue import new_out
from flashtune.kernels.measure.workload import Workload
from flashtune.kernels.plans.candidate import Candidate
from flashtune.kernels.plans.config import Config, short_config
from flashtune.kernels.plans.knob import config_data
from flashtune.kernels.plans.persistent import PersistentConfig
from flashtune.kernels.plans.staged import StagedConfig
from flashtune.kernels.plans.streamed import StreamedConfig
from flashtune.kernels.weights import Step
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import Problem, parse_shape

CONFIGS: dict[str, Config] = {
    "persistent": PersistentConfig(),
    "persistent, overlapped": PersistentConfig(pdl=True),
    "streamed": StreamedConfig(),
    "staged": StagedConfig(pdl=True),
    "staged, in the gather": StagedConfig(selection="in_gather", gather_rows=16, pdl=True),
}
STATES = 64  # hidden states, and calls per round on each stream
HELD_US = 400  # how long the other kernel occupies its multiprocessors
HELD_BYTES = 200 * 1024  # of shared memory for each of its blocks
PATIENCE_SECONDS = 30.0

HOLDER = """
extern "C" __global__ void hold(unsigned long long nanoseconds) {
    extern __shared__ char bytes[];
    unsigned long long begin, now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(begin));
    do {
        asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    } while (now - begin < nanoseconds);
    if (nanoseconds == 0) bytes[0] = 1;
}
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """The outcome of a config's calls; `hung`: a round of calls did not end."""

    plan: str
    config: str
    calls: int
    wrong: int
    held: int
    seconds: float
    hung: bool = False


class Holder:
    """The kernel that occupies half of the multiprocessors, on its own stream."""

    def __init__(self, device: Device) -> None:
        """Compile and load it."""
        index = torch.cuda.current_device()
        binary = Binary(compile_cuda(HOLDER, device.arch), index)
        shape = Shape("hold", device.sm_count // 2, 128, dynamic_bytes=HELD_BYTES)
        self._run = binary.prepared(shape, [ctypes.c_uint64(1000 * HELD_US)])
        self._stream = torch.cuda.Stream()
        self._last: torch.cuda.Event | None = None
        self.launched = 0

    def keep_on(self) -> None:
        """Launch it, unless the last but one has not started yet."""
        if self._last is None or self._last.query():
            self._last = torch.cuda.Event()
            self._last.record(self._stream)
            self._run(self._stream.cuda_stream)
            self.launched += 1


def ended(streams: Sequence[torch.cuda.Stream], holder: Holder) -> bool:
    """Wait for the streams; False if they do not end in time."""
    events = [stream.record_event() for stream in streams]
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not all(event.query() for event in events):
        if time.monotonic() > deadline:
            return False
        holder.keep_on()
        time.sleep(20e-6)
    return True


def hammer(name: str, config: Config, problem: Problem, device: Device, calls: int) -> Row:
    """Run one config's steps on two streams; raises FlashtuneError if it cannot run."""
    where = torch.device("cuda")
    candidate = Candidate(problem, config, device)
    workload = Workload.create(problem, where, cold_bytes=0, seed=3)
    load = backend_of(candidate).loader(candidate, where)
    steps: list[Step] = [load(), load()]
    if reason := workload.why_wrong(steps[0], **candidate.leeway):
        raise FlashtuneError(reason)
    size = (STATES, problem.n_tokens, problem.hidden_size)
    states = torch.randn(size, device=where).to(workload.states[0].dtype)
    weights = workload.sets[0]
    expected = torch.stack([new_out(problem, where) for _ in range(STATES)])
    for state, out in zip(states, expected, strict=True):
        steps[0](weights, state, out)
    torch.cuda.synchronize()

    streams = [torch.cuda.Stream() for _ in steps]
    outs = [torch.empty_like(expected) for _ in steps]
    wrong = [torch.zeros((), dtype=torch.int64, device=where) for _ in steps]
    torch.cuda.synchronize()
    holder, made, begin, whole = Holder(device), 0, time.monotonic(), True
    while made < calls and whole:
        for call in range(STATES):
            for step, stream, own in zip(steps, streams, outs, strict=True):
                with torch.cuda.stream(stream):
                    step(weights, states[call], own[call])
            holder.keep_on()
        for stream, own, number in zip(streams, outs, wrong, strict=True):
            with torch.cuda.stream(stream):
                number += (own != expected).sum()
                own.fill_(-1)
        whole = ended(streams, holder)
        made += len(steps) * STATES
    return Row(
        plan=name,
        config=short_config(config_data(config)),
        calls=made,
        wrong=sum(int(number) for number in wrong) if whole else -1,
        held=holder.launched,
        seconds=time.monotonic() - begin,
        hung=not whole,
    )


@click.command()
@click.option("--shape", default="qwen3-0.6b", show_default=True, help="A shape, as for search.")
@click.option("--calls", default=100_000, show_default=True, help="Of each config.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write the rows there.")
def main(shape: str, calls: int, output: Path | None) -> None:
    """Hammer each config, and say what became of its calls."""
    problem, device = parse_shape(shape), device_of(torch.device("cuda"))
    rows = []
    print(f"{problem.describe()}, {device.title}\n")
    print("| config | calls | wrong tokens | the other kernel ran | seconds | |")
    print("|---|---|---|---|---|---|")
    for name, config in CONFIGS.items():
        row = hammer(name, config, problem, device, calls)
        rows.append(row)
        said = "HUNG" if row.hung else ""
        cells = f"{row.calls:,} | {row.wrong} | {row.held:,} | {row.seconds:.0f} | {said} |"
        print(f"| {name} | {cells}", flush=True)
        if output:
            data = {"device": device.name, "problem": problem.describe(), "held_us": HELD_US}
            output.write_text(json.dumps({**data, "rows": [asdict(each) for each in rows]}) + "\n")
        if row.hung:
            os._exit(1)  # nothing can be waited for any more
    if any(row.wrong for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
