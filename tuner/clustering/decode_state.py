"""Hidden states of real decode steps, from a model and a few prompts.

Usage:
    model = RunningModel.load(folder, device="cpu")
    answers = model.answers(prompts, n_tokens=32)
    answers.states                                  # [states, hidden], one answer after the other
    model.logits(states @ weight.T)                 # as the model returns them

The model is run by Hugging Face's transformers, an extra of this package: `flashtune[hf]`.
"""

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from flashtune.kernels.integrations.model_logits import ModelLogits
from flashtune.kernels.model_folder.folder import CONFIG, ModelFolder
from flashtune.kernels.model_folder.head_weight import tensor_files
from flashtune.kernels.model_folder.inside import all_inside
from flashtune.tuner.progress import StepProgress
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.foreign import read_text
from flashtune.tuning_db.one_line import quoted

_PROMPTS = files("flashtune.tuner.clustering") / "prompts.txt"
_BATCH = 8  # prompts at a time
_FIRST = 2  # prompts that show the pace if time is limited
# Otherwise transformers asks on standard input whether to run code that comes with a model.
_OWN_CODE = {"trust_remote_code": False, "local_files_only": True}
_WEIGHTS = {"dtype": "auto", "use_safetensors": True, **_OWN_CODE}
_ADAPTER = "adapter_config.json"
_ATTENTION = ("attn_implementation", "_attn_implementation")
_INPUTS = ("input_ids", "attention_mask")


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """The head's inputs at each step of some answers, one answer after the other.

    states: float32 `[states, hidden]`; lengths: how many of them each answer has.
    """

    states: torch.Tensor
    lengths: tuple[int, ...]


class _OutOfTime(Exception):
    """Time ran out within an answer."""


def read_prompts(path: Path | None) -> list[str]:
    """The prompts of a file, one per line, without blank lines; default: the shipped prompts."""
    lines = read_text(path or Path(str(_PROMPTS))).splitlines()
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise FlashtuneError(f"{path}: contains no prompts: write one per line")
    return prompts


def require_transformers() -> Any:
    """The package; raises FlashtuneError saying how to install it."""
    try:
        import transformers
    except ImportError as error:
        raise FlashtuneError(
            "running a model needs transformers: pip install 'flashtune[hf]'"
        ) from error
    return transformers


def decode_states(
    folder: ModelFolder, prompts: Sequence[str], n_tokens: int, device: str
) -> torch.Tensor:
    """The states of `RunningModel.answers` of a folder's model: float32 `[states, hidden]`."""
    return RunningModel.load(folder, device).answers(prompts, n_tokens).states


