"""The problem that a FlashHead model folder poses: its config and its clustering file's shapes.

Usage:
    read_model("path/to/model")      # a Problem
"""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import Problem

ASSETS_FOLDER = "flash_head_assets"
CLUSTERING_FILE = "clustering_cache.safetensors"
TOKENS_A_CLUSTER = 16  # clusters a probe, where the config does not say
_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def read_model(folder: str | Path) -> Problem:
    """The problem of one token with this model's head.

    Reads `config.json` (hidden_size, dtype, n_probes, flash_head_cache_dir; a text_config inside
    it counts too) and the shapes of `centroids` `[…, hidden, n_clusters]` and
    `cluster_assignments` `[vocab]`. Raises FlashtuneError naming the file and what is wrong.
    """
    folder = Path(folder)
    config = _read_config(folder / "config.json")
    text_config = config.get("text_config")
    text = {**config, **text_config} if isinstance(text_config, dict) else config
    assets = folder / str(config.get("flash_head_cache_dir", ASSETS_FOLDER)) / CLUSTERING_FILE
    if not assets.exists():
        assets = folder / CLUSTERING_FILE
    shapes = _read_shapes(assets)
    hidden, n_clusters = shapes["centroids"][-2:]
    if hidden != text.get("hidden_size"):
        raise FlashtuneError(
            f"{assets}: centroids are {hidden} wide, but config.json says hidden_size "
            f"{text.get('hidden_size')}: the assets are of another model"
        )
    dtype = str(text.get("dtype", text.get("torch_dtype", "bfloat16")))
    if dtype not in _DTYPES:
        raise FlashtuneError(f"{folder / 'config.json'}: dtype {dtype} is none of {list(_DTYPES)}")
    try:
        return Problem(
            vocab_size=shapes["cluster_assignments"][-1],
            hidden_size=hidden,
            n_clusters=n_clusters,
            n_probes=config.get("n_probes", max(1, n_clusters // TOKENS_A_CLUSTER)),
            weight_dtype=_DTYPES[dtype],
            centroid_dtype=_DTYPES[dtype],
        )
    except FlashtuneError as error:
        raise FlashtuneError(f"{folder / 'config.json'} with {assets.name}: {error}") from error


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise FlashtuneError(f"{path}: {error.strerror}: give a model folder") from error
    except ValueError as error:
        raise FlashtuneError(f"{path}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise FlashtuneError(f"{path}: must hold a JSON object")
    return config


def _read_shapes(path: Path) -> dict[str, list[int]]:
    """The shapes of the two tensors that say how the head is clustered."""
    names, least = ("centroids", "cluster_assignments"), (2, 1)
    try:
        with safe_open(path, framework="pt") as tensors:
            shapes = {name: list(tensors.get_slice(name).get_shape()) for name in names}
    except FileNotFoundError as error:
        raise FlashtuneError(f"{path}: no such file: this is not a FlashHead model") from error
    except (SafetensorError, OSError) as error:
        raise FlashtuneError(f"{path}: {error}: need the tensors {', '.join(names)}") from error
    for name, dimensions in zip(names, least, strict=True):
        if len(shapes[name]) < dimensions:
            raise FlashtuneError(f"{path}: {name} has shape {shapes[name]}")
    return shapes
