"""The head of one model that vLLM serves: FlashHead if it may answer, else None for dense.

Usage, by the layers in `vllm.py`:
    served = served_head(vllm_config, drafts=False)     # None unless something asks for FlashHead
    served.build(lm_head)                  # when the weights are loaded
    logits = served.logits(layer, lm_head, hidden)     # None: use the dense head

Any error or unsupported feature gives one warning and the dense head.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch.nn import functional

from flashtune.kernels.epilogues.epilogue import FILL
from flashtune.kernels.formats.screen import NO_SCREEN, screen_of
from flashtune.kernels.head import TUNE, FlashHead
from flashtune.kernels.integrations.folder_head import flash_head_of
from flashtune.kernels.integrations.vllm_gate import RequestGate, gate_of
from flashtune.kernels.measure.contest import Verdict, contest
from flashtune.kernels.model_folder.folder import SCREEN_KEY, ModelFolder
from flashtune.kernels.runtime.decoder import ROUNDED
from flashtune.kernels.runtime.trouble import is_of_a_signal
from flashtune.kernels.weights import filled_up
from flashtune.tuning_db.environment import (
    flash_head_always,
    flash_head_enabled,
    named_probes,
    named_screen,
    named_tune,
    verifies_drafts,
)
from flashtune.tuning_db.errors import FlashtuneError

LOG = logging.getLogger("vllm.flashtune")  # vLLM shows only loggers below its own name
REQUIRE = "require"
MODES = (*TUNE, REQUIRE)  # of FLASHTUNE_TUNE; the last: only what was measured here is used
SIZES = tuple(sorted({*ROUNDED[1:]}))
SHARING = ("eagle", "mtp")  # methods of speculative decoding whose draft has its target's head

_SERVED: "WeakValueDictionary[tuple[int, bool], ServedHead]" = WeakValueDictionary()


def served_head(vllm_config: Any, *, drafts: bool) -> "ServedHead | None":
    """The one head of an engine's target or draft, or None if it is off or nothing asks for it.

    A FlashHead model asks for it; for any model, a screen in FLASHTUNE_SCREEN or in the model's
    config does. drafts: the head of what drafts, whose tokens are all verified.
    """
    if not flash_head_enabled():
        return None
    # The text part of a vision model has a config of its own, but shares this one, as the draft
    # of an engine may
    key = (id(vllm_config.compilation_config), drafts)
    served = _SERVED.get(key)
    if served is None:
        folder, screen = flash_head_folder(vllm_config.model_config), named_screen()
        if folder is not None or screen not in ("", NO_SCREEN):
            served = ServedHead(vllm_config, folder, screen or None, drafts=drafts)
            _SERVED[key] = served
    return served


def flash_head_folder(model_config: Any) -> ModelFolder | None:
    """The folder of vLLM's model if its config declares a FlashHead, else None."""
    try:
        folder = ModelFolder.open(model_config.model, getattr(model_config, "revision", None))
    except FlashtuneError:  # not a format with clusters
        return None
    return folder if folder.has_clusters or SCREEN_KEY in folder.config else None


def why_unsupported(vllm_config: Any, *, drafts: bool) -> str | None:
    """The requested engine feature that FlashHead doesn't support, or None."""
    parallel = vllm_config.parallel_config
    if parallel.tensor_parallel_size > 1:
        return (
            "tensor parallelism splits the head, but FlashHead needs the whole head on one device"
        )
    if vllm_config.lora_config is not None:
        return "LoRA is enabled, and an adapter may change the head"
    if vllm_config.speculative_config is None or drafts:
        return None
    if not verifies_drafts():
        return (
            "in speculative decoding this model verifies, and FlashHead would change which tokens "
            "are accepted; set FLASHTUNE_VERIFY=1 to use it nevertheless"
        )
    if not getattr(vllm_config, "use_v2_model_runner", True):
        return (
            "beside speculative decoding vLLM's V1 model runner loads no logits processors, so it "
            "can't be known which requests need the dense head: leave FLASHTUNE_VERIFY unset, or "
            "use the V2 model runner"
        )
    return None


def is_draft(vllm_config: Any) -> bool:
    """Whether an engine's config belongs to the draft model of another model.

    Its target verifies everything that a draft model proposes. Drafts that share the target's head
    (`lends_head`) are built with the config of the target.
    """
    speculative = vllm_config.speculative_config
    draft = getattr(speculative, "draft_model_config", None)
    if draft is None:
        return False
    target = getattr(speculative, "target_model_config", None)
    own = vllm_config.model_config
    named = getattr(own, "model", None)
    return own is draft or named == getattr(draft, "model", None) != getattr(target, "model", None)


def lends_head(vllm_config: Any) -> bool:
    """Whether an engine's draft decodes with the head of this config's model (EAGLE, MTP)."""
    method = getattr(vllm_config.speculative_config, "method", None)
    return method in SHARING and not is_draft(vllm_config)


