"""Whether a Python package that kernels need can be used in this process."""

import importlib
import re
import sys

LEAST = {"torch": (2, 8), "triton": (3, 6)}


def why_unusable(package: str) -> str | None:
    """None if the package loads and is new enough, else a line that says what to install."""
    least = ".".join(map(str, LEAST[package]))
    cure = f"install {package} {least} or later for {sys.executable}"
    try:
        module = importlib.import_module(package)
    except (ImportError, OSError) as error:
        return f"{package} cannot be imported ({' '.join(str(error).split())}): {cure}"
    found = re.match(r"(\d+)\.(\d+)", module.__version__)
    if found is None or (int(found[1]), int(found[2])) < LEAST[package]:
        return f"{package} is version {module.__version__}: {cure}"
    return None
