"""From problem, config and device to the CUDA C++ source of a decode step."""

from dataclasses import asdict

from flashtune.kernels.plans.config import Config, why_invalid
from flashtune.kernels.plans.streamed import StreamedConfig
from flashtune.kernels.plans.threshold import (
    prefetch_spread,
    shape_values,
    threshold_quantile,
    threshold_values,
)
from flashtune.templates.render import Value, render
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import Problem


def render_cuda(problem: Problem, config: Config, device: Device) -> str:
    """The candidate's CUDA C++; raises FlashtuneError when the config is not valid for it."""
    reason = why_invalid(config, problem, device)
    if reason or not isinstance(config, StreamedConfig):
        raise FlashtuneError(f"{config.plan} config not valid for {problem.describe()}: {reason}")
    least = threshold_quantile(problem, config.slack) - config.prefetch_margin / 100
    spread = prefetch_spread(problem, device.sm_count)
    values: dict[str, Value] = {
        **shape_values(problem),
        **asdict(config),
        **threshold_values(problem, config.slack),
        "weight_dtype": problem.weight_dtype,
        "centroid_dtype": problem.centroid_dtype,
        "blocks": device.sm_count,
        "prefetch_quantile": round(least, 6),
        "spread": spread,
        "stripe": -(-problem.n_clusters // (device.sm_count // spread)),
    }
    return render(config.template, values)
