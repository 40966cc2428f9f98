"""What a call costs the host: `head(hidden)` beyond its launches, and a look-up of a record.

    python benchmarks/host_cost.py

Calls are issued without waiting for the GPU, so that what is timed is the host alone. The
launches are those of the same step called directly.
"""

import statistics
import time
from collections.abc import Callable

import torch

from flashtune import FlashHead
from flashtune.kernels.backends.host import device_of, toolchain
from flashtune.kernels.backends.target import backend_of
from flashtune.kernels.measure.workload import Workload
from flashtune.kernels.plans.candidate import Candidate
from flashtune.kernels.runtime.choice import choose
from flashtune.kernels.runtime.records import read_sources
from flashtune.tuning_db.problem import parse_shape

CALLS, ROUNDS = 50, 20


def host_us(call: Callable[[], object]) -> float:
    """Median microseconds of host time a call, over rounds short of filling the launch queue."""
    for _ in range(CALLS):
        call()
    rounds = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        rounds.append(1e6 * (time.perf_counter() - start) / CALLS)
    return statistics.median(rounds)


def main() -> None:
    """Print the costs on this machine's GPU."""
    problem = parse_shape("qwen3-vl-2b")
    where = torch.device("cuda", 0)
    device = device_of(where)
    assert device is not None
    weights = Workload.create(problem, where, cold_bytes=0, seed=1).sets[0]
    assignments = torch.empty(problem.vocab_size, dtype=torch.int64, device=where)
    clusters = torch.arange(problem.vocab_size, device=where) // problem.cluster_size
    assignments[weights.ids.long()] = clusters
    head = FlashHead(weights.weight, weights.centroids, assignments, n_probes=problem.n_probes)
    hidden = torch.randn(1, problem.hidden_size, dtype=torch.bfloat16, device=where)
    head(hidden)
    sources = read_sources(device, None, [])
    start = time.perf_counter()
    choice = choose(problem, device, toolchain(device), sources)
    lookup = 1e6 * (time.perf_counter() - start)
    assert choice.config is not None
    candidate = Candidate(problem, choice.config, device)
    step = backend_of(candidate).loader(candidate, where)()
    out = torch.empty(1, dtype=torch.int64, device=where)
    whole = host_us(lambda: head(hidden))
    launches = host_us(lambda: step(weights, hidden, out))
    print(f"head(hidden)              {whole:8.1f} us of host time")
    print(f"its launches alone        {launches:8.1f} us")
    print(f"beyond the launches       {whole - launches:8.1f} us")
    print(f"look-up of a record       {lookup:8.1f} us, once a problem ({choice.level.value})")


if __name__ == "__main__":
    main()
