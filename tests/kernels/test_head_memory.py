"""What a head takes while it is made, beyond what it keeps, in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

MOST = 64 * 2**20  # docs/vllm.md says so
MAKE = """
import sys
import torch
from flashtune import FlashHead

torch.set_num_threads(2)
how, vocab, width = sys.argv[1], 151936, 1024

def make(vocab, n_clusters):
    weight = torch.empty(vocab, width, dtype=torch.bfloat16).normal_()
    centroids = torch.empty(n_clusters, width, dtype=torch.bfloat16).normal_()
    assignments = torch.arange(vocab) % n_clusters
    yield
    if how.startswith("screened"):
        yield FlashHead.screened(weight, how.split()[1], tune="never")
    elif how == "in_place":
        yield FlashHead(weight, centroids, assignments, n_probes=9, rows=how, tune="never")
    else:
        yield FlashHead(weight, centroids, assignments, n_probes=9, screen=how, tune="never")

def memory(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(name))

for _ in make(1024, 64):  # torch's own memory, for what is used the first time
    pass
making = make(vocab, vocab // 16)
next(making)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak begins here
before = memory("VmRSS")
head = next(making)
print(memory("VmHWM") - before - head.added_bytes)
"""


@pytest.mark.parametrize("how", ["none", "int8", "int4", "screened int4", "in_place"])
def test_making_a_head_takes_little_more_than_it_keeps(how: str) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("this kernel does not measure a process's peak")
    made = subprocess.run(
        [sys.executable, "-c", MAKE, how], capture_output=True, text=True, timeout=120
    )
    assert made.returncode == 0, made.stderr
    assert int(made.stdout) < MOST
