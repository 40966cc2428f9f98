"""How candidates are built and run: a folder for each way, and the targets that use them.

A target (target.py) is a kind of device: `MEMBERS` below lists them. To add one: a folder here
with its row, what builds its plans (or another folder's), its vendor in devices.json if its
devices are published, and a row in `MEMBERS`. docs/howto/add-a-backend.md has the whole list.
"""

from flashtune.kernels.backends.cpp.target import CPU
from flashtune.kernels.backends.nvidia.target import NVIDIA
from flashtune.kernels.backends.torch import TORCH

MEMBERS = (NVIDIA, CPU, TORCH)  # TORCH takes all other devices
