"""What can run: the plans, a file each, and the registry that lists them.

To add a plan: a file here with its config, rules, launches and template values; its template; a
row in `MEMBERS` below and in the `plans` of the targets that it runs on; and, if it is to be
predicted, a file in kernels/predict/stages. docs/howto/add-a-plan.md has the whole list.
"""

from flashtune.kernels.plans.batched import BATCHED
from flashtune.kernels.plans.cpp_fused import CPP_FUSED
from flashtune.kernels.plans.cpp_staged import CPP_STAGED
from flashtune.kernels.plans.dense import DENSE
from flashtune.kernels.plans.persistent import PERSISTENT
from flashtune.kernels.plans.staged import STAGED
from flashtune.kernels.plans.streamed import STREAMED
from flashtune.kernels.plans.torch import TORCH

__all__ = [
    "BATCHED",
    "CPP_FUSED",
    "CPP_STAGED",
    "DENSE",
    "FALLBACK",
    "MEMBERS",
    "PERSISTENT",
    "STAGED",
    "STREAMED",
]

FALLBACK = TORCH  # runs on every device, if nothing else does
MEMBERS = (STAGED, PERSISTENT, BATCHED, DENSE, STREAMED, CPP_FUSED, CPP_STAGED, TORCH)
