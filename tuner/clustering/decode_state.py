"""Hidden states of real decode steps, from a model and a few prompts.

Usage:
    model = RunningModel.load(folder, device="cpu")
    states = model.states(prompts, n_tokens=32)     # [states, hidden]
    model.logits(states @ weight.T)                 # as the model returns them

The model is run by Hugging Face's transformers, an extra of this package: `flashtune[hf]`.
"""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from flashtune.kernels.integrations.model_logits import ModelLogits
from flashtune.kernels.model_folder.folder import ModelFolder
from flashtune.tuner.progress import StepProgress
from flashtune.tuning_db.errors import FlashtuneError

_BATCH = 16  # prompts at a time


def read_prompts(path: Path | None) -> list[str]:
    """The prompts of a file, one a line, blank lines left out; those shipped unless given."""
    try:
        source = path or files("flashtune.tuner.clustering").joinpath("prompts.txt")
        lines = source.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FlashtuneError(f"{path}: cannot be read as text: {error}") from error
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise FlashtuneError(f"{path}: holds no prompts: give one a line")
    return prompts


def require_transformers() -> Any:
    """The package, or FlashtuneError saying how to get it."""
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
    """`RunningModel.states` of a folder's model."""
    return RunningModel.load(folder, device).states(prompts, n_tokens)


class RunningModel:
    """A model and its tokenizer, to continue text and to say what becomes of its logits."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        """model: of transformers, with an output head. Its generation config is replaced."""
        self._model, self._tokenizer = model, tokenizer
        self._logits = ModelLogits(model, model.get_output_embeddings())
        self.interrupted = False
        usual = model.generation_config
        ends = usual.eos_token_id
        self._ends = torch.tensor([] if ends is None else ends, device=model.device).reshape(-1)
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
        """Raises FlashtuneError where transformers is not installed or cannot load the model."""
        transformers = require_transformers()
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder.path, padding_side="left"
            )
            if tokenizer.pad_token is None:
                first = tokenizer.convert_ids_to_tokens(0)
                tokenizer.pad_token = tokenizer.eos_token or first
            try:
                auto = transformers.AutoModelForCausalLM
                model = auto.from_pretrained(folder.path, dtype="auto")
            except ValueError:  # a config that is no text model's
                auto = transformers.AutoModelForImageTextToText
                model = auto.from_pretrained(folder.path, dtype="auto")
            return cls(model.to(device).eval(), tokenizer)
        except Exception as error:  # whatever a model's own code raises
            raise FlashtuneError(
                f"{folder.path}: transformers cannot load it: {_first_line(error)}"
            ) from error

    def states(
        self, prompts: Sequence[str], n_tokens: int, keep_interrupted: bool = False
    ) -> torch.Tensor:
        """What the head is given at each decode step: float32 `[states, hidden]`.

        Each prompt is continued greedily, by the dense head, for up to n_tokens tokens; what comes
        after a model's end token does not count. Raises FlashtuneError where the model can't.
        keep_interrupted: after Ctrl-C, give what there is, and say `interrupted`.
        """
        states: list[torch.Tensor] = []
        with StepProgress("decoding prompts", len(prompts)) as progress:
            for start in range(0, len(prompts), _BATCH):
                try:
                    states += self._continue(prompts[start : start + _BATCH], n_tokens)
                except KeyboardInterrupt:
                    if not (keep_interrupted and states):
                        raise
                    self.interrupted = True
                    break
                except Exception as error:  # whatever a model's own code raises
                    longest = max(prompts[start : start + _BATCH], key=len)
                    raise FlashtuneError(
                        f"the model cannot continue the prompts from {start + 1} on, the longest "
                        f"of {len(longest)} characters: {_first_line(error)}"
                    ) from error
                progress.show(min(start + _BATCH, len(prompts)))
        return torch.cat(states).float()

    def logits(self, raw: torch.Tensor) -> torch.Tensor:
        """What the model returns for its head's logits `[rows, vocab]`: scaled, capped, …"""
        try:
            return self._logits(raw)
        except Exception as error:  # whatever a model's own code raises
            raise FlashtuneError(f"the model gives no logits: {_first_line(error)}") from error

    def _continue(self, prompts: Sequence[str], n_tokens: int) -> list[torch.Tensor]:
        """The states of each prompt's steps, `[steps, hidden]`, up to its end token."""
        model, seen = self._model, []
        hook = model.get_output_embeddings().register_forward_pre_hook(
            lambda _, arguments: seen.append(arguments[0][:, -1].detach().clone())
        )
        inputs = self._tokenizer(
            list(prompts), return_tensors="pt", padding=True, return_attention_mask=True
        )
        ids, mask = (inputs[name].to(model.device) for name in ("input_ids", "attention_mask"))
        try:
            with torch.inference_mode():
                out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=n_tokens)
        finally:
            hook.remove()
        tokens = out[:, ids.shape[1] :]
        ended = torch.isin(tokens, self._ends).cumsum(dim=1) > 0
        steps = (~ended).sum(dim=1) + ended.any(dim=1)
        found = torch.stack(seen, dim=1)
        return [found[row, :own] for row, own in enumerate(steps.tolist())]


def _first_line(error: Exception) -> str:
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
