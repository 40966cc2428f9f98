"""`flashtune search`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from flashtune.tuner.cli import options
from flashtune.tuner.cli.terminal import INTERRUPTED, say, say_json
from flashtune.tuner.objective import Objective
from flashtune.tuner.search.samplers.sampler import SAMPLERS
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.record import Provenance
from flashtune.tuning_db.store import Store, default_path

FAILED = 1  # the exit code if nothing worked


class _Search(click.Command):
    """Lists presets and knobs below its options; plans are loaded only for that."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the lists."""
        from flashtune.kernels.plans.candidate import PLANS
        from flashtune.kernels.plans.knob import knobs

        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_text(options.SHAPE_EPILOG)
            for name, plan in PLANS.items():
                if not knobs(plan.config):
                    continue  # plain torch has no knobs
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
    help=(
        "Time limit for the whole run, in seconds; each shape gets an equal share of what is "
        "left, and those that run out of it get what the others leave."
    ),
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
    "--retry-failed",
    is_flag=True,
    help="First evaluate the configs again that failed in earlier runs.",
)
@click.option(
    "--remote",
    metavar="DESTINATION",
    multiple=True,
    help=(
        "Measure on the machine that `ssh DESTINATION` reaches, on the device found there "
        "unless --device names one. May be repeated."
    ),
)
@click.option(
    "--objective",
    type=click.Choice([each.value for each in Objective]),
    default=Objective.TIME.value,
    show_default=True,
    help="What to minimise: the time of a call, its energy, or both.",
)
@click.option(
    "--remote-python",
    metavar="PYTHON",
    show_default="python3",
    help="The Python with torch and Triton on the remote machine.",
)
@click.option(
    "--gpus",
    metavar="all|N,N…",
    help="Measure on several GPUs of this machine: all, or numbers such as 0,2.",
)
@click.option(
    "--ray",
    metavar="[ADDRESS]",
    is_flag=False,
    flag_value="auto",
    help=(
        "Measure on the Ray cluster at this address; without an address, on the one that this "
        "machine belongs to. Needs flashtune[ray]."
    ),
)
@options.database
@options.as_json
def search(
    device: Device | None,
    shapes: Sequence[Problem],
    models: Sequence[Problem],
    fixed: Sequence[tuple[str, Any]],
    objective: str,
    remote: Sequence[str],
    remote_python: str | None,
    gpus: str | None,
    ray: str | None,
    database: Path | None,
    as_json: bool,
    **wanted: Any,
) -> None:
    """Search for the fastest kernel of each shape on a device.

    On a device of this machine, every config is verified and measured. For any other device,
    configs are cross-compiled and their times predicted, and the records say so. With --remote,
    configs are measured on the machine that ssh reaches under that name; it needs Python, torch
    and Triton. Several machines, several GPUs (--gpus) and a Ray cluster (--ray) share a search;
    devices of different kinds are searched side by side. With --objective energy or both, the
    energy of a call is measured as well as its time, on devices that can measure it. Run the same
    command again to continue an interrupted search. The exit code is 1 if no config worked for a
    shape.

    \b
    Examples:
      flashtune search --device orin --shape qwen3-vl-2b
      flashtune search --shape vocab=151936,hidden=2048,clusters=9496,probes=512 --trials 300
      flashtune search --model ./my-model --timeout 120 --json
      flashtune search --shape qwen3-0.6b --fix plan=staged --fix selection=in_gather
      flashtune search --device orin --remote user@jetson --shape qwen3-vl-2b
      flashtune search --shape qwen3-vl-2b --objective both
      flashtune search --gpus all --shape qwen3-vl-2b --shape gemma-3-1b
      flashtune search --ray --device h100 --shape qwen3-vl-2b
    """
    from flashtune.tuner.cli.search_report import SearchProgress, print_results
    from flashtune.tuner.fleet.fleets import FleetRequest, fleets_for
    from flashtune.tuner.here import this_device
    from flashtune.tuner.search.result_data import result_data
    from flashtune.tuner.search.session import SearchRequest, Session, side_by_side

    problems = list(dict.fromkeys([*shapes, *models]))
    if not problems:
        raise click.UsageError("give at least one --shape or --model")
    asked = FleetRequest(remote=remote, remote_python=remote_python, gpus=gpus, ray=ray)
    fleets = fleets_for(asked, device, wanted["jobs"], lambda text: say(text, err=True))
    timeout_s = wanted.pop("timeout")
    requests = [
        SearchRequest(
            device=fleet.device if fleet else device or this_device(),
            problems=problems,
            timeout_s=timeout_s,
            fixed=dict(fixed),
            objective=Objective(objective),
            fleet=fleet,
            **wanted,
        )
        for fleet in (fleets or (None,))
    ]
    with Store(database or default_path()) as store:
        sessions = [Session(request, store) for request in requests]
        [provenance] = {session.provenance for session in sessions}
        if not as_json and provenance is Provenance.PREDICTED:
            say(
                f"{requests[0].device.title} is not a device of this machine: all times are "
                "PREDICTED by a cost model, none are measured.",
                err=True,
            )
        with SearchProgress(provenance) as progress:
            outcomes = side_by_side(sessions, progress)
    if as_json:
        data = [result_data(outcome) for outcome in outcomes]
        say_json(data[0] if len(data) == 1 else data)
    else:
        for outcome in outcomes:
            print_results(outcome)
    if any(outcome.cancelled for outcome in outcomes):
        raise click.exceptions.Exit(INTERRUPTED)
    results = [result for outcome in outcomes for result in outcome.results]
    if any(result.winner is None for result in results):
        raise click.exceptions.Exit(FAILED)
