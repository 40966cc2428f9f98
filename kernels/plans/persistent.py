"""The plan `persistent`: one cooperative launch with a barrier between score and gather."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import ClassVar

from flashtune.kernels.plans.candidate import Candidate, KernelUse, Plan, Rule
from flashtune.kernels.plans.knob import Config, knob
from flashtune.kernels.plans.parts.screen import why_not_rescored
from flashtune.kernels.plans.parts.size import (
    epilogue_values,
    read_by,
    shape_values,
    stored_values,
)
from flashtune.kernels.plans.parts.threshold import lane_values, prefetch_values, share_values
from flashtune.kernels.plans.parts.tile import (
    PREFETCH_MARGINS,
    SLACKS,
    TILE,
    expected_pass,
    narrowed,
    why_not_overlapped,
    why_not_prefetched,
    why_not_selected,
    why_not_tiled,
)
from flashtune.kernels.plans.parts.widen import BY_BITS, WIDENED
from flashtune.templates.render import Value
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.problem import Problem


@dataclass(frozen=True, kw_only=True, slots=True)
class PersistentConfig(Config):
    """One cooperative launch with a barrier between score and gather; knobs as in StagedConfig."""

    plan: ClassVar[str] = "persistent"

    programs_per_sm: int = knob(1, (1, 2, 3, 4))
    warps: int = knob(8, (4, 8, 16))
    score_rows: int = knob(4, (1, 2, 4, 8, 16))
    score_block: int = knob(1024, (64, 128, 256, 512, 1024, 2048, 4096))
    score_stages: int = knob(1, (1, 2, 3, 4))
    score_unroll: int = knob(1, (1, 2, 4))
    slab_stages: int = knob(1, (1, 2, 3, 4))
    slack: int = knob(16, SLACKS)
    gather_rows: int = knob(16, (4, 8, 16, 32))
    gather_block: int = knob(256, (64, 128, 256, 512, 1024, 2048, 4096))
    gather_stages: int = knob(1, (1, 2, 3, 4))
    gather_unroll: int = knob(1, (1, 2, 4))
    prefetch_margin: int = knob(-1, PREFETCH_MARGINS)
    evict: str = knob("evict_first", ("evict_first", "no_hint"))
    widen: str = knob("cast", WIDENED)
    pdl: bool = knob(False, (False, True))


_STARTS = (
    PersistentConfig(
        score_rows=8,
        score_block=2048,
        slab_stages=3,
        gather_block=1024,
        gather_unroll=2,
        prefetch_margin=10,
        pdl=True,
    ),
    PersistentConfig(score_rows=8, gather_block=512),
)  # starting points of searches, found by hand on one H200


def _launches(candidate: Candidate) -> Sequence[KernelUse]:
    """One kernel that does both passes, with the resources of the larger one."""
    config = candidate.config
    programs = candidate.device.sm_count * config.programs_per_sm
    both = [
        expected_pass(stage, candidate, config.warps, programs, stage == "gather")
        for stage in ("score", "gather")
    ]
    return (
        KernelUse(
            kernel="decode",
            programs=programs,
            warps=config.warps,
            registers=max(use.registers for use in both),
            shared_bytes=max(use.shared_bytes for use in both),
        ),
    )


def _values(candidate: Candidate) -> dict[str, Value]:
    problem, config = candidate.problem, candidate.config
    (decode,) = _launches(candidate)
    parts = decode.programs // problem.n_tokens
    slab = -(-problem.n_clusters // decode.programs)
    # programs that do not score must not fill either: those that fill pass on NaN among scores
    scoring = replace(decode, programs=-(-problem.n_clusters // slab))
    return {
        **shape_values(problem),
        **stored_values(problem),
        **asdict(config),
        "programs": decode.programs,
        "slab": slab,
        "parts": parts,
        **lane_values(problem, config.slack, config.warps),
        **prefetch_values(problem, config.slack, config.prefetch_margin),
        **share_values(problem, config.gather_rows, config.warps, parts),
        **epilogue_values(problem, scoring),
    }


def _why_not_resident(candidate: Candidate) -> str | None:
    problem, config, device = candidate.problem, candidate.config, candidate.device
    programs = device.sm_count * config.programs_per_sm
    if problem.n_tokens > programs:
        return f"{problem.n_tokens} tokens are more than the {programs} programs"
    if config.programs_per_sm * config.warps * candidate.lanes > device.limits.threads_per_sm:
        return "the grid would not be resident at once: too many threads for a multiprocessor"
    return None


def _starts(problem: Problem, device: Device) -> Sequence[PersistentConfig]:
    return narrowed(_STARTS, problem)


PERSISTENT = Plan(
    config=PersistentConfig,
    builder="triton",
    template="triton/persistent.py.j2",
    rules=(
        read_by("triton"),
        *(
            Rule(
                lambda each, stage=stage: why_not_tiled(stage, each.config.warps, each),  # type: ignore[misc]
                frozenset(["warps", *(f"{stage}_{each}" for each in TILE if each != "warps")]),
            )
            for stage in ("score", "gather")
        ),
        Rule(why_not_overlapped, frozenset(["pdl"])),
        BY_BITS,
        Rule(lambda each: why_not_selected(each.problem, each.config.warps), frozenset(["warps"])),
        Rule(why_not_prefetched, frozenset(["prefetch_margin"])),
        Rule(_why_not_resident, frozenset(["programs_per_sm", "warps"])),
        Rule(why_not_rescored),
    ),
    launches=_launches,
    values=_values,
    slack=lambda config: int(config.slack),
    starts=_starts,
)
