"""The energy that a call takes, from a counter of the whole device.

Usage:
    with target.energy(where) as joules:
        joules_a_call(timer, joules)

Counters are read in steps, of NVML's every 20 to 100 ms: calls are counted from one step to
another that comes at least half a second later. The device's idle power is included.
"""

import time
from collections.abc import Callable

from flashtune.kernels.measure.timing import Timer
from flashtune.tuning_db.errors import MachineTroubleError

LEAST_SECONDS = 0.5
MOST_SECONDS = 10.0
BATCH_SECONDS = 0.005  # of calls between two looks at the counter


def joules_a_call(
    timer: Timer, joules: Callable[[], float], clock: Callable[[], float] = time.monotonic
) -> float:
    """Joules that a call takes. Raises MachineTroubleError if the counter does not advance."""
    [call_us] = timer.sample(1)
    replays = max(1, round(1e6 * BATCH_SECONDS / (call_us * timer.calls)))
    start = clock()

    def until_a_step(least_s: float) -> tuple[float, int]:
        """The counter at its next step that comes so late or later, and the calls until then."""
        begun, before, calls = clock(), joules(), 0
        while True:
            timer.sample(replays)
            calls += replays * timer.calls
            now = joules()
            if now != before and clock() - begun >= least_s:
                return now, calls
            before = now
            if clock() - start > MOST_SECONDS:
                raise MachineTroubleError("the device's energy counter does not advance")

    first, _ = until_a_step(0.0)
    last, calls = until_a_step(LEAST_SECONDS)
    return (last - first) / calls
