"""Hidden states of real decode steps, from a model and a few prompts.

Usage:
    states = decode_states(folder, prompts, n_tokens=32, device="cpu")     # [states, hidden]

The model is run by Hugging Face's transformers, an extra of this package: `flashtune[hf]`.
"""

from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

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


class PartlyDecoded(KeyboardInterrupt):
    """Ctrl-C after some prompts: `states` are those of the prompts that were done."""

    def __init__(self, states: torch.Tensor) -> None:
        """Float32 `[states, hidden]`."""
        super().__init__()
        self.states = states


def decode_states(
    folder: ModelFolder, prompts: Sequence[str], n_tokens: int, device: str
) -> torch.Tensor:
    """What the head is given at each decode step: float32 `[states, hidden]`, on `device`.

    Each prompt is continued greedily, by the dense head, for up to n_tokens tokens; what comes
    after a model's end token does not count. Raises FlashtuneError where transformers is not
    installed or cannot load the model, PartlyDecoded on Ctrl-C.
    """
    model, tokenizer = _load(folder, device)
    states: list[torch.Tensor] = []
    with StepProgress("decoding prompts", len(prompts)) as progress:
        try:
            for start in range(0, len(prompts), _BATCH):
                some = prompts[start : start + _BATCH]
                states.extend(_continue(model, tokenizer, some, n_tokens))
                progress.show(min(start + _BATCH, len(prompts)))
        except KeyboardInterrupt:
            if not states:
                raise
            raise PartlyDecoded(torch.cat(states).float()) from None
    return torch.cat(states).float()


def _load(folder: ModelFolder, device: str) -> tuple[Any, Any]:
    """The model and its tokenizer, ready to generate in batches."""
    transformers = require_transformers()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder.path, padding_side="left")
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(folder.path, dtype="auto")
        except ValueError:  # a config that is no text model's
            model = transformers.AutoModelForImageTextToText.from_pretrained(
                folder.path, dtype="auto"
            )
    except Exception as error:  # whatever a model's own code raises
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise FlashtuneError(f"{folder.path}: transformers cannot load it: {first}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return model.to(device).eval(), tokenizer


def _continue(
    model: Any, tokenizer: Any, prompts: Sequence[str], n_tokens: int
) -> Iterator[torch.Tensor]:
    """The states of each prompt's steps, `[steps, hidden]`, up to its end token."""
    seen: list[torch.Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda _, arguments: seen.append(arguments[0][:, -1].detach().clone())
    )
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True).to(model.device)
    try:
        with torch.inference_mode():
            tokens = model.generate(
                **inputs,
                max_new_tokens=n_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )[:, inputs["input_ids"].shape[1] :]
    finally:
        hook.remove()
    ends = model.generation_config.eos_token_id
    ending = torch.tensor([] if ends is None else ends, device=tokens.device).reshape(-1)
    ended = torch.isin(tokens, ending).cumsum(dim=1) > 0
    steps = (~ended).sum(dim=1) + ended.any(dim=1)
    for row, own in enumerate(steps.tolist()):
        yield torch.stack(seen, dim=1)[row, :own]
