"""The errors that a user can act on."""

from flashtune.tuning_db.one_line import one_line


class FlashtuneError(Exception):
    """Something the caller can correct: a bad shape, an unknown device, a corrupt file.

    The message is one line that says what is wrong and what to do, even if it quotes from a file
    or another program. The command line prints it and exits with 2; the runtime catches it and
    falls back.
    """

    def __init__(self, message: str) -> None:
        """message: unprintable characters are escaped; a long message is cut in the middle."""
        super().__init__(one_line(message))


class MachineTroubleError(FlashtuneError):
    """Something is wrong with the machine, not with what it was asked to do.

    A full disk, a folder that can't be written, a compiler that compiles nothing. It says nothing
    about the config that met it, which may work once the machine is fixed.
    """
