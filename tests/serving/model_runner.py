"""Which of vLLM's model runners the scripts of this folder get; import this before vLLM.

On a CPU that is V1, unless SERVING_RUNNER is v2. V2 is the one that GPUs get. It launches kernels
of Triton, which Triton's interpreter runs on a CPU: slowly, but it is that runner.
"""

import os

V2 = os.environ.get("SERVING_RUNNER") == "v2"

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # all in this process
if V2:
    os.environ |= {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1"}

    from types import SimpleNamespace
    from typing import Any

    from triton.backends import backends

    # vLLM for CPUs uses no Triton without this backend. The interpreter never asks for it.
    stand_in: Any = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)
    backends["cpu"] = stand_in
