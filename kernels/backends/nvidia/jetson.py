"""A Jetson whose torch finds no GPU: everything would run on its CPU without a word."""

from pathlib import Path

import torch

from flashtune.tuning_db.one_line import one_line

# Containers lack one or the other
_MODEL = Path("/proc/device-tree/model")
_RELEASE = Path("/etc/nv_tegra_release")


def why_unused() -> str | None:
    """Why torch does not find this Jetson's GPU; None if it does, or this is no Jetson."""
    model = jetson()
    if model is None or torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        why = f"torch {torch.__version__} was built without CUDA"
    else:
        why = f"torch {torch.__version__} finds no CUDA device"
    return f"{model}: {why}, so that its GPU is not used: see docs/jetson.md"


def jetson() -> str | None:
    """What this machine calls itself if it is a Jetson, else None."""
    try:
        model = one_line(_MODEL.read_text("utf-8", "replace").strip("\0"))
    except OSError:
        model = ""
    if "jetson" in model.lower():
        return model
    return "a Jetson" if _RELEASE.exists() else None
