"""Which files are a model folder's own: those inside it, whatever its config and its index name.

Usage:
    path = inside(folder, "flash_head_assets", "clustering_cache.safetensors")
    all_inside(folder)          # before other code reads arbitrary files of it
"""

import os
from pathlib import Path
from typing import Any

from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.one_line import quoted


def inside(folder: Path, *names: Any) -> Path:
    """The path of a file that the folder names, part by part; it need not be there.

    Links are followed inside the folder and, from a snapshot in Hugging Face's cache, to the
    blobs of the same repository. Raises FlashtuneError for a name that leads anywhere else.
    """
    for name in names:
        if not isinstance(name, str) or "\0" in name:
            raise FlashtuneError(f"{folder}: {quoted(name)} cannot be the name of a file")
    path = folder.joinpath(*names)
    try:
        root, found = (Path(os.path.realpath(each)) for each in (folder, path))
    except ValueError as error:  # a null character, half a character
        raise FlashtuneError(f"{path}: cannot be the name of a file") from error
    places = [root]
    if root.parent.name == "snapshots":
        places.append(root.parents[1] / "blobs")
    if not any(found.is_relative_to(place) for place in places):
        raise FlashtuneError(
            f"{path}: leads out of the model's folder, to {found}: copy the file into the folder "
            "instead"
        )
    return path


def all_inside(folder: Path) -> None:
    """Raises FlashtuneError if any link of a folder leads out of it, as `inside`."""
    for parent, folders, names in os.walk(folder):
        for name in (*folders, *names):
            inside(folder, os.path.relpath(os.path.join(parent, name), folder))