class RunningModel:
    """A model and its tokenizer, to continue text and to post-process logits as the model does."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        """model: a transformers model with an output head. Its generation config is replaced."""
        self.model, self._tokenizer = model, tokenizer
        self._logits = ModelLogits(model, model.get_output_embeddings())
        self.interrupted = False
        usual = model.generation_config
        ends = usual.eos_token_id
        self.ends = torch.tensor([] if ends is None else ends, device=model.device).reshape(-1)
        # Not the model's own settings, which may ask for beams or several answers.
        model.generation_config = type(usual)(
            do_sample=False,
            num_beams=1,
            num_return_sequences=1,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=usual.bos_token_id,
            eos_token_id=ends,
        )

    @classmethod
    def load(cls, folder: ModelFolder, device: str) -> "RunningModel":
        """Raises FlashtuneError if transformers is not installed or cannot load the model.

        Also if loading would read files outside the folder, or run code that is not transformers'
        own.
        """
        transformers = require_transformers()
        _check_own(folder)
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder.path, padding_side="left", **_OWN_CODE
            )
            if tokenizer.pad_token is None:
                first = tokenizer.convert_ids_to_tokens(0)
                tokenizer.pad_token = tokenizer.eos_token or first
            try:
                auto = transformers.AutoModelForCausalLM
                model = auto.from_pretrained(folder.path, **_WEIGHTS)
            except ValueError:  # not a text model's config
                auto = transformers.AutoModelForImageTextToText
                model = auto.from_pretrained(folder.path, **_WEIGHTS)
            return cls(model.to(device).eval(), tokenizer)
        except Exception as error:  # whatever a model's own code raises
            raise model_error(f"{folder.path}: transformers cannot load it", error) from error

    def answers(
        self,
        prompts: Sequence[str],
        n_tokens: int,
        *,
        keep_interrupted: bool = False,
        seconds: float = math.inf,
    ) -> Answers:
        """The head's inputs while the model answers prompts.

        Each prompt is continued greedily, by the dense head, for up to n_tokens tokens; anything
        after a model's end token does not count. keep_interrupted: after Ctrl-C, return what there
        is, with `interrupted` set. seconds: a time limit, after which only the complete answers
        are returned. Raises FlashtuneError if the model fails, or no answer was complete in time.
        """
        states: list[torch.Tensor] = []
        begun, start = time.monotonic(), 0
        size = _BATCH if seconds == math.inf else _FIRST
        with StepProgress("decoding tokens", len(prompts) * n_tokens) as progress:
            while start < len(prompts) and size:
                part = prompts[start : start + size]
                show = partial(_show_steps, progress, start * n_tokens, len(part))
                try:
                    states += self._continue(part, n_tokens, begun + seconds, show)
                except KeyboardInterrupt:
                    if not (keep_interrupted and states):
                        raise
                    self.interrupted = True
                    break
                except _OutOfTime:
                    break
                except Exception as error:  # whatever a model's own code raises
                    longest = max(part, key=len)
                    what = (
                        "the model cannot continue the batch of prompts that begins with number "
                        f"{start + 1} (the longest has {len(longest)} characters)"
                    )
                    raise model_error(what, error) from error
                start += len(part)
                progress.show(start * n_tokens)
                taken = time.monotonic() - begun
                if taken:  # as many as time allows at the pace so far
                    size = int(min(_BATCH, (seconds - taken) * start / taken))
        if not states:
            raise FlashtuneError(
                f"{len(prompts[:_FIRST])} answers of {n_tokens} tokens take more than "
                f"{seconds:.0f} s here"
            )
        return Answers(states=torch.cat(states).float(), lengths=tuple(map(len, states)))

    def logits(self, raw: torch.Tensor) -> torch.Tensor:
        """What the model makes of its head's logits `[rows, vocab]`: scaled, capped, …"""
        try:
            return self._logits(raw)
        except Exception as error:  # whatever a model's own code raises
            raise model_error("the model gives no logits", error) from error

    def tokenized(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """`input_ids` and `attention_mask` `[prompts, tokens]`, padded on the left."""
        inputs = self._tokenizer(
            list(prompts), return_tensors="pt", padding=True, return_attention_mask=True
        )
        return {name: inputs[name].to(self.model.device) for name in _INPUTS}

    def counted(self, tokens: torch.Tensor) -> list[int]:
        """How many tokens of each answer `[answers, tokens]` count: those up to its end token."""
        ended = torch.isin(tokens, self.ends).cumsum(dim=1) > 0
        counts: list[int] = ((~ended).sum(dim=1) + ended.any(dim=1)).tolist()
        return counts

    def _continue(
        self,
        prompts: Sequence[str],
        n_tokens: int,
        until: float,
        on_step: Callable[[int], None],
    ) -> list[torch.Tensor]:
        """The states of each prompt's steps, `[steps, hidden]`, up to its end token.

        on_step: is called before each step with the number of steps done.
        """
        seen: list[torch.Tensor] = []

        def note(_: Any, arguments: Any) -> None:
            if time.monotonic() > until:
                raise _OutOfTime
            on_step(len(seen))
            seen.append(arguments[0][:, -1].detach().clone())

        inputs = self.tokenized(prompts)
        hook = self.model.get_output_embeddings().register_forward_pre_hook(note)
        try:
            with torch.inference_mode():
                out = self.model.generate(**inputs, max_new_tokens=n_tokens)
        finally:
            hook.remove()
        counts = self.counted(out[:, inputs["input_ids"].shape[1] :])
        found = torch.stack(seen, dim=1)
        return [found[row, :own] for row, own in enumerate(counts)]


def _show_steps(progress: StepProgress, before: int, each: int, steps: int) -> None:
    """Show the tokens decoded so far: those before this batch, and `each` for every step of it."""
    progress.show(before + steps * each)


def _check_own(folder: ModelFolder) -> None:
    """Raise FlashtuneError if a model refers to files outside its folder, or to foreign code."""
    all_inside(folder.path)
    tensor_files(folder.path)
    if os.path.lexists(folder.path / _ADAPTER):
        raise FlashtuneError(
            f"{folder.path / _ADAPTER}: this is an adapter, not a model: merge it into its model "
            "(merge_and_unload) and give that"
        )
    for config in (folder.config, folder.text):
        named = [config.get(name) for name in _ATTENTION]
        elsewhere = next((each for each in named if "/" in str(each)), None)
        if elsewhere is not None:
            raise FlashtuneError(
                f"{folder.path / CONFIG}: asks for the kernels {quoted(elsewhere)}, third-party "
                "code that is not run: name an attention implementation of transformers instead"
            )


def model_error(what: str, error: Exception) -> FlashtuneError:
    """An error that says what failed, with the first line of the model code's exception."""
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    name = type(error).__name__
    return FlashtuneError(f"{what}: {name}: {said}" if said else f"{what}: {name}")
