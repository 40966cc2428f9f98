"""The Triton backend: from source text to compiled kernels, their needs and their launches.

Usage:
    module = load_source(source)                               # jit functions, nothing compiled
    kernels = compile_module(module, candidate)                # no GPU needed
    loaded = {name: LoadedKernel.load(kernel, index) for name, kernel in kernels.items()}
    step = DecodeStep(problem, module, loaded, device)         # on the GPU
    step(weights, hidden, out)                                 # launches; capturable
"""

import functools
import hashlib
import linecache
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flashtune.kernels.backends.cubin import resource_usage
from flashtune.kernels.backends.gpu import Launch, Prepare, Run
from flashtune.kernels.backends.nvidia.driver import Binary, Shape
from flashtune.kernels.backends.nvidia.step import DriverStep, index_of
from flashtune.kernels.epilogues.epilogue import new_out
from flashtune.kernels.formats.format import format_of
from flashtune.kernels.measure.failure import DoesNotFitError
from flashtune.kernels.plans.candidate import Candidate, KernelUse, resident_programs
from flashtune.kernels.weights import Step
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import Problem

ALIGNMENT = 16  # bytes; every pointer handed to a kernel is aligned to it
EMPTY_BEST = -(2**63)
META = torch.device("meta")


@dataclass(frozen=True, slots=True)
class Scratch:
    """What a step writes on its way. Not to be shared by steps that run at the same time.

    Where clusters are listed: listed int32 `[2 * n_clusters + 1]`, the clusters that any token
    probes, for each cluster whether it is among them, and how many are. Where rows are multiplied
    by digits: digits int8, four for each number of the hidden states, and units float32
    `[n_tokens]`, what the states are multiples of. Where candidates are decided again: screened
    float32 `[n_tokens, vocab_size]`, the logits of those that were screened; maxima float32, the
    best of each program that screens, for each token.
    """

    scores: torch.Tensor
    selected: torch.Tensor
    state: torch.Tensor
    digits: torch.Tensor | None = None
    units: torch.Tensor | None = None
    listed: torch.Tensor | None = None
    screened: torch.Tensor | None = None
    maxima: torch.Tensor | None = None

    @classmethod
    def create(
        cls,
        problem: Problem,
        library_topk: bool,
        device: torch.device,
        maxima: int = 0,
        lists: bool = False,
        digits: int = 0,
    ) -> "Scratch":
        """Scratch in the state that a step leaves behind: no best logit yet, counters zero.

        maxima: how many there are of all tokens together, 0 where nothing is decided again.
        lists: whether the clusters that any token probes are listed. digits: of a token's hidden
        state, how many there are in all.
        """
        tokens, clusters = problem.n_tokens, problem.n_clusters
        width, dtype = (clusters, torch.int32)
        if library_topk:
            width, dtype = (problem.n_probes, torch.int64)
        state = torch.zeros(3 * tokens + 1, dtype=torch.int64, device=device)
        state[:tokens] = EMPTY_BEST

        def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        def floats(*shape: int) -> torch.Tensor:
            return empty(*shape, dtype=torch.float32)

        return cls(
            scores=floats(tokens, clusters),
            selected=empty(tokens, width, dtype=dtype),
            state=state,
            digits=empty(tokens, digits, dtype=torch.int8) if digits else None,
            units=floats(tokens) if digits else None,
            listed=empty(2 * clusters + 1, dtype=torch.int32) if lists else None,
            screened=floats(tokens, problem.vocab_size) if maxima else None,
            maxima=floats(maxima) if maxima else None,
        )


def scratch_of(problem: Problem, module: ModuleType, device: torch.device) -> Scratch:
    """Scratch for a step of a source's module."""
    return Scratch.create(
        problem,
        library_topk=_uses_topk(module),
        device=device,
        maxima=getattr(module, "MAXIMA_OF_ALL", 0),
        lists=hasattr(module, "LISTED"),
        digits=module.DIGITS.value if hasattr(module, "DIGITS") else 0,
    )


