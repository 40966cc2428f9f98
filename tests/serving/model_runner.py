"""Which of vLLM's model runners the scripts of this folder get; import this before vLLM.

SERVING_RUNNER says `v1` or `v2`; else it is what vLLM itself takes: V1 on a CPU, V2 on a GPU. V2
launches kernels of Triton. Triton's interpreter runs them on a CPU: slowly, but it is that runner.
"""

import os

import torch

GPU = torch.cuda.is_available()
V2 = os.environ.get("SERVING_RUNNER", "v2" if GPU else "v1") == "v2"
INTERPRETED = V2 and not GPU

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # all in this process
if V2 or GPU:
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = str(int(V2))
if INTERPRETED:
    os.environ["TRITON_INTERPRET"] = "1"

    from types import SimpleNamespace
    from typing import Any

    from triton.backends import backends

    # vLLM for CPUs uses no Triton without this backend. The interpreter never asks for it.
    stand_in: Any = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)
    backends["cpu"] = stand_in
