"""What is particular to Jetsons: a torch that finds no GPU, power modes, power sensors.

If torch finds no GPU, everything would run on the CPU silently.
"""

import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.one_line import one_line

# Containers lack one or the other
_MODEL = Path("/proc/device-tree/model")
_RELEASE = Path("/etc/nv_tegra_release")
_DEVFREQ = Path("/sys/class/devfreq")
_CLOCKS = {
    "highest clock": "*gpu*/max_freq",
    "highest memory clock": "*emc*/max_freq",
}  # of _DEVFREQ
_SENSORS = Path("/sys/bus/i2c/drivers/ina3221")
_WHOLE_BOARD = ("VDD_IN",)  # what the rail of all others is called, on boards that measure it
_METER_SECONDS = 0.005  # between readings
_NVPMODEL_SECONDS = 5.0
_MOST_MODE = 100  # characters


@dataclass(frozen=True, slots=True)
class Rail:
    """A supply whose voltage (mV) and current (mA) the system shows in files."""

    name: str
    voltage: Path
    current: Path

    def watts(self) -> float:
        """The power that it delivers now; 0 while the sensor does not answer."""
        return (_number(self.voltage) or 0.0) * (_number(self.current) or 0.0) * 1e-6


def why_unused() -> str | None:
    """Why torch does not find this Jetson's GPU; None if it does, or this is no Jetson."""
    model = jetson()
    if model is None or torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        why = f"torch {torch.__version__} was built without CUDA"
    else:
        why = f"torch {torch.__version__} finds no CUDA device"
    return f"{model}: {why}, so its GPU is not used: see docs/jetson.md"


def jetson() -> str | None:
    """The name that this machine gives itself if it is a Jetson, else None."""
    try:
        model = one_line(_MODEL.read_text("utf-8", "replace").strip("\0"))
    except OSError:
        model = ""
    if "jetson" in model.lower():
        return model
    return "a Jetson" if _RELEASE.exists() else None


def conditions() -> dict[str, str]:
    """The power mode that `nvpmodel` reports, and the highest clocks that it allows."""
    found = {}
    mode = power_mode()
    if mode:
        found["power mode"] = mode
    for name, pattern in _CLOCKS.items():
        values = [_number(path) for path in sorted(_DEVFREQ.glob(pattern))]
        known = [each for each in values if each]
        if known:
            found[name] = f"{max(known) / 1e6:.0f} MHz"
    return found


def power_mode() -> str:
    """The mode as `nvpmodel -q` names it; empty if it can't be queried."""
    try:
        answer = subprocess.run(
            ["nvpmodel", "-q"], capture_output=True, text=True, timeout=_NVPMODEL_SECONDS
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    found = re.search(r"^NV Power Mode: *(\S.*)$", answer, re.MULTILINE)
    return one_line(found.group(1))[:_MOST_MODE] if found else ""


def power_rails() -> list[Rail]:
    """The rails to add up: the whole board's if there is one, else all of them.

    Raises FlashtuneError where there is none.
    """
    rails = []
    for label in sorted(_SENSORS.glob("*/hwmon/hwmon*/in*_label")):
        number = label.name.removeprefix("in").removesuffix("_label")
        files = (label.with_name(f"in{number}_input"), label.with_name(f"curr{number}_input"))
        if all(_number(file) is not None for file in files):
            rails.append(Rail(_text(label), *files))
    whole = [rail for rail in rails if rail.name in _WHOLE_BOARD]
    if not rails:
        raise FlashtuneError(f"this Jetson shows no power sensor under {_SENSORS}")
    return whole or rails


@contextmanager
def energy_counter(
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Callable[[], float]]:
    """A function that gives the joules consumed so far, integrated from power readings."""
    meter = _Meter(power_rails(), clock)
    stopped = threading.Event()

    def read() -> None:
        while not stopped.wait(_METER_SECONDS):
            meter.read()

    thread = threading.Thread(target=read, name="flashtune power", daemon=True)
    thread.start()
    try:
        yield meter.read
    finally:
        stopped.set()
        thread.join()


class _Meter:
    """Integrates power over time: a reading holds for the time since the one before."""

    def __init__(self, rails: Sequence[Rail], clock: Callable[[], float]) -> None:
        self._rails, self._clock = rails, clock
        self._lock = threading.Lock()
        self._joules, self._then = 0.0, clock()

    def read(self) -> float:
        """Joules so far."""
        with self._lock:
            now = self._clock()
            self._joules += (now - self._then) * sum(rail.watts() for rail in self._rails)
            self._then = now
            return self._joules


def _number(path: Path) -> float | None:
    """The number that a file holds; None if there is none."""
    try:
        return float(_text(path))
    except ValueError:
        return None


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace").strip()
    except OSError:
        return ""
