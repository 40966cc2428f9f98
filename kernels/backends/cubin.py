"""What compiled kernels need, read from their binary by the cuobjdump that comes with Triton."""

import re
import subprocess
import tempfile

import triton


def resource_usage(binary: bytes) -> dict[str, dict[str, int]]:
    """Registers (`REG`), spilled bytes (`STACK`) and the like of a thread, by kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kernels = re.findall(r"Function (\w+):\s*\n(.*)", report)
    return {
        name: {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", line)}
        for name, line in kernels
    }
