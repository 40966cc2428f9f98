"""NVIDIA GPUs: each plan through the backend that builds it, Triton's or the CUDA C++ one."""

from collections.abc import Callable, Sequence

import torch

from flashtune.kernels.backends.backend import Backend, KernelUse
from flashtune.kernels.backends.cuda.backend import CudaBackend
from flashtune.kernels.backends.gpu import GraphTimedBackend
from flashtune.kernels.backends.triton.backend import TritonBackend
from flashtune.kernels.plans.config import Config
from flashtune.kernels.plans.streamed import StreamedConfig
from flashtune.kernels.weights import Step
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.problem import Problem


class NvidiaBackend(GraphTimedBackend):
    """One backend for all of a GPU's plans."""

    def render(self, problem: Problem, config: Config, device: Device) -> str:
        """The candidate's source, Python or CUDA C++."""
        return _backend_for(config).render(problem, config, device)

    def compile(self, problem: Problem, config: Config, device: Device) -> Sequence[KernelUse]:
        """Compile for the device's architecture and read what the kernels need."""
        return _backend_for(config).compile(problem, config, device)

    def loader(
        self,
        problem: Problem,
        config: Config,
        device: Device,
        torch_device: torch.device,
        source: str | None = None,
    ) -> Callable[[], Step]:
        """Compile; each call of the result loads the kernels with scratch of its own."""
        return _backend_for(config).loader(problem, config, device, torch_device, source)


def _backend_for(config: Config) -> Backend:
    return CudaBackend() if isinstance(config, StreamedConfig) else TritonBackend()
