"""flashtune: FlashHead decode kernels that tune themselves.

Usage:
    import flashtune
    head = flashtune.FlashHead(weight, centroids, cluster_assignments)
    token = head(hidden)
    flashtune.apply(model, head)    # a model of Hugging Face transformers
    flashtune.search(device="orin", shapes=["qwen3-vl-2b"])
    flashtune.best("orin", "qwen3-vl-2b")
    flashtune.tables.export("orin", "orin.json")

Importing the package loads nothing but this file; each name loads what it needs.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashtune.kernels.head import FlashHead
    from flashtune.kernels.integrations.transformers import apply, remove
    from flashtune.tuner import tables
    from flashtune.tuner.api import best, search
    from flashtune.tuning_db.errors import FlashtuneError
    from flashtune.tuning_db.problem import Problem

__all__ = [
    "FlashHead",
    "FlashtuneError",
    "Problem",
    "__version__",
    "apply",
    "best",
    "remove",
    "search",
    "tables",
]
__version__ = "0.1.0"

_HOMES = {
    "FlashHead": "flashtune.kernels.head",
    "FlashtuneError": "flashtune.tuning_db.errors",
    "Problem": "flashtune.tuning_db.problem",
    "apply": "flashtune.kernels.integrations.transformers",
    "best": "flashtune.tuner.api",
    "remove": "flashtune.kernels.integrations.transformers",
    "search": "flashtune.tuner.api",
}
_MODULES = {"tables": "flashtune.tuner.tables"}


def __getattr__(name: str) -> Any:
    """Load a public name on first use."""
    if name in _MODULES:
        value = import_module(_MODULES[name])
    elif name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module 'flashtune' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
