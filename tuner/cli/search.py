"""`flashtune search`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flashtune.tuner.cli import options
from flashtune.tuner.cli.terminal import INTERRUPTED, say, say_json
from flashtune.tuner.search.sampler import SAMPLERS
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.record import Provenance
from flashtune.tuning_db.store import Store, default_path

if TYPE_CHECKING:
    from flashtune.tuner.workers.remote import RemoteMachine

FAILED = 1  # the exit code where nothing worked


class _Search(click.Command):
    """Names presets and knobs below its options; plans are read only for that."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write them."""
        from flashtune.kernels.plans.candidate import PLANS
        from flashtune.kernels.plans.knob import knobs

        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_text(options.SHAPE_EPILOG)
            for name, plan in PLANS.items():
                if not knobs(plan.config):
                    continue  # plain torch has nothing to choose
                formatter.write_paragraph()
                formatter.write_text(f"Knobs of plan={name}: {', '.join(knobs(plan.config))}.")


@click.command(cls=_Search)
@options.device("The device to search for. Default: this machine's GPU, else its CPU.")
@options.shapes
@options.models
@click.option(
    "--trials",
    type=click.IntRange(1),
    default=150,
    show_default=True,
    help="Configs to evaluate for each shape, including those of earlier runs.",
)
@click.option(
    "--timeout",
    type=options.SECONDS,
    help="Seconds for the whole run; each shape gets an equal share of what is left.",
)
@click.option(
    "--sampler",
    type=click.Choice(SAMPLERS),
    default="tpe",
    show_default=True,
    help="How configs are proposed; gp needs flashtune[gp].",
)
@options.seed
@options.jobs
@click.option(
    "--fix",
    "fixed",
    type=options.FIX,
    multiple=True,
    help="Search only configs with KNOB=VALUE, such as plan=staged; may be repeated.",
)
@click.option(
    "--retry-failed", is_flag=True, help="First, evaluate again what failed in earlier runs."
)
@click.option(
    "--remote",
    metavar="DESTINATION",
    help="Measure on the machine that `ssh DESTINATION` reaches; without --device, on the device "
    "found there.",
)
@click.option(
    "--remote-python",
    metavar="PYTHON",
    show_default="python3",
    help="The Python there that has torch and Triton.",
)
@options.database
@options.as_json
def search(
    device: Device | None,
    shapes: Sequence[Problem],
    models: Sequence[Problem],
    fixed: Sequence[tuple[str, Any]],
    remote: str | None,
    remote_python: str | None,
    database: Path | None,
    as_json: bool,
    **wanted: Any,
) -> None:
    """Search for the fastest kernel of each shape on a device.

    On the device itself, every config is verified and measured. For a device that is not here,
    configs are cross-compiled and their times predicted, and the records say so. With --remote
    they are measured on the machine that ssh reaches under that name, which needs Python, torch
    and Triton. Run the same command again to continue an interrupted search. The exit code is 1
    if nothing worked for a shape.

    \b
    Examples:
      flashtune search --device orin --shape qwen3-vl-2b
      flashtune search --shape vocab=151936,hidden=2048,clusters=9496,probes=512 --trials 300
      flashtune search --model ./my-model --timeout 120 --json
      flashtune search --shape qwen3-0.6b --fix plan=staged --fix selection=in_gather
      flashtune search --device orin --remote user@jetson --shape qwen3-vl-2b
    """
    from flashtune.tuner.cli.search_report import SearchProgress, print_results
    from flashtune.tuner.here import this_device
    from flashtune.tuner.search.result_data import result_data
    from flashtune.tuner.search.session import SearchRequest, Session

    problems = list(dict.fromkeys([*shapes, *models]))
    if not problems:
        raise click.UsageError("give at least one --shape or --model")
    if remote_python is not None and remote is None:
        raise click.UsageError("--remote-python is about another machine: give --remote too")
    machine = _connect(remote, device, remote_python) if remote is not None else None
    request = SearchRequest(
        device=machine.device if machine else device or this_device(),
        problems=problems,
        timeout_s=wanted.pop("timeout"),
        fixed=dict(fixed),
        remote=machine,
        **wanted,
    )
    with Store(database or default_path()) as store:
        session = Session(request, store)
        if not as_json and session.provenance is Provenance.PREDICTED:
            say(
                f"{request.device.title} is not this machine's device: times are PREDICTED by "
                "a cost model, none is measured.",
                err=True,
            )
        with SearchProgress(session.provenance) as progress:
            outcome = session.run(progress)
    if as_json:
        say_json(result_data(outcome))
    else:
        print_results(outcome)
    if outcome.cancelled:
        raise click.exceptions.Exit(INTERRUPTED)
    if any(result.winner is None for result in outcome.results):
        raise click.exceptions.Exit(FAILED)


def _connect(destination: str, device: Device | None, python: str | None) -> "RemoteMachine":
    from flashtune.tuner.workers.remote import find_machine
    from flashtune.tuner.workers.ssh import PYTHON

    say(f"connecting to {destination}", err=True)
    machine = find_machine(destination, device, python or PYTHON)
    say(machine.describe(), err=True)
    return machine
