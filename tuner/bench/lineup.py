"""The heads to compare: the dense one, FlashHeads, and screens without clusters.

Usage:
    entries = lineup(folder, n_probes=[192, 384], screens=[Screen.parse("int8")])
"""

from collections.abc import Sequence
from dataclasses import dataclass

from flashtune.kernels.formats.screen import Screen
from flashtune.kernels.model_folder.folder import ModelFolder
from flashtune.tuner.clustering.head_form import stored_bytes, with_clusters
from flashtune.tuning_db.errors import FlashtuneError

WITHOUT_CLUSTERS = ("int8", "int4")  # the screens of a model that has no clusters


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A head. n_probes: None without clusters; without clusters and screen it is the dense head.

    dtype: the model's; own: whether this is the folder's own setting.
    """

    dtype: str
    n_probes: int | None = None
    screen: Screen | None = None
    own: bool = False

    @property
    def dense(self) -> bool:
        """Whether it is the model's own head."""
        return self.n_probes is None and self.screen is None

    @property
    def form(self) -> str:
        """Its name in every table: `bf16`, `int8:8`, `no clusters int8:8`, `dense bf16`."""
        if self.n_probes is not None:
            return str(with_clusters(self.dtype, self.screen))
        return f"dense {self.dtype}" if self.screen is None else f"no clusters {self.screen}"

    @property
    def name(self) -> str:
        """The form, with the number of probes."""
        return self.form if self.n_probes is None else f"{self.form} with {self.n_probes} probes"

    def added_bytes(self, shape: tuple[int, int], n_clusters: int) -> int:
        """Roughly the memory that it adds; shape: the weight's, `[vocab, hidden]`."""
        if self.dense:
            return 0
        rows, centroids = self.dtype, self.dtype
        if self.screen is not None:
            rows, centroids = self.screen.rows, self.screen.centroids
        return stored_bytes(rows, *shape) + stored_bytes(centroids, n_clusters, shape[1])


def lineup(
    folder: ModelFolder,
    n_probes: Sequence[int] = (),
    screens: Sequence[Screen | None] = (),
) -> list[Entry]:
    """The dense head, then the requested heads, each once.

    For a folder with clusters: each screen (None: the model's own numbers; default: the folder's)
    with each number of probes (default: the folder's, and all clusters), and each screen without
    clusters (`int8` if nothing is given). For a folder without clusters: each screen (default:
    `int8` and `int4`). Raises FlashtuneError for more probes than clusters.
    """
    dtype = folder.dtype
    found = [Entry(dtype=dtype)]
    whole = [screen for screen in screens if screen is not None]
    if not folder.has_clusters:
        if n_probes:
            raise FlashtuneError(
                f"{folder.path}: has no clusters to probe: make them with `flashtune cluster`, or "
                "leave --probes out"
            )
        if not screens:
            whole = [Screen.parse(text) for text in WITHOUT_CLUSTERS]
        if not whole:
            raise FlashtuneError(
                f"{folder.path}: without clusters a head needs a screen: give --screen int8"
            )
    else:
        n_clusters, own = folder.problem().n_clusters, folder.problem().n_probes
        for number in n_probes:
            if number > n_clusters:
                raise FlashtuneError(
                    f"{number} probes are more than the model's {n_clusters} clusters: give at "
                    f"most {n_clusters}"
                )
        if not (n_probes or screens):
            whole = [Screen.parse(WITHOUT_CLUSTERS[0])]
        for screen in screens or [folder.screen]:
            for number in sorted(set(n_probes or (own, n_clusters))):
                mine = (number, screen) == (own, folder.screen)
                found.append(Entry(dtype=dtype, n_probes=number, screen=screen, own=mine))
    found += [Entry(dtype=dtype, screen=screen) for screen in whole]
    return list(dict.fromkeys(found))
