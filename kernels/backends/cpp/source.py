"""From problem, config and device to the C++ source of a decode step."""

from dataclasses import asdict

from flashtune.kernels.plans.config import Config, why_invalid
from flashtune.kernels.plans.cpp_config import LANES, CppConfig, CppFusedConfig, slack_of
from flashtune.kernels.plans.threshold import shape_values, threshold_values
from flashtune.templates.render import Value, render
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import Problem

FORMATS = {"bf16": "BFloat16", "fp16": "Float16", "fp32": "Float32"}  # structs of the templates
READ_TEMPLATE = "cpp/read.cpp.j2"
READ_PIECE = 2**16  # bytes that a thread reads at a time


def render_cpp(problem: Problem, config: Config, device: Device) -> str:
    """The candidate's C++ source; raises FlashtuneError when the config is not valid for it."""
    reason = why_invalid(config, problem, device)
    if reason or not isinstance(config, CppConfig):
        raise FlashtuneError(f"{config.plan} config not valid for {problem.describe()}: {reason}")
    values: dict[str, Value] = {
        "plan": config.plan,
        **shape_values(problem),
        "most": min(problem.n_probes + slack_of(config), problem.n_clusters),
        "weight_format": FORMATS[problem.weight_dtype],
        "centroid_format": FORMATS[problem.centroid_dtype],
        "lanes": LANES[config.simd],
        **asdict(config),
        **threshold_values(problem, slack_of(config)),
        **_part_values(config),
    }
    return render(config.template, values)


def _part_values(config: CppConfig) -> dict[str, Value]:
    """Parts of all threads together."""
    if isinstance(config, CppFusedConfig):
        return {"score_parts": config.threads * config.parts}
    return {
        "score_parts": config.threads * config.score_parts,
        "gather_parts": config.threads * config.gather_parts,
    }


def render_read(threads: int, streams: int) -> str:
    """The source of a library that reads memory with that many threads, to time it."""
    values: dict[str, Value] = {"threads": threads, "streams": streams, "piece_bytes": READ_PIECE}
    return render(READ_TEMPLATE, values)
