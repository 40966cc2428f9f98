"""From a causal model's folder to a FlashHead model's folder: cluster, choose probes, write.

Usage:
    result = cluster_model(ClusterRequest(model="model", out=Path("model-flash")))

The source is not changed, and the new folder gets its name only once it is complete. Ctrl-C leaves
a checkpoint beside it, from which the same request continues.
"""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save

from flashtune.kernels.formats.screen import Screen
from flashtune.kernels.model_folder.clusters import ASSIGNMENTS, write_clusters
from flashtune.kernels.model_folder.folder import (
    ASSETS_FOLDER,
    ASSETS_KEY,
    CENTROIDS_KEY,
    CLUSTERING_FILE,
    CLUSTERS_A_PROBE,
    CONFIG,
    MEAN_ROWS,
    PROBES_KEY,
    SCREEN_KEY,
    ModelFolder,
)
from flashtune.kernels.model_folder.inside import inside
from flashtune.kernels.model_folder.own_class import PREFIX
from flashtune.kernels.model_folder.tensor_file import open_tensors
from flashtune.tuner.clustering.kmeans import ITERATIONS, BalancedKMeans
from flashtune.tuner.progress import StepProgress
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.foreign import count, members, parse_json

CLUSTER_SIZE = 16  # tokens, unless a number of clusters is given
_METADATA = "flashtune"
_LEFT_OUT = (".git", ".cache", CLUSTERING_FILE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """The number of probes, the head's screen (None if it is read as it is), and the reason."""

    n_probes: int
    screen: Screen | None = None
    why: str = ""


Choose = Callable[[ModelFolder], Chosen]


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterRequest:
    """A request to make a FlashHead model's folder.

    n_clusters: default: a sixteenth of the vocabulary; n_probes: default: a sixteenth of that.
    screen: default: the head is read as it is. link: make hard links to the weight files instead
    of copies.
    """

    model: str
    out: Path
    n_clusters: int | None = None
    n_probes: int | None = None
    screen: Screen | None = None
    device: str = "cpu"
    seed: int = 0
    iterations: int = ITERATIONS
    link: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterResult:
    """The result; fit is the share of the rows' length along their centroids' directions.

    why: how probes and screen were chosen; empty if they were given.
    """

    out: Path
    vocab_size: int
    hidden_size: int
    n_clusters: int
    n_probes: int
    screen: str | None
    iterations: int
    fit: float
    why: str


def cluster_model(request: ClusterRequest, choose: Choose | None = None) -> ClusterResult:
    """Cluster a model's head and write the folder. Raises FlashtuneError.

    choose: called once the clusters exist, to choose the number of probes and the screen.
    """
    source = ModelFolder.open(request.model)
    place = source.head_weight()
    _check_output(request, source)
    n_clusters = request.n_clusters or -(-place.shape[0] // CLUSTER_SIZE)
    n_probes = request.n_probes or max(1, n_clusters // CLUSTERS_A_PROBE)
    if n_probes > n_clusters:
        raise FlashtuneError(
            f"{n_probes} probes are more than the {n_clusters} clusters: give at most {n_clusters}"
        )
    kmeans = BalancedKMeans(place.read(request.device), n_clusters, request.seed)
    try:
        checkpoint = _cluster(kmeans, request)
        usual = Chosen(n_probes=n_probes, screen=request.screen)
        chosen = _write(kmeans, source, request, usual, choose)
        checkpoint.path.unlink(missing_ok=True)
    except (OSError, shutil.Error) as error:
        hint = ": leave --link off" if request.link else ""
        raise FlashtuneError(f"{request.out}: cannot be written: {error}{hint}") from error
    return ClusterResult(
        out=request.out,
        vocab_size=place.shape[0],
        hidden_size=place.shape[1],
        n_clusters=n_clusters,
        n_probes=chosen.n_probes,
        screen=None if chosen.screen is None else str(chosen.screen),
        iterations=kmeans.iteration,
        fit=kmeans.fit(),
        why=chosen.why,
    )


def _cluster(kmeans: BalancedKMeans, request: ClusterRequest) -> "Checkpoint":
    """Iterate, starting from the checkpoint."""
    checkpoint = Checkpoint(request.out, kmeans)
    checkpoint.load()
    title = f"{kmeans.origin.vocab_size}x{kmeans.origin.hidden_size} c{kmeans.n_clusters}"
    with StepProgress(title, request.iterations) as progress:
        while kmeans.iteration < request.iterations:
            fit = kmeans.step()
            checkpoint.save()
            progress.show(kmeans.iteration, f"fit {fit:.4f}")
    return checkpoint


def _write(
    kmeans: BalancedKMeans,
    source: ModelFolder,
    request: ClusterRequest,
    chosen: Chosen,
    choose: Choose | None,
) -> Chosen:
    """Write the folder under a temporary name, and rename it once it is complete."""
    scratch = Path(tempfile.mkdtemp(dir=request.out.parent, prefix=_partial(request.out)))
    partial = scratch / request.out.name
    try:
        _copy_model(source, partial, request.link)
        _write_config(source, partial, chosen)
        (partial / ASSETS_FOLDER).mkdir()
        write_clusters(partial / ASSETS_FOLDER / CLUSTERING_FILE, kmeans.clusters())
        if choose is not None:
            chosen = choose(ModelFolder.open(partial))
            _write_config(source, partial, chosen)
        try:
            partial.rename(request.out)
        except OSError as error:
            if request.out.exists():
                raise FlashtuneError(
                    f"{request.out}: was created by another process in the meantime: give "
                    "another --out"
                ) from error
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return chosen


def _partial(out: Path) -> str:
    """The prefix of the names of incomplete folders."""
    return f"{out.name}.partial"


def _check_output(request: ClusterRequest, source: ModelFolder) -> None:
    """Check that nothing would be overwritten and that the copy fits on the disk."""
    out = request.out
    if not out.parent.is_dir():
        raise FlashtuneError(f"{out.parent}: no such folder: create it first")
    if out.exists():
        raise FlashtuneError(f"{out}: already exists: remove it, or give another --out")
    for path in out.parent.iterdir():
        if path.name.startswith(_partial(out)):
            raise FlashtuneError(
                f"{path}: already exists, so another clustering is running or was killed: wait "
                "for it, remove that folder, or give another --out"
            )
    if not request.link:
        needed = sum(path.stat().st_size for path in source.path.rglob("*") if path.is_file())
        free = shutil.disk_usage(out.parent).free
        if needed > free:
            raise FlashtuneError(
                f"{out}: a copy of the model needs {needed / 1e9:.1f} GB, but only "
                f"{free / 1e9:.1f} GB are free: free some space, or give --link"
            )


def _copy_model(source: ModelFolder, target: Path, link: bool) -> None:
    """Copy the files of a model without its clusters, following links to its own files."""

    def copy(path: str, to: str) -> None:
        if link and path.endswith(".safetensors"):
            os.link(os.path.realpath(path), to)
        else:
            shutil.copyfile(path, to)

    def left_out(folder: str, names: list[str]) -> set[str]:
        old = {str(source.config.get(ASSETS_KEY, ASSETS_FOLDER)), *_LEFT_OUT}
        without = old & set(names) if Path(folder) == source.path else set()
        for path in (Path(folder, name) for name in names if name not in without):
            inside(source.path, str(path.relative_to(source.path)))
            if path.is_symlink() and path.is_dir():  # it may contain itself
                raise FlashtuneError(
                    f"{path}: is a symbolic link to a folder, which is not followed: put the "
                    "folder itself there"
                )
        return without

    shutil.copytree(source.path, target, copy_function=copy, ignore=left_out)


def _write_config(source: ModelFolder, target: Path, chosen: Chosen) -> None:
    """Write the source's config with the entries of a FlashHead model added."""
    config: dict[str, Any] = {
        **{name: value for name, value in source.config.items() if name != SCREEN_KEY},
        "architectures": [PREFIX + name.removeprefix(PREFIX) for name in source.architectures],
        ASSETS_KEY: ASSETS_FOLDER,
        CENTROIDS_KEY: MEAN_ROWS,
        PROBES_KEY: chosen.n_probes,
    }
    if chosen.screen is not None:
        config[SCREEN_KEY] = str(chosen.screen)
    (target / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")


class Checkpoint:
    """A clustering's progress, in a file beside the folder to be made."""

    def __init__(self, out: Path, kmeans: BalancedKMeans) -> None:
        """Reads and writes nothing yet."""
        self.path = out.with_name(out.name + ".checkpoint")
        self._kmeans = kmeans
        self._run = {
            "origin": asdict(kmeans.origin),
            "n_clusters": kmeans.n_clusters,
            "seed": kmeans.seed,
        }

    def load(self) -> None:
        """Restore the clustering from the file, if there is one."""
        if not self.path.exists():
            return
        with open_tensors(self.path) as tensors:
            said, names = (tensors.metadata() or {}).get(_METADATA, "{}"), list(tensors.keys())
            assignments = tensors.get_tensor(ASSIGNMENTS) if names == [ASSIGNMENTS] else None
        try:
            metadata = members(parse_json(said, exact=True), "it", ("run", "iteration"))
            iteration = count(metadata["iteration"], "its iteration", 1, sys.maxsize)
            if assignments is None or metadata["run"] != self._run:
                raise FlashtuneError("other weights, seed or number of clusters")
            self._kmeans.resume(assignments, iteration)
        except FlashtuneError as error:
            raise FlashtuneError(
                f"{self.path}: the checkpoint of another clustering ({error}): give the same "
                "model, --clusters and --seed again, or remove it"
            ) from error

    def save(self) -> None:
        """Write the file, whole or not at all."""
        assert self._kmeans.assignments is not None
        text = json.dumps({"run": self._run, "iteration": self._kmeans.iteration})
        tensors = {ASSIGNMENTS: self._kmeans.assignments.cpu()}
        folder, name = self.path.parent, self.path.name
        with tempfile.TemporaryDirectory(dir=folder, prefix=f".{name}-") as scratch:
            new = Path(scratch, name)
            new.write_bytes(save(tensors, {_METADATA: text}))
            new.replace(self.path)
