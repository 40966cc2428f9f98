"""The best record that is known of a problem: in the user's database, else in a shipped table.

Usage:
    record = best_record(device, problem, database=None)
"""

from pathlib import Path

from flashtune.tuning_db.device import Device
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.record import Outcome, Provenance, Record
from flashtune.tuning_db.store import default_path, open_existing
from flashtune.tuning_db.table import prebuilt_table


def best_record(device: Device, problem: Problem, database: Path | None) -> Record | None:
    """The user's best record, or the shipped one where that is measured and the user's is not.

    Raises FlashtuneError when the database or the table cannot be read.
    """
    own = None
    store = open_existing(database or default_path())
    if store is not None:
        with store:
            own = store.best(device.name, problem)
    if own is not None and own.provenance is Provenance.MEASURED:
        return own
    table = prebuilt_table(device.name)
    shipped = [
        record
        for record in (table.records if table else ())
        if record.problem == problem and record.measurement.outcome is Outcome.OK
    ]
    shipped.sort(
        key=lambda record: (
            record.provenance is Provenance.PREDICTED,
            record.measurement.median_us or 0.0,
        )
    )
    if shipped and (own is None or shipped[0].provenance is Provenance.MEASURED):
        return shipped[0]
    return own
