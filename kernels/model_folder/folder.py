"""A FlashHead model folder: its config, its clusters, and the weight of its head.

Usage:
    folder = ModelFolder.open("path/to/model")     # or a repository in Hugging Face's cache
    folder.problem()                               # from headers alone
    folder.read_head(device="cuda")                # the tensors for a FlashHead

This module and those that it reads with (`clustering`, `head_weight`) own the format:
docs/model-folders.md describes it.
"""

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from flashtune.kernels.formats.format import format_of, plain_formats
from flashtune.kernels.formats.screen import Screen, screen_of
from flashtune.kernels.model_folder.clusters import (
    ASSIGNMENTS,
    CENTROIDS,
    Clusters,
    Origin,
    read_clusters,
    read_shapes,
)
from flashtune.kernels.model_folder.head_weight import HeadWeight, find_head_weight, has_weights
from flashtune.kernels.model_folder.inside import inside
from flashtune.kernels.model_folder.own_class import PREFIX
from flashtune.kernels.special_token import checked_special_tokens
from flashtune.kernels.weights import token_order
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.foreign import read_json
from flashtune.tuning_db.one_line import quoted
from flashtune.tuning_db.problem import ROWS, Problem

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
END_KEY = "eos_token_id"
ASSETS_KEY, PROBES_KEY = "flash_head_cache_dir", "n_probes"
SPECIAL_KEY, SCREEN_KEY = "flash_head_special_token_ids", "flash_head_screen"
ROWS_KEY = "flash_head_rows"
CENTROIDS_KEY, MEAN_ROWS = "flash_head_centroids", "mean_rows"
ASSETS_FOLDER = "flash_head_assets"
CLUSTERING_FILE = "clustering_cache.safetensors"
CLUSTERS_A_PROBE = 16  # where the config does not say
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadParts:
    """The tensors for a FlashHead: weight and centroids on one device, of one dtype."""

    weight: torch.Tensor
    clusters: Clusters
    n_probes: int
    special_token_ids: list[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFolder:
    """A folder and its config; `text` is the config with what a nested text_config says."""

    path: Path
    config: dict[str, Any]
    text: dict[str, Any]

    @classmethod
    def open(cls, source: str | Path, revision: str | None = None) -> "ModelFolder":
        """Read a folder's config, with or without clusters.

        source: a folder, else the name of a repository in Hugging Face's cache on this disk;
        nothing is downloaded. Raises FlashtuneError naming the file and what is wrong.
        """
        if not isinstance(source, str | os.PathLike):
            raise FlashtuneError(f"a model must be a folder or a name, not {quoted(source)}")
        path = Path(source)
        if not os.path.isdir(path) and _REPOSITORY.fullmatch(str(source)):
            path = _cached(str(source), revision)
        config = _read_config(path, CONFIG)
        nested = config.get("text_config")
        text = {**config, **nested} if isinstance(nested, dict) else config
        return cls(path=path, config=config, text=text)

    @property
    def clustering_file(self) -> Path:
        """The path of the clusters' file, which may be missing."""
        named = inside(self.path, self.config.get(ASSETS_KEY, ASSETS_FOLDER), CLUSTERING_FILE)
        beside = inside(self.path, CLUSTERING_FILE)
        return beside if os.path.exists(beside) and not os.path.exists(named) else named

    @property
    def architectures(self) -> list[str]:
        """The names of the model's classes, as the config lists them."""
        names = self.config.get("architectures")
        return [str(name) for name in names] if isinstance(names, list) else []

    @property
    def has_clusters(self) -> bool:
        """Whether the config says that this is a FlashHead model."""
        return ASSETS_KEY in self.config or any(
            name.startswith(PREFIX) for name in self.architectures
        )

    @property
    def dtype(self) -> str:
        """The model's dtype, as problems name it; the stored one if the config does not say.

        bf16 where there is no weight either.
        """
        named = self._named_dtype()
        if named is not None:
            return named
        return self.head_weight().dtype if has_weights(self.path) else "bf16"

    def _named_dtype(self) -> str | None:
        name = self.text.get("dtype") or self.text.get("torch_dtype")
        if name is None:
            return None
        known = {each.torch_name: each.name for each in plain_formats()}
        if not isinstance(name, str) or name not in known:
            raise FlashtuneError(
                f"{self.path / CONFIG}: dtype {quoted(name)} must be one of {list(known)}"
            )
        return known[name]

    def special_token_ids(self, vocab_size: int) -> list[int]:
        """Tokens that must always be candidates: as the config lists them, else the end tokens.

        Raises FlashtuneError if the list has ids outside the vocabulary.
        """
        ids = self.config.get(SPECIAL_KEY)
        if ids is None:
            return self._end_tokens(vocab_size)
        with _blaming(self.path / CONFIG):
            if not isinstance(ids, list) or any(type(token) is not int for token in ids):
                raise FlashtuneError(
                    f"{SPECIAL_KEY} must be a list of token ids, not {quoted(ids)}"
                )
            return checked_special_tokens(ids, vocab_size)

    def _end_tokens(self, vocab_size: int) -> list[int]:
        """The tokens that end a text, by the model's config and its generation config."""
        there = os.path.exists(self.path / GENERATION_CONFIG)
        usual = _read_config(self.path, GENERATION_CONFIG) if there else {}
        named = (each.get(END_KEY) for each in (self.config, self.text, usual))
        return end_tokens(named, vocab_size)

    @property
    def screen(self) -> Screen | None:
        """The screen that the config sets for the head, if any."""
        with _blaming(f"{self.path / CONFIG}: {SCREEN_KEY}"):
            return screen_of(self.config.get(SCREEN_KEY))

    def rows(self, screen: Screen | None) -> str | None:
        """Where a head with that screen reads its rows, if the config says.

        A screen has rows of its own.
        """
        named = self.config.get(ROWS_KEY)
        if named not in (None, *ROWS):
            raise FlashtuneError(
                f"{self.path / CONFIG}: {ROWS_KEY} must be one of {', '.join(ROWS)}, not {named!r}"
            )
        return None if screen else named

    def probes(self, n_clusters: int) -> int:
        """The number of clusters to probe, out of so many."""
        named = self.config.get(PROBES_KEY)
        if named is None:
            return max(1, n_clusters // CLUSTERS_A_PROBE)
        if type(named) is not int or named < 1:
            raise FlashtuneError(
                f"{self.path / CONFIG}: {PROBES_KEY} must be a positive whole number, "
                f"not {quoted(named)}"
            )
        return named

    def problem(self) -> Problem:
        """The problem of one token with this model's head; reads no tensor's data.

        A vocabulary that n_clusters does not divide is rounded up to whole clusters.
        """
        path = self._existing_clusters()
        vocab_size, hidden, n_clusters = read_shapes(path)
        said = self.text.get("hidden_size")
        if hidden != said and not has_weights(self.path):
            raise FlashtuneError(
                f"{path}: {CENTROIDS} have {hidden} columns, but {CONFIG} has hidden_size "
                f"{quoted(said)}: the assets are of another model"
            )
        if hidden != said:  # not all models call their head's width so
            self._check_width(hidden, self.head_weight())
        with _blaming(f"{self.path / CONFIG} with {path.name}"):
            return Problem(
                vocab_size=-(-vocab_size // max(1, n_clusters)) * n_clusters,
                hidden_size=hidden,
                n_clusters=n_clusters,
                n_probes=self.probes(n_clusters),
                weight_dtype=self.dtype,
                centroid_dtype=self.dtype,
            )

    def head_weight(self) -> HeadWeight:
        """Where the head's weight is, and its shape and dtype, from headers alone.

        A quantised one is read in the config's dtype, or bf16.
        """
        tied = self.config.get("tie_word_embeddings", self.text.get("tie_word_embeddings"))
        quantised = self.config.get("quantization_config", self.text.get("quantization_config"))
        block = quantised.get("weight_block_size") if isinstance(quantised, dict) else None
        return find_head_weight(
            self.path,
            tied=tied is not False,
            dtype=self._named_dtype(),
            block=tuple(block) if isinstance(block, list) else None,
        )

    def read_clusters(self, device: str = "cpu") -> Clusters:
        """The clusters, with centroids as they are to be scored, in any dtype.

        The method divides each centroid by its length. Folders of our own are scored by mean rows,
        as they are in the file: their config says so, or the metadata of the clustering file.
        """
        clusters = read_clusters(self._existing_clusters(), device)
        kind = self.config.get(CENTROIDS_KEY, None if clusters.origin is None else MEAN_ROWS)
        if kind == MEAN_ROWS:
            return clusters
        if kind is not None:
            raise FlashtuneError(
                f"{self.path / CONFIG}: {CENTROIDS_KEY} must be {MEAN_ROWS} or absent, "
                f"not {kind!r}"
            )
        return replace(clusters, centroids=functional.normalize(clusters.centroids.float(), dim=1))

    def read_head(self, device: str = "cpu") -> HeadParts:
        """All of a FlashHead, read onto `device` and checked to belong together.

        Weight and centroids are given the config's dtype, whatever they are stored in.
        """
        problem, place = self.problem(), self.head_weight()
        self._check_width(problem.hidden_size, place)
        path = self.clustering_file
        clusters = self.read_clusters(device)
        vocab_size = clusters.assignments.numel()
        if vocab_size != place.shape[0]:
            raise FlashtuneError(
                f"{path}: {ASSIGNMENTS} has {vocab_size} tokens, but {place.name} in "
                f"{place.path.name} has {place.shape[0]} rows: cluster this model again"
            )
        with _blaming(path):
            token_order(clusters.assignments, problem.n_clusters)
        special = self.special_token_ids(vocab_size)
        weight = place.read(device)
        if not all(bool(bound.isfinite()) for bound in torch.aminmax(weight)):
            raise FlashtuneError(
                f"{place.path}: {place.name} contains NaN or infinity: download the model again"
            )
        differs = clusters.origin and clusters.origin.why_not(Origin.of(weight))
        if differs:
            raise FlashtuneError(
                f"{path}: made for {differs} (of {place.name} in {place.path.name}): the assets "
                "belong to another model, or this one was changed since: cluster this model"
            )
        dtype = format_of(self.dtype).torch_dtype
        return HeadParts(
            weight=weight.to(dtype),
            clusters=replace(clusters, centroids=clusters.centroids.to(dtype)),
            n_probes=problem.n_probes,
            special_token_ids=special,
        )

    def _check_width(self, hidden: int, place: HeadWeight) -> None:
        if hidden != place.shape[1]:
            raise FlashtuneError(
                f"{self.clustering_file}: {CENTROIDS} have {hidden} columns, but {place.name} in "
                f"{place.path.name} has shape {list(place.shape)}: the assets belong to another "
                "model, so cluster this one"
            )

    def _existing_clusters(self) -> Path:
        path = self.clustering_file
        if not os.path.exists(path):
            raise FlashtuneError(
                f"{path}: no such file: this is not a FlashHead model; make one from it with "
                "`flashtune cluster`"
            )
        return path


def read_model(source: str) -> Problem:
    """The problem that a model folder defines. Raises FlashtuneError."""
    return ModelFolder.open(source).problem()


def end_tokens(named: Iterable[Any], vocab_size: int) -> list[int]:
    """Token ids in ascending order from values of `eos_token_id`: a number, a list, or nothing.

    Ids outside the vocabulary end no text and are left out.
    """
    listed = (value if isinstance(value, list | tuple) else [value] for value in named)
    ids = {token for tokens in listed for token in tokens if type(token) is int}
    return sorted(token for token in ids if 0 <= token < vocab_size)


@contextmanager
def _blaming(where: str | Path) -> Iterator[None]:
    """Add the source to an error's message."""
    try:
        yield
    except FlashtuneError as error:
        raise FlashtuneError(f"{where}: {error}") from error


def _cached(repository: str, revision: str | None) -> Path:
    """A repository's folder in Hugging Face's cache."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise FlashtuneError(
            f"{repository}: no such folder, and Hugging Face's cache was not searched: pip "
            "install 'flashtune[hf]' to search it"
        ) from error
    try:
        return Path(snapshot_download(repository, revision=revision, local_files_only=True))
    except (OSError, ValueError) as error:  # which its own errors are kinds of
        raise FlashtuneError(
            f"{repository}: no such folder, and not in Hugging Face's cache: download it with "
            f"`hf download {repository}`"
        ) from error


def _read_config(folder: Path, name: str) -> dict[str, Any]:
    path = inside(folder, name)
    if not os.path.lexists(path):
        raise FlashtuneError(f"{path}: No such file or directory: give a model folder")
    config = read_json(path)
    if not isinstance(config, dict):
        raise FlashtuneError(f"{path}: must hold a JSON object")
    return config