class ServedHead:
    """Decides call by call between FlashHead and the dense head of one engine.

    Gives up for good, with one warning, if the cause can't change while the engine runs. The dense
    head answers for the numbers of rows at which it was found to be faster here. FlashHead's copy
    of the weight, in the order of clusters, or its screen, comes on top of the dense head's.
    """

    def __init__(
        self,
        vllm_config: Any,
        folder: ModelFolder | None,
        screen: str | None = None,
        *,
        drafts: bool = False,
    ) -> None:
        """For the engine with this config.

        folder: the model's folder, if it asks for FlashHead. screen: overrides the folder's.
        drafts: for the draft's steps, which need no gate.
        """
        self._config, self._folder, self._screen = vllm_config, folder, screen
        self._drafts = drafts
        self._fills = folder is not None and folder.has_clusters
        self._given_up = self._asked = False
        self._lm_head: Any = None
        self._head: FlashHead | None = None
        self._sizes: dict[int, int] = {}  # of SIZES, by the rows for which FlashHead answers
        why = why_unsupported(vllm_config, drafts=drafts)
        if why:
            self._give_up(why)

    def build(self, lm_head: Any) -> None:
        """Take the weight of vLLM's head layer, loaded (again); compile what will be called."""
        if self._given_up or self._lm_head not in (None, lm_head):
            return
        try:
            engine = id(self._config.compilation_config)
            target = _SERVED.get((engine, False)) if self._drafts else None
            if target is not None and target._head is not None and target._lm_head is lm_head:
                self._head, self._sizes = target._head, target._sizes
                LOG.info("FlashHead answers for target and draft, and is there once")
            else:
                self._head, answers = self._built(lm_head)
                self._sizes = {rows: size for rows, size in enumerate(ROUNDED) if size in answers}
            self._lm_head = lm_head
        except FlashtuneError as error:
            self._give_up(str(error))
        except Exception as error:  # such as no memory: the model must still load
            self._give_up(f"{type(error).__name__}: {error}")

    def logits(
        self, processor: Any, lm_head: Any, hidden: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor | None:
        """The dense head's logits for hidden `[rows, hidden_size]`; None: call the dense head.

        `[rows, vocabulary with vLLM's padding]`, candidates' logits and `FILL` elsewhere.
        processor: the LogitsProcessor that asks; args, kwargs: vLLM's further arguments, the bias
        or nothing.
        """
        if not self._asked and not self._ready(processor, lm_head, hidden):
            return None
        if hidden.shape[0] not in self._sizes or self._lm_head is not lm_head:
            return None
        for bias in (*args, *kwargs.values()):
            if bias is not None:
                self._give_up("the head has a bias")
                return None
        if self._head is None or not (self._drafts or _is_open(gate_of(self._config))):
            return None
        try:
            return self._padded(self._head, hidden, lm_head.weight.shape[0])
        except Exception as error:
            if is_of_a_signal(error):
                raise
            self._give_up(f"{type(error).__name__}: {error}")
            return None

    def _ready(self, processor: Any, lm_head: Any, hidden: torch.Tensor) -> bool:
        """Whether FlashHead may be used, as checked in the first call with few rows."""
        if self._given_up or hidden.dim() != 2 or not 0 < hidden.shape[0] <= SIZES[-1]:
            return False
        if hidden.is_cuda and torch.cuda.is_current_stream_capturing():
            return False  # nothing can be tried or built now
        gate = gate_of(self._config)
        why = _why_never(processor, lm_head, hidden, self._fills)
        if self._drafts and self._lm_head not in (None, lm_head):
            why = "it has a head of its own, and not its target's"
        if gate is None and not self._drafts:
            why = (
                "this vLLM did not load the logits processor that finds requests which need the "
                "dense head"
            )
        if why:
            self._give_up(why)
        elif self._lm_head is None and (self._drafts or _is_open(gate)):
            self.build(lm_head)  # the input embedding is the head: build was not called
        self._asked = not self._given_up and self._lm_head is not None
        return self._asked

    def _padded(self, head: FlashHead, hidden: torch.Tensor, width: int) -> torch.Tensor:
        """Logits `[rows, width]` by kernels that were made when the head was built."""
        rows, on_cpu = hidden.shape[0], not hidden.is_cuda
        if on_cpu:  # where FlashHead would have kernels of just so many rows
            hidden = filled_up(hidden, self._sizes[rows])
        logits = head.decoder.decode(hidden, "logits")
        if on_cpu:
            logits = logits[:rows]
        missing = width - logits.shape[1]
        return functional.pad(logits, (0, missing), value=FILL) if missing else logits

    def _built(self, lm_head: Any) -> tuple[FlashHead, frozenset[int]]:
        """The head with its kernels, and the numbers of rows for which it answers."""
        from vllm.model_executor.layers.linear import UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

        plain = (UnquantizedEmbeddingMethod, UnquantizedLinearMethod)
        if not isinstance(lm_head.quant_method, plain):
            raise FlashtuneError(f"the head is quantised ({type(lm_head.quant_method).__name__})")
        if getattr(lm_head, "bias", None) is not None:
            raise FlashtuneError("the head has a bias")
        most = self._config.scheduler_config.max_num_seqs * self._rows_a_request()
        sizes = [size for size in SIZES if size < 2 * most]
        tune = named_tune(MODES)
        with _usual_defaults():
            weight = lm_head.weight.detach()[: lm_head.org_vocab_size]
            head = self._made(weight, TUNE[-1] if tune == REQUIRE else tune)
            head.prepare(*sizes, epilogue="logits")
            if tune == REQUIRE:
                sizes = [size for size in sizes if _is_measured(head, size)]
            verdicts = {} if flash_head_always() else _verdicts(head, lm_head, sizes)
        answers = [size for size in sizes if size not in verdicts or verdicts[size].wins]
        for size, verdict in verdicts.items():
            LOG.info("FlashHead for %d rows: %s", size, verdict.describe())
        if not answers:
            why = "no record was measured here" if not sizes else "the dense head is faster here"
            raise FlashtuneError(f"{why}, at any number of rows")
        LOG.info(
            "FlashHead %s for up to %d rows%s: %s, %.0f MiB beside the weight",
            "drafts" if self._drafts else "answers",
            answers[-1],
            "" if answers == sizes[: len(answers)] else f" ({_listed(answers)} as batches grow)",
            head.extra_repr(),
            head.added_bytes / 2**20,
        )
        return head, frozenset(answers)

    def _rows_a_request(self) -> int:
        """Rows of a step for each request: the draft's proposals, and one more."""
        speculative = self._config.speculative_config
        if speculative is None or self._drafts:
            return 1
        return 1 + int(getattr(speculative, "num_speculative_tokens", 0) or 0)

    def _made(self, weight: torch.Tensor, tune: str) -> FlashHead:
        """The FlashHead with the folder's clusters, or without clusters if it has none."""
        folder, probes = self._folder, named_probes()
        try:
            screen_of(self._screen)
        except FlashtuneError as error:
            raise FlashtuneError(f"FLASHTUNE_SCREEN: {error}") from error
        if folder is not None and folder.has_clusters:
            return flash_head_of(folder, weight, probes, self._screen, tune=tune)
        own = folder.screen if folder is not None else None
        screen = screen_of(self._screen) if self._screen else own
        if screen is None:
            raise FlashtuneError("the model has no clusters, and no screen is set")
        return FlashHead.screened(weight, screen, tune=tune)

    def _give_up(self, why: str) -> None:
        self._given_up, self._head, self._sizes = True, None, {}
        whose = " for the draft" if self._drafts else ""
        LOG.warning("FlashHead is off%s, the dense head is used: %s", whose, why)


@contextmanager
def _usual_defaults() -> Iterator[None]:
    """Undo the default dtype and device that vLLM sets while it loads a model."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)


def _is_open(gate: RequestGate | None) -> bool:
    """Whether no request of the batch needs the dense head."""
    return gate is not None and not gate.dense


def _why_never(processor: Any, lm_head: Any, hidden: torch.Tensor, fills: bool) -> str | None:
    """Why this engine's head can never be FlashHead, judged at the first call, or None.

    fills: whether non-candidate tokens have the fill as their logits.
    """
    if getattr(processor, "head_dtype", None) not in (None, hidden.dtype):
        return f"head_dtype is {processor.head_dtype}, but the hidden states are {hidden.dtype}"
    if fills and _is_changed(processor, lm_head, hidden):
        return (
            "the logits are scaled or soft-capped, which would lift the fill of tokens that are "
            "not candidates"
        )
    return None


def _is_changed(processor: Any, lm_head: Any, hidden: torch.Tensor) -> bool:
    """Whether the processor changes the logits that it is given, found by a trial call."""
    given = hidden.new_full((1, lm_head.weight.shape[0]), FILL)
    given[:, :2] = torch.tensor([3.0, -5.0])  # of either sign, and exact in any dtype
    made = processor.given_logits(given.clone(), lm_head, hidden[:1])
    return not torch.equal(made, given[:, : made.shape[-1]])


def _is_measured(head: FlashHead, size: int) -> bool:
    """Whether the config for so many rows was measured for this problem, on this device."""
    return head.decoder.bound("logits", size).choice.settled


def _verdicts(head: FlashHead, lm_head: Any, sizes: list[int]) -> dict[int, Verdict]:
    """FlashHead against the engine's own head at each number of rows."""
    like = head.like

    def dense(hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = lm_head.quant_method.apply(lm_head, hidden, bias=None)
        return logits

    generator = torch.Generator(like.device).manual_seed(0)
    found = {}
    for size in sizes:
        shape = (size, like.shape[1])
        hidden = torch.randn(shape, generator=generator, device=like.device).to(like.dtype)
        found[size] = contest(head.logits, dense, hidden)
    return found


def _listed(sizes: list[int]) -> str:
    return ", ".join(map(str, sizes))
