"""FlashHead's time if the vocabulary is split over several GPUs of one host.

    python benchmarks/tensor_parallel.py [--shape NAME]… [--tokens N]… [--json FILE]

One process per GPU, connected by NCCL. Each decodes with its share of the vocabulary and of the
clusters; then one all-reduce takes the best of all: logit and token id packed into 64 bits, as in
the kernels. Rows of the table:

- one GPU: the whole head on one GPU
- split, share of the probes: each GPU probes its share of `n_probes`; another choice of clusters
- split, all of the probes: each GPU probes its best `n_probes`, so that the best of all are always
  among them
- dense, split: each GPU's part of the dense head, then an all-gather of logits, as vLLM does it
- all-reduce: of the packed tokens alone

Each is a CUDA graph of 20 steps, timed on all GPUs at once; medians of the slowest GPU. Kernels
are those that the runtime would choose, or the default; each is verified before it is timed. The
token of a step stands in for its packed word, which has the same size and is reduced in the same
way.
"""

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist

from flashtune.kernels.backends.host import device_of, toolchain
from flashtune.kernels.backends.target import backend_of
from flashtune.kernels.epilogues.epilogue import new_out
from flashtune.kernels.measure.workload import Workload
from flashtune.kernels.plans.candidate import Candidate
from flashtune.kernels.runtime.records import best_choice
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import Problem, parse_shape

STEPS, REPLAYS = 20, 40


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """The time of one variant, in microseconds per step."""

    problem: str
    way: str
    gpus: int
    time_us: float


def replayed(step: Callable[[int], Any]) -> float:
    """Microseconds per step of a graph of steps, replayed on all GPUs at once."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in range(STEPS):
            step(call)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in range(STEPS):
                step(call)
        times = []
        for _ in range(REPLAYS):
            torch.cuda.synchronize()
            dist.barrier()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) * 1e3 / STEPS)
    slowest = torch.tensor(statistics.median(times), device="cuda")
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return float(slowest)


def share_of(whole: Problem, gpus: int) -> Problem:
    """A GPU's share of the vocabulary and the clusters, with all of the probes."""
    clusters = -(-whole.n_clusters // gpus)
    size = clusters * whole.cluster_size
    return replace(
        whole, vocab_size=size, n_clusters=clusters, n_probes=min(clusters, whole.n_probes)
    )


def head_us(problem: Problem, *, reduced: bool) -> float:
    """Microseconds of the head's step, with the all-reduce of its tokens or without."""
    where = torch.device("cuda", torch.cuda.current_device())
    device = device_of(where)
    config = best_choice(problem, device, toolchain(device), []).config
    candidate = Candidate(problem, config, device)
    workload = Workload.create(problem, where, cold_bytes=device.l2_bytes, seed=1)
    step = backend_of(candidate).loader(candidate, where)()
    if reason := workload.why_wrong(step, **candidate.leeway):
        raise FlashtuneError(reason)
    outs = [new_out(problem, where) for _ in range(STEPS)]
    sets = len(workload.sets)

    def run(call: int) -> None:
        step(workload.sets[call % sets], workload.states[call % sets], outs[call])
        if reduced:
            dist.all_reduce(outs[call], dist.ReduceOp.MAX)

    return replayed(run)


def dense_us(problem: Problem, gpus: int) -> float:
    """Microseconds of the dense head's part and the all-gather of its logits."""
    vocab, hidden, tokens = problem.vocab_size, problem.hidden_size, problem.n_tokens
    weights = [torch.randn(vocab // gpus, hidden, device="cuda").bfloat16() for _ in range(2)]
    state = torch.randn(tokens, hidden, device="cuda").bfloat16()
    parts = torch.empty(gpus, tokens, vocab // gpus, device="cuda", dtype=torch.bfloat16)

    def run(call: int) -> None:
        own = torch.nn.functional.linear(state, weights[call % 2])
        if gpus > 1:
            dist.all_gather_into_tensor(parts, own)
            parts.argmax(dim=2)
        else:
            own.argmax(dim=1)

    return replayed(run)


def measure(problem: Problem, gpus: int) -> list[Row]:
    """The rows of one problem."""
    share = share_of(problem, gpus)
    fewer = replace(share, n_probes=max(1, share.n_probes // gpus))
    tokens = torch.zeros(problem.n_tokens, dtype=torch.int64, device="cuda")
    times = {
        ("one GPU", 1): head_us(problem, reduced=False),
        ("split, share of the probes", gpus): head_us(fewer, reduced=True),
        ("split, all of the probes", gpus): head_us(share, reduced=True),
        ("dense, one GPU", 1): dense_us(problem, 1),
        ("dense, split", gpus): dense_us(problem, gpus),
        ("all-reduce", gpus): replayed(lambda _: dist.all_reduce(tokens, dist.ReduceOp.MAX)),
    }
    return [
        Row(problem=problem.describe(), way=way, gpus=number, time_us=time_us)
        for (way, number), time_us in times.items()
    ]


def work(rank: int, gpus: int, shapes: Sequence[Problem], output: Path | None) -> None:
    """One GPU's process; the first one prints."""
    torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl",
        init_method="tcp://127.0.0.1:29511",
        rank=rank,
        world_size=gpus,
        device_id=torch.device("cuda", rank),
    )
    rows = []
    if rank == 0:
        print(f"{gpus} x {torch.cuda.get_device_name()}, NCCL {torch.cuda.nccl.version()}\n")
        print("| problem | way | GPUs | us a step |\n|---|---|---|---|")
    for problem in shapes:
        for row in measure(problem, gpus):
            rows.append(row)
            if rank == 0:
                print(
                    f"| {row.problem} | {row.way} | {row.gpus} | {row.time_us:.1f} |", flush=True
                )
    if rank == 0 and output:
        output.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    dist.destroy_process_group()


@click.command()
@click.option("--shape", "shapes", multiple=True, default=("qwen3-vl-2b",), show_default=True)
@click.option("--tokens", "numbers", multiple=True, type=int, default=(1, 8), show_default=True)
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write the rows there.")
def main(shapes: Sequence[str], numbers: Sequence[int], output: Path | None) -> None:
    """Time heads that are split over all GPUs of this machine."""
    gpus = torch.cuda.device_count()
    problems = [replace(parse_shape(s), n_tokens=n) for s in shapes for n in numbers]
    torch.multiprocessing.spawn(work, (gpus, problems, output), nprocs=gpus)


if __name__ == "__main__":
    main()
