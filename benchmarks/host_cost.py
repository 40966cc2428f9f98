"""The host time of a decode call, compared with the dense layer's, at 1, 8 and 32 rows.

    python benchmarks/host_cost.py [--shape SHAPE]... [--out FILE]
    python benchmarks/host_cost.py --python [--out FILE]

Calls are issued a few at a time without waiting for the GPU, so that only the host is timed. A
shared host is slower for seconds at a time, so all rows are timed in several passes, and for each
call the least of its medians is shown; the file has the medians of all passes. `steps` are the
launches themselves, without the head around them; `graph` is a replay of a captured call, the
least that a call can cost the host. GPU times are those of the same calls in turns with the dense
layer, as in `contest`.

With `--python`, which needs no GPU, the step does nothing: what is left is what checks, look-ups
and the allocation of the output cost a call on a CPU, with the padding of a GPU's rows.
"""

import argparse
import json
import statistics
import time
import timeit
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from flashtune import FlashHead
from flashtune.kernels.backends.host import device_of
from flashtune.kernels.measure.contest import contest
from flashtune.kernels.measure.workload import Workload
from flashtune.kernels.runtime.decoder import ROUNDED
from flashtune.tuning_db.problem import Problem, parse_shape

CALLS, ROUNDS, PASSES = 20, 40, 9
ROWS = (1, 5, 8, 32)


def host_us(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median host microseconds of each call, in turns, without filling the queue."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            samples[name].append(1e6 * (time.perf_counter() - start) / CALLS)
    return {name: statistics.median(own) for name, own in samples.items()}


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """A replay of a call; the graph keeps the tensors that the call made."""
    graph, kept = torch.cuda.CUDAGraph(), []
    call()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        kept.append(call())
    return lambda: (graph.replay(), kept)


def measure(problem: Problem, where: torch.device) -> list[dict[str, Any]]:
    """A row for each epilogue and number of rows."""
    weights = Workload.create(problem, where, cold_bytes=0, seed=1).sets[0]
    assignments = torch.empty(problem.vocab_size, dtype=torch.int64, device=where)
    clusters = torch.arange(problem.vocab_size, device=where) // problem.cluster_size
    assignments[weights.ids.long()] = clusters
    weight = torch.empty_like(weights.weight)
    weight[weights.ids.long()] = weights.weight
    head = FlashHead(weight, weights.centroids, assignments, n_probes=problem.n_probes)
    found: list[dict[str, Any]] = []
    timed: list[dict[str, Callable[[], object]]] = []
    for rows in ROWS:
        hidden = torch.randn(rows, problem.hidden_size, dtype=torch.bfloat16, device=where)
        for epilogue, call in (("argmax", head), ("logits", head.logits)):
            head.prepare(rows, epilogue=epilogue)
            out = call(hidden)
            (size,) = head.decoder.step_sizes(rows)
            step = head.decoder._steps[epilogue, size, torch.cuda.current_stream().cuda_stream]
            out = torch.empty((size, *out.shape[1:]), dtype=out.dtype, device=where)
            timed.append(
                {
                    "head": partial(call, hidden),
                    "steps": partial(step, head.decoder.weights, hidden, out),
                    "graph": captured(partial(call, hidden)),
                    "dense": partial(functional.linear, hidden, weight),
                }
            )
            verdict = contest(call, lambda states: functional.linear(states, weight), hidden)
            found.append(
                {
                    "problem": problem.describe(),
                    "epilogue": epilogue,
                    "rows": rows,
                    "plan": head.explain(rows, epilogue)["config"]["plan"],
                    "gpu_us": {"head": verdict.head_us, "dense": verdict.dense_us},
                    "wins": verdict.wins,
                }
            )
    passes = [[host_us(calls) for calls in timed] for _ in range(PASSES)]
    for row, *seen in zip(found, *passes, strict=True):
        row["all_host_us"] = {name: [each[name] for each in seen] for name in seen[0]}
        row["host_us"] = {name: min(own) for name, own in row["all_host_us"].items()}
    return found


def python_us() -> dict[str, dict[str, float]]:
    """Least microseconds of calls on a CPU whose step does nothing, by rows."""
    size, width = 1024, 64
    weight, centroids = torch.randn(size, width).bfloat16(), torch.randn(64, width).bfloat16()
    head = FlashHead(weight, centroids, torch.arange(size) // 16, n_probes=8, tune="never")
    head.decoder._step_sizes = ROUNDED
    found = {}
    for rows in ROWS:
        hidden = torch.randn(rows, width).bfloat16()
        for epilogue in ("argmax", "logits"):
            head.decoder._steps[epilogue, ROUNDED[rows], 0] = lambda *_: None
        calls = {
            "head": partial(head, hidden),
            "head.logits": partial(head.logits, hidden),
            "torch.empty": partial(torch.empty, rows, dtype=torch.int64),
        }
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(10 * ROUNDS):
            for name, call in calls.items():
                samples[name].append(min(timeit.repeat(call, number=500, repeat=3)) / 500)
        found[str(rows)] = {name: 1e6 * min(own) for name, own in samples.items()}
    return found


def main() -> None:
    """Print the costs on this machine."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", action="append")
    parser.add_argument("--python", action="store_true")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.python:
        costs = python_us()
        for rows, own in costs.items():
            text = ", ".join(f"{name} {time_us:.2f}" for name, time_us in own.items())
            print(f"{rows:>4s} rows, microseconds: {text}")
        if given.out:
            given.out.write_text(json.dumps(costs, indent=1) + "\n")
        return
    where = torch.device("cuda", 0)
    device = device_of(where)
    assert device is not None
    found = []
    for shape in given.shape or ["qwen3-vl-2b"]:
        problem = parse_shape(shape)
        print(f"{device.title}, {problem.describe()}: microseconds a call")
        print(f"{'':8s}{'rows':>5s}{'host':>8s}{'steps':>8s}{'graph':>8s}{'dense':>8s}", end="")
        print(f"{'GPU':>9s}{'dense':>8s}  plan")
        for row in measure(problem, where):
            host, gpu = row["host_us"], row["gpu_us"]
            print(f"{row['epilogue']:8s}{row['rows']:5d}", end="")
            print(
                "".join(f"{host[name]:8.1f}" for name in ("head", "steps", "graph", "dense")),
                end="",
            )
            print(f"{gpu['head']:9.1f}{gpu['dense']:8.1f}  {row['plan']}", end="")
            print("" if row["wins"] else ", dense wins")
            found.append(row)
    if given.out:
        given.out.write_text(json.dumps({"device": device.name, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
