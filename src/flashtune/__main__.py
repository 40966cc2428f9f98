"""`python -m flashtune` and the command `flashtune`."""

import signal
import sys
from types import FrameType

_IMPORTING = "<frozen importlib._bootstrap>"  # the file of frames that load a module
_AGAIN_SECONDS = 0.05


def main() -> None:
    """Run the command line; Ctrl-C ends with exit code 130, as soon as no module is loading."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        for each in (signal.SIGINT, signal.SIGALRM):
            signal.signal(each, _interrupt)
    try:
        from flashtune.tuner.cli.main import cli

        cli(prog_name="flashtune")
    except KeyboardInterrupt:
        sys.exit(130)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt; while a module loads, by an alarm a little later.

    Modules in C lose an exception while they load, as torch does when it imports numpy, take it
    for something else, or abort the process.
    """
    while frame is not None:
        if frame.f_code.co_filename == _IMPORTING:
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS)
            return
        frame = frame.f_back
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
