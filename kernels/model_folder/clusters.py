"""The clusters of a head as a file: `clustering_cache.safetensors`.

Usage:
    clusters = read_clusters(path)
    clusters.centroids, clusters.assignments, clusters.origin
    write_clusters(path, clusters)

The file holds `centroids`, `[1, 1, hidden, n_clusters]` or `[hidden, n_clusters]`, and
`cluster_assignments` `[vocab]`. Files written by this project name the weight that the clusters
were made from in their metadata, under `flashtune`; files without it are read as well.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from flashtune.kernels.formats.format import dtype_name, format_named, plain_formats
from flashtune.kernels.model_folder.tensor_file import open_tensors, shape_of
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.foreign import parse_json
from flashtune.tuning_db.one_line import quoted

CENTROIDS, ASSIGNMENTS = "centroids", "cluster_assignments"
_METADATA = "flashtune"
_SAMPLED_ROWS = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """A fingerprint of a head's weight.

    digest: SHA-256 of up to 1024 evenly spaced rows as they are stored, so that it means
    something only between weights of the same dtype.
    """

    vocab_size: int
    hidden_size: int
    dtype: str
    digest: str

    @classmethod
    def of(cls, weight: torch.Tensor) -> "Origin":
        """Of a weight `[vocab, hidden]`, in the dtype it is stored in."""
        vocab_size, hidden_size = weight.shape
        rows = torch.linspace(0, vocab_size - 1, min(_SAMPLED_ROWS, vocab_size)).long()
        sample = weight.detach()[rows.to(weight.device)].cpu().contiguous()
        return cls(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            dtype=dtype_name(weight),
            digest=hashlib.sha256(sample.view(torch.uint8).numpy().tobytes()).hexdigest(),
        )

    def why_not(self, other: "Origin") -> str | None:
        """None if `other` can be the same weight, else what differs."""
        for name in ("vocab_size", "hidden_size"):
            if getattr(self, name) != getattr(other, name):
                return f"{name} {getattr(self, name)}, not {getattr(other, name)}"
        if self.dtype == other.dtype and self.digest != other.digest:
            return "a weight of the same shape with other values"
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Clusters:
    """centroids `[n_clusters, hidden]`, assignments `[vocab]`: each token's cluster."""

    centroids: torch.Tensor
    assignments: torch.Tensor
    origin: Origin | None = None


def read_shapes(path: Path) -> tuple[int, int, int]:
    """vocab, hidden and n_clusters of a file, from its header alone."""
    with open_tensors(path) as tensors:
        return _shapes(path, tensors)


def _shapes(path: Path, tensors: Any) -> tuple[int, int, int]:
    """Check the tensors: FlashtuneError if one is missing or has the wrong shape."""
    names = list(tensors.keys())
    for name in (CENTROIDS, ASSIGNMENTS):
        if name not in names:
            raise FlashtuneError(
                f"{path}: must contain the tensors {CENTROIDS} and {ASSIGNMENTS}, but has "
                f"{quoted(names)}"
            )
    centroids, assignments = shape_of(tensors, CENTROIDS), shape_of(tensors, ASSIGNMENTS)
    if len(centroids) < 2 or any(size != 1 for size in centroids[:-2]) or 0 in centroids:
        raise FlashtuneError(
            f"{path}: {CENTROIDS} has shape {centroids}, not [hidden, n_clusters] "
            "or [1, 1, hidden, n_clusters]"
        )
    if len(assignments) != 1 or 0 in assignments:
        raise FlashtuneError(f"{path}: {ASSIGNMENTS} has shape {assignments}, not [vocab]")
    return assignments[0], centroids[-2], centroids[-1]


def read_clusters(path: Path, device: str = "cpu") -> Clusters:
    """Read and check a file. Raises FlashtuneError naming the file, the tensor and what is wrong.

    Whether the clusters have equal sizes is checked later, when rows are put in order.
    """
    with open_tensors(path, device) as tensors:
        _, hidden, n_clusters = _shapes(path, tensors)
        centroids = tensors.get_tensor(CENTROIDS).reshape(hidden, n_clusters).T.contiguous()
        assignments = tensors.get_tensor(ASSIGNMENTS)
        metadata = tensors.metadata() or {}
    if format_named(centroids.dtype) is None:
        known = ", ".join(each.name for each in plain_formats())
        raise FlashtuneError(f"{path}: {CENTROIDS} is {centroids.dtype}, not {known}")
    if assignments.is_floating_point() or assignments.dtype is torch.bool:
        raise FlashtuneError(f"{path}: {ASSIGNMENTS} is {assignments.dtype}, not whole numbers")
    if not bool(centroids.isfinite().all()):
        broken = int((~centroids.isfinite().all(dim=1)).sum())
        raise FlashtuneError(
            f"{path}: {CENTROIDS} contains NaN or infinity in {broken} of {n_clusters} clusters: "
            "download the file again, or make it again"
        )
    assignments = assignments.to(torch.int64)
    least, most = (int(bound) for bound in torch.aminmax(assignments))
    if least < 0 or most >= n_clusters:
        raise FlashtuneError(
            f"{path}: {ASSIGNMENTS} has clusters from {least} to {most}, but {CENTROIDS} has "
            f"clusters 0 to {n_clusters - 1}"
        )
    return Clusters(
        centroids=centroids, assignments=assignments, origin=_origin(path, metadata.get(_METADATA))
    )


def _origin(path: Path, text: str | None) -> Origin | None:
    if text is None:
        return None
    try:
        data = parse_json(text, exact=True)
        kinds = {field.name: field.type for field in fields(Origin)}
        if not isinstance(data, dict) or set(data) != set(kinds):
            raise FlashtuneError(f"its keys must be exactly {', '.join(kinds)}")
        for name, value in data.items():
            if type(value) is not kinds[name]:
                raise FlashtuneError(f"{name} is {quoted(value)}")
    except FlashtuneError as error:
        raise FlashtuneError(
            f"{path}: its metadata {_METADATA!r} cannot be read ({error}): make the file again"
        ) from error
    return Origin(**data)


def write_clusters(path: Path, clusters: Clusters) -> None:
    """Write a file as `read_clusters` reads it."""
    metadata = {}  # of one key at most: several would be written in any order
    if clusters.origin is not None:
        metadata[_METADATA] = json.dumps(asdict(clusters.origin), sort_keys=True)
    tensors = {
        CENTROIDS: clusters.centroids.T[None, None].contiguous().cpu(),
        ASSIGNMENTS: clusters.assignments.to(torch.int64).contiguous().cpu(),
    }
    path.write_bytes(save(tensors, metadata))
