"""Whether a tuning table can be used: schema, every config valid for its problem, and rendered.

Usage:
    table = checked_table(path)      # FlashtuneError names the first thing that is wrong
    check_form(path, table)          # the text that `tables export` writes
    compile_record(path, record)
"""

from pathlib import Path

from flashtune.kernels.backends.host import named_device
from flashtune.kernels.backends.target import backend_of
from flashtune.kernels.plans.candidate import Candidate
from flashtune.kernels.plans.config import parse_config
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.record import Outcome, Record
from flashtune.tuning_db.table import TuningTable, dumps_table, read_table


def checked_table(path: Path) -> TuningTable:
    """The table, if each of its configs is valid and renders. Raises FlashtuneError."""
    table = read_table(path)
    device = named_device(table.device)
    for record in table.records:
        where = f"{path}: {record.problem.describe()}"
        try:
            config = parse_config(record.config)
        except FlashtuneError as error:
            raise FlashtuneError(f"{where}: {error}") from error
        candidate = Candidate(record.problem, config, device)
        reason = candidate.why_invalid()
        if reason:
            raise FlashtuneError(f"{where}: {reason}")
        _ = candidate.source  # must render
    return table


def check_form(path: Path, table: TuningTable) -> None:
    """Check what a shipped table must be, beyond usable. Raises FlashtuneError."""
    for record in table.records:
        if record.measurement.outcome is not Outcome.OK:
            raise FlashtuneError(
                f"{path}: {record.problem.describe()}: a record has the outcome "
                f"{record.measurement.outcome.value}: tables hold no failures, so remove it"
            )
    if path.read_text("utf-8") != dumps_table(table):
        raise FlashtuneError(
            f"{path} is not formatted as `tables export` formats it: import it and export it again"
        )


def compile_record(path: Path, record: Record) -> None:
    """Cross-compile a record's config. Raises FlashtuneError for any compiler error."""
    device = named_device(record.device)
    try:
        candidate = Candidate(record.problem, parse_config(record.config), device)
        backend_of(candidate).compile(candidate)
    except Exception as error:
        raise FlashtuneError(
            f"{path}: {record.problem.describe()}: does not compile: {error}"
        ) from error
