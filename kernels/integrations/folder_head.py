"""A FlashHead from a model folder's clusters and a weight that is already loaded.

Usage:
    head = flash_head_of(ModelFolder.open("path/to/model"), model.lm_head.weight)
"""

import torch

from flashtune.kernels.formats.screen import Screen, screen_of
from flashtune.kernels.head import TUNE, FlashHead
from flashtune.kernels.model_folder.clusters import Origin
from flashtune.kernels.model_folder.folder import ModelFolder
from flashtune.tuning_db.errors import FlashtuneError


def flash_head_of(
    folder: ModelFolder,
    weight: torch.Tensor,
    n_probes: int | None = None,
    screen: Screen | str | None = None,
    rows: str | None = None,
    tune: str = TUNE[0],
) -> FlashHead:
    """The folder's FlashHead with this weight `[vocab, hidden]`, on its device, in its dtype.

    n_probes, screen, rows: default: the folder's config; `none` means no screen. tune: as for
    FlashHead. Raises FlashtuneError if the folder has no clusters, or they were made for another
    weight.
    """
    clusters, path = folder.read_clusters(), folder.clustering_file
    shape = [clusters.assignments.numel(), clusters.centroids.shape[1]]
    if shape != list(weight.shape):
        raise FlashtuneError(
            f"{path}: made for a head of shape {shape}, but the model's has shape "
            f"{[*weight.shape]}: cluster this model with `flashtune cluster`"
        )
    differs = clusters.origin and clusters.origin.why_not(Origin.of(weight))
    if differs:
        raise FlashtuneError(
            f"{path}: made for another model ({differs}): cluster this model with `flashtune "
            "cluster`"
        )
    own_screen = folder.screen if screen is None else screen_of(screen)
    return FlashHead(
        weight,
        clusters.centroids.to(weight),
        clusters.assignments,
        n_probes=folder.probes(len(clusters.centroids)) if n_probes is None else n_probes,
        special_token_ids=folder.special_token_ids(len(weight)),
        screen=own_screen,
        rows=folder.rows(own_screen) if rows is None else rows,
        tune=tune,
    )
