"""Where the weight of a model's head is: in which safetensors file, under which name.

Usage:
    place = find_head_weight(folder, tied=True)
    place.path, place.name, place.shape, place.dtype    # bf16, whatever it is stored in
    weight = place.read()           # [vocab, hidden]

The model's own class says what the weight is called and whether it is tied to the embedding
(`own_class`). If the class is not available, usual names are tried: the head's own, else the
embedding's, also for a text model nested in a multimodal one.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from flashtune.kernels.formats.format import format_of, plain_formats
from flashtune.kernels.model_folder.inside import inside
from flashtune.kernels.model_folder.own_class import OwnHead, ask_model
from flashtune.kernels.model_folder.quantised_weight import (
    CURE,
    PACKED,
    QUANTISED,
    Scales,
    find_scales,
)
from flashtune.kernels.model_folder.tensor_file import dtype_of, open_tensors, shape_of
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.foreign import read_json

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
    """A tensor in a file: its name, its shape `[vocab, hidden]`, and the dtype that it is read in.

    scales: what its numbers are multiplied with, in a file of its own, where it is quantised.
    """

    path: Path
    name: str
    shape: tuple[int, int]
    dtype: str
    scales: Scales | None = None
    scales_path: Path | None = None

    def read(self, device: str = "cpu") -> torch.Tensor:
        """The tensor in its dtype: the one it is stored in, unless it is quantised."""
        with open_tensors(self.path, device) as tensors:
            weight: torch.Tensor = tensors.get_tensor(self.name)
        if self.scales is None or self.scales_path is None:
            return weight
        with open_tensors(self.scales_path, device) as tensors:
            scales = tensors.get_tensor(self.scales.name)
        return self.scales.times(weight, scales, format_of(self.dtype).torch_dtype)


def find_head_weight(
    folder: Path,
    tied: bool,
    dtype: str | None = None,
    block: tuple[Any, ...] | None = None,
) -> HeadWeight:
    """The head's weight in a model folder, of one safetensors file or of several with an index.

    tied: whether the embedding may stand in where the head has no weight of its own, unless the
    model's class says so itself. dtype: what a quantised weight is read in, bf16 unless given.
    block: rows and columns of such a weight that share a scale, where the config says. Raises
    FlashtuneError naming the file and what it should hold.
    """
    files = tensor_files(folder)
    own = ask_model(folder)
    if own is not None:
        tied = own.tied
    _check_packed(files, own)
    wanted = (*HEADS, *EMBEDDINGS) if tied else HEADS
    name = own.find(list(files)) if own else None
    if name is None:
        name = next((name for name in wanted if name in files), None)
    if name is None:
        why = "" if tied else " (tie_word_embeddings is false)"
        looked = dict.fromkeys([*(own.names if own else ()), *wanted])
        raise FlashtuneError(
            f"{folder}: no tensor of the model is the weight of an output head{why}: looked for "
            f"{', '.join(looked)}"
        )
    _check_bias(name, files, own)
    path = files[name]
    with open_tensors(path) as tensors:
        if name not in list(tensors.keys()):
            raise FlashtuneError(f"{path}: lacks {name}, which {INDEX} says it holds")
        shape, stored = shape_of(tensors, name), dtype_of(tensors, name)
    if len(shape) != 2:
        raise FlashtuneError(f"{path}: {name} has shape {shape}, not [vocab, hidden]")
    known = {each.stored_name: each.name for each in plain_formats()}
    place = HeadWeight(path=path, name=name, shape=(shape[0], shape[1]), dtype=dtype or "bf16")
    if stored in known:
        return replace(place, dtype=known[stored])
    if stored not in QUANTISED:
        kinds = ", ".join((*known, *QUANTISED))
        raise FlashtuneError(f"{path}: {name} is {stored}, not one of {kinds}: {CURE}")
    return _quantised(place, stored, files, block)


def _quantised(
    place: HeadWeight, stored: str, files: dict[str, Path], block: tuple[Any, ...] | None
) -> HeadWeight:
    """The weight with its scales, which may lie in another file; FlashtuneError without them."""
    stem = place.name.removesuffix("weight")
    shapes = {}
    for name in [each for each in files if each.startswith(stem)]:
        with open_tensors(files[name]) as tensors:
            shapes[name] = shape_of(tensors, name)
    try:
        scales = find_scales(shapes, place.name, QUANTISED[stored], block)
    except FlashtuneError as error:
        raise FlashtuneError(f"{place.path}: {error}") from error
    path = files[scales.name]
    with open_tensors(path) as tensors:
        dtype = dtype_of(tensors, scales.name)
    known = [each.stored_name for each in plain_formats()]
    if dtype not in known:
        raise FlashtuneError(f"{path}: {scales.name} is {dtype}, not one of {', '.join(known)}")
    return replace(place, scales=scales, scales_path=path)


def _check_packed(files: dict[str, Path], own: OwnHead | None) -> None:
    """Refuse a head whose numbers are packed: none of its tensors is a matrix of them."""
    for head in (*(own.names[:1] if own else ()), *HEADS):
        stem = head.removesuffix("weight")
        packed = next((stem + name for name in PACKED if stem + name in files), None)
        if packed is not None:
            raise FlashtuneError(
                f"{files[packed]}: the head is quantised, with its numbers packed in {packed}: "
                f"{CURE}"
            )


def _check_bias(name: str, files: dict[str, Path], own: OwnHead | None) -> None:
    """Refuse a head with a bias, which may be stored though its weight is the embedding's."""
    for head in (name, *HEADS):
        bias = head.removesuffix("weight") + "bias"
        if bias in files:
            raise FlashtuneError(
                f"{files[bias]}: the head has a bias, {bias}, which FlashHead does not support"
            )
    if own is not None and own.has_bias:
        raise FlashtuneError(
            f"{files[name]}: the model's head has a bias, which FlashHead does not support"
        )


def has_weights(folder: Path) -> bool:
    """Whether a model folder holds weights, and not its config and clusters alone."""
    return any(os.path.exists(folder / name) for name in (SINGLE, INDEX))


def tensor_files(folder: Path) -> dict[str, Path]:
    """The file of each tensor of a model, of those that transformers would load.

    Raises FlashtuneError if there are none, or one is not in the folder.
    """
    path, index = inside(folder, SINGLE), inside(folder, INDEX)
    if os.path.exists(path):
        with open_tensors(path) as tensors:
            return dict.fromkeys(tensors.keys(), path)
    if not os.path.exists(index):
        raise FlashtuneError(
            f"{folder}: has neither {SINGLE} nor {INDEX}: weights are only read from safetensors "
            "files"
        )
    data = read_json(index)
    weight_map = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(weight_map, dict):
        raise FlashtuneError(f"{index}: must be JSON with a weight_map from tensors to files")
    paths: dict[str, Path] = {}
    for file in weight_map.values():
        if not isinstance(file, str) or file not in paths:
            paths[file] = inside(folder, file)
    return {name: paths[file] for name, file in weight_map.items()}
