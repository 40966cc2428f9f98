"""The outcome of a failed evaluation: the same error has the same outcome everywhere.

Usage:
    try:
        …
    except Exception as error:
        measurement = failure(error, Outcome.CRASH, policy="search")
"""

import subprocess

import torch

from flashtune.tuning_db.errors import FlashtuneError, MachineTroubleError
from flashtune.tuning_db.record import Measurement, Outcome

MOST_CHARACTERS = 500  # of an error's text that are kept
_MACHINE = (
    "no space left on device",
    "disk quota exceeded",
    "read-only file system",
    "too many open files",
    "failed to find c compiler",  # Triton's words
)
_FULL = ("too many blocks in cooperative launch", "out of memory", "out of resource")


class DoesNotFitError(Exception):
    """A config's kernels need more than the device has: registers, shared memory, residency."""


class WrongResultError(Exception):
    """A step's tokens or logits are not right."""


def outcome_of(error: BaseException, stage: Outcome) -> Outcome:
    """The outcome of an evaluation that an error ended.

    stage: the outcome unless the error itself determines it: `COMPILE_ERROR` before the step first
    ran, `CRASH` after that. Only the text of compilers' and drivers' errors says what did not fit.
    A running step needs no file any more: one that is missing then is the fault of the step.
    """
    own = stage is Outcome.CRASH and isinstance(error, FileNotFoundError)
    if is_machine_trouble(error) and not own:
        return Outcome.ENVIRONMENT
    if isinstance(error, FlashtuneError):
        return Outcome.INVALID
    if isinstance(error, WrongResultError):
        return Outcome.WRONG_RESULT
    text = describe(error).lower()
    full = isinstance(error, (DoesNotFitError, torch.OutOfMemoryError))
    return Outcome.OUT_OF_RESOURCES if full or any(word in text for word in _FULL) else stage


def is_machine_trouble(error: BaseException) -> bool:
    """Whether the machine is at fault, not the config: kernels themselves touch no files.

    File errors have an error number; tools that can't run, or report a disk error, say so in their
    text.
    """
    if isinstance(error, subprocess.CalledProcessError):
        return True
    for each in (error, error.__cause__):
        if isinstance(each, MachineTroubleError) or (isinstance(each, OSError) and each.errno):
            return True
    text = describe(error).lower()
    return any(words in text for words in _MACHINE)


def describe(error: BaseException) -> str:
    """An error and its cause in one line: `RuntimeError: it fell over (no space left)`."""
    text = f"{type(error).__name__}: {error}"
    if error.__cause__ is not None:
        text += f" ({error.__cause__})"
    return " ".join(text.split())


def failure(error: BaseException, stage: Outcome, policy: str) -> Measurement:
    """The measurement of an evaluation that an error ended; see `outcome_of` for `stage`."""
    return Measurement(
        outcome=outcome_of(error, stage), error=describe(error)[:MOST_CHARACTERS], policy=policy
    )
