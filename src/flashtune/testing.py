"""The contract suite, for tests of a backend that lives outside this repository.

Usage:
    from flashtune.testing import DecodeContract, Runner

    class TestMyBackend(DecodeContract):
        ...    # docs/howto/test-a-backend.md

It needs pytest: `pip install 'flashtune[testing]'`.
"""

from flashtune.kernels.testing.contract import DecodeContract
from flashtune.kernels.testing.runner import Runner

__all__ = ["DecodeContract", "Runner"]
