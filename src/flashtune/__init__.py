"""flashtune: FlashHead decode kernels that tune themselves.

Usage:
    import flashtune
    head = flashtune.FlashHead(weight, centroids, cluster_assignments)
    token = head(hidden)
    flashtune.apply(model, head)    # a model of Hugging Face transformers

Importing the package loads nothing but this file; each name loads what it needs.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashtune.kernels.head import FlashHead
    from flashtune.kernels.integrations.transformers import apply, remove
    from flashtune.tuning_db.errors import FlashtuneError
    from flashtune.tuning_db.problem import Problem

__all__ = ["FlashHead", "FlashtuneError", "Problem", "__version__", "apply", "remove"]
__version__ = "0.1.0"

_HOMES = {
    "FlashHead": "flashtune.kernels.head",
    "FlashtuneError": "flashtune.tuning_db.errors",
    "Problem": "flashtune.tuning_db.problem",
    "apply": "flashtune.kernels.integrations.transformers",
    "remove": "flashtune.kernels.integrations.transformers",
}


def __getattr__(name: str) -> Any:
    """Load a public name on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'flashtune' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