def load_source(source: str) -> ModuleType:
    """Execute a rendered source and return its module.

    The text is registered with linecache, where Triton finds it, so nothing is written to disk.
    """
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    filename = f"flashtune-{digest}.py"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    module = ModuleType(f"flashtune_{digest}")
    module.__file__ = filename
    exec(compile(source, filename, "exec"), module.__dict__)
    return module


def _signature(module: ModuleType, name: str, problem: Problem) -> dict[str, str]:
    """The types of a kernel's arguments, in Triton's words."""
    state = f"*{format_of(problem.state_dtype).triton}"
    types = {
        "hidden_ptr": state,
        "last": "i32",
        "centroids_ptr": f"*{format_of(problem.centroid_dtype).triton}",
        "weight_ptr": f"*{format_of(problem.weight_dtype).triton}",
        "centroid_scales_ptr": f"*{_scale_type(problem.centroid_dtype)}",
        "weight_scales_ptr": f"*{_scale_type(problem.weight_dtype)}",
        "model_weight_ptr": state,
        "ids_ptr": "*i32",
        "out_ptr": state if new_out(problem, META).is_floating_point() else "*i64",
        "scores_ptr": "*fp32",
        "selected_ptr": "*i64" if _uses_topk(module) else "*i32",
        "state_ptr": "*i64",
        "digits_ptr": "*i8",
        "units_ptr": "*fp32",
        "listed_ptr": "*i32",
        "screened_ptr": "*fp32",
        "maxima_ptr": "*fp32",
    }
    return {argument: types[argument] for argument in getattr(module, name).arg_names}


def _scale_type(name: str) -> str:
    return {"float32": "fp32", "float16": "fp16", "": ""}[format_of(name).scale_name]


def _uses_topk(module: ModuleType) -> bool:
    return any(launch["kernel"] == "torch_topk" for launch in module.LAUNCHES)


def compile_module(module: ModuleType, candidate: Candidate) -> dict[str, Any]:
    """Compile each kernel of a candidate's loaded source; no GPU is needed.

    Returns Triton's CompiledKernel by kernel name. Raises what Triton raises.
    """
    compiled = {}
    for launch in module.LAUNCHES:
        name = launch["kernel"]
        if name == "torch_topk":
            continue
        compiled[name] = compile_kernel(
            getattr(module, name),
            _signature(module, name, candidate.problem),
            candidate.device.capability,
            candidate.lanes,
            num_warps=launch["num_warps"],
            launch_pdl=module.PDL,
            launch_cooperative_grid=module.COOPERATIVE,
        )
    return compiled


def compile_kernel(
    kernel: Any,
    signature: Mapping[str, str],
    capability: int,
    lanes: int,
    *,
    num_warps: int,
    **flags: bool,
) -> Any:
    """Compile one jit function, given the types of its arguments in Triton's words; no GPU needed.

    Pointers are taken to be aligned to `ALIGNMENT`. flags: those of Triton's options that are set.
    """
    aligned = {
        (place,): [["tt.divisibility", ALIGNMENT]]
        for place, argument in enumerate(signature)
        if argument.endswith("_ptr")
    }
    wanted = {name: True for name, is_set in flags.items() if is_set}
    return triton.compile(
        ASTSource(kernel, dict(signature), attrs=aligned),
        target=GPUTarget("cuda", capability, lanes),
        options={"num_warps": num_warps, "num_stages": 1, **wanted},
    )


def launches_of(
    module: ModuleType, scratch: Scratch, prepare: Callable[[dict[str, Any]], Prepare]
) -> list[Launch]:
    """A module's launches with this scratch; prepare: what prepares one of its LAUNCHES."""
    found = []
    for launch in module.LAUNCHES:
        name = launch["kernel"]
        if name == "torch_topk":
            found.append(Launch(name, partial(_prepared_topk, scratch), ()))
            continue
        arguments = (each.removesuffix("_ptr") for each in getattr(module, name).arg_names)
        found.append(Launch(name, prepare(launch), tuple(arguments)))
    return found


def _prepared_topk(scratch: Scratch, _: Sequence[Any]) -> Run:
    values = torch.empty_like(scratch.selected, dtype=torch.float32)

    def topk(_: int) -> None:
        torch.topk(scratch.scores, values.shape[1], sorted=False, out=(values, scratch.selected))

    return topk


