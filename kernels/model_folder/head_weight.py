"""Where the weight of a model's head lies: in which safetensors file, under which name.

Usage:
    place = find_head_weight(folder, tied=True)
    place.path, place.name, place.shape
    weight = place.read()           # [vocab, hidden]

Names are those of transformers: the head's own, else the embedding's that it is tied to, also
where the text model is nested in a multimodal one.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from flashtune.kernels.formats.format import plain_formats
from flashtune.kernels.model_folder.tensor_file import dtype_of, open_tensors, shape_of
from flashtune.tuning_db.errors import FlashtuneError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
HEADS = ("lm_head.weight", "language_model.lm_head.weight", "embed_out.weight")
EMBEDDINGS = (
    "model.embed_tokens.weight",
    "model.language_model.embed_tokens.weight",
    "language_model.model.embed_tokens.weight",
    "transformer.wte.weight",
    "wte.weight",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadWeight:
    """A tensor in a file: its name and shape `[vocab, hidden]`."""

    path: Path
    name: str
    shape: tuple[int, int]

    def read(self, device: str = "cpu") -> torch.Tensor:
        """The tensor, in the dtype it is stored in."""
        with open_tensors(self.path, device) as tensors:
            weight: torch.Tensor = tensors.get_tensor(self.name)
        return weight


def find_head_weight(folder: Path, tied: bool) -> HeadWeight:
    """The head's weight in a model folder, of one safetensors file or of several with an index.

    tied: whether the embedding may stand in where the head has no weight of its own. Raises
    FlashtuneError naming the file and what it should hold.
    """
    files = _tensor_files(folder)
    wanted = (*HEADS, *EMBEDDINGS) if tied else HEADS
    name = next((name for name in wanted if name in files), None)
    if name is None:
        why = "" if tied else " (tie_word_embeddings is false)"
        raise FlashtuneError(
            f"{folder}: no tensor of the model is a head's weight{why}: "
            f"looked for {', '.join(wanted)}"
        )
    bias = name.removesuffix("weight") + "bias"
    if bias in files:
        raise FlashtuneError(f"{files[bias]}: the head has a bias, {bias}: FlashHead has none")
    path = files[name]
    with open_tensors(path) as tensors:
        if name not in list(tensors.keys()):
            raise FlashtuneError(f"{path}: lacks {name}, which {INDEX} says it holds")
        shape, dtype = shape_of(tensors, name), dtype_of(tensors, name)
    if len(shape) != 2:
        raise FlashtuneError(f"{path}: {name} has shape {shape}, not [vocab, hidden]")
    known = [each.stored_name for each in plain_formats()]
    if dtype not in known:
        raise FlashtuneError(
            f"{path}: {name} is {dtype}, not one of {', '.join(known)}: "
            "a quantized head cannot be used"
        )
    return HeadWeight(path=path, name=name, shape=(shape[0], shape[1]))


def _tensor_files(folder: Path) -> dict[str, Path]:
    """The file of each tensor of a model."""
    index = folder / INDEX
    if index.exists():
        try:
            weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
            return {str(name): folder / str(file) for name, file in weight_map.items()}
        except OSError as error:
            raise FlashtuneError(f"{index}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FlashtuneError(f"{index}: must be JSON with a weight_map of names") from error
    path = folder / SINGLE
    if not path.exists():
        raise FlashtuneError(
            f"{folder}: has neither {SINGLE} nor {INDEX}: weights are read from safetensors only"
        )
    with open_tensors(path) as tensors:
        return dict.fromkeys(tensors.keys(), path)