@dataclass(frozen=True, slots=True)
class LoadedKernel:
    """A compiled kernel, loaded on a device."""

    compiled: Any  # Triton's CompiledKernel
    binary: Binary

    @classmethod
    def load(cls, compiled: Any, index: int) -> "LoadedKernel":
        """Load it; raises FlashtuneError if it needs what only Triton's launcher provides."""
        metadata = compiled.metadata
        for kind in ("global_scratch_size", "profile_scratch_size"):
            if getattr(metadata, kind, 0):
                raise FlashtuneError(f"{metadata.name} needs scratch ({kind})")
        return cls(compiled, Binary(compiled.kernel, index))

    def at(self, programs: int) -> Prepare:
        """A function that prepares a launch of this many programs."""
        metadata = self.compiled.metadata
        shape = Shape(
            metadata.name,
            programs=programs,
            threads=metadata.target.warp_size * metadata.num_warps,
            dynamic_bytes=metadata.shared,
            overlapped=metadata.launch_pdl,
            cooperative=metadata.launch_cooperative_grid,
        )
        return partial(self.binary.prepared, shape)


class DecodeStep(DriverStep):
    """A candidate in Triton."""

    def __init__(
        self,
        problem: Problem,
        module: ModuleType,
        kernels: Mapping[str, LoadedKernel],
        device: torch.device,
    ) -> None:
        """Take kernels that are loaded on `device`; the step has scratch of its own."""
        super().__init__(device)
        self.recordable = not _uses_topk(module)  # which torch launches itself
        self.binaries = [each.binary for each in kernels.values()]
        self.scratch = scratch_of(problem, module, device)
        self.launches = launches_of(
            module, self.scratch, lambda each: kernels[each["kernel"]].at(each["programs"])
        )


class TritonBackend:
    """GPUs, through Triton."""

    def compile(self, candidate: Candidate, source: str | None = None) -> Sequence[KernelUse]:
        """Compile for the device's architecture and read what the kernels need."""
        device = candidate.device
        module, kernels = _compiled(candidate, source or candidate.source)
        uses = [
            _read_use(launch, kernels[launch["kernel"]])
            for launch in module.LAUNCHES
            if launch["kernel"] in kernels
        ]
        for use in uses:
            if use.shared_bytes > device.limits.shared_per_block:
                raise DoesNotFitError(
                    f"{use.kernel} needs {use.shared_bytes} bytes of shared memory, but "
                    f"{device.name} has {device.limits.shared_per_block} per block"
                )
            at_once = resident_programs(use, device) * device.sm_count
            if module.COOPERATIVE and use.programs > at_once:
                raise DoesNotFitError(
                    f"{use.kernel} needs {use.programs} programs resident at once, but "
                    f"{device.name} holds {at_once}"
                )
        return uses

    def loader(
        self, candidate: Candidate, torch_device: torch.device, source: str | None = None
    ) -> Callable[[], Step]:
        """Compile; each call of the result loads the kernels with scratch of its own."""
        module, kernels = _compiled(candidate, source or candidate.source)

        @functools.cache
        def loaded() -> dict[str, LoadedKernel]:
            index = index_of(torch_device)
            return {name: LoadedKernel.load(kernel, index) for name, kernel in kernels.items()}

        return lambda: DecodeStep(candidate.problem, module, loaded(), torch_device)


def _compiled(candidate: Candidate, source: str) -> tuple[ModuleType, dict[str, Any]]:
    """The source's module, and its kernels compiled for the device's architecture."""
    module = load_source(source)
    return module, compile_module(module, candidate)


def _read_use(launch: dict[str, Any], kernel: Any) -> KernelUse:
    """What a compiled kernel needs: registers and spills from its binary."""
    (needs,) = resource_usage(kernel.kernel).values()
    return KernelUse(
        kernel=launch["kernel"],
        programs=launch["programs"],
        warps=launch["num_warps"],
        registers=needs["REG"],
        shared_bytes=kernel.metadata.shared,
        spilled=needs["STACK"],
    )
