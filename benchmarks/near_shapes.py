"""What a first load loses for shapes that no table has: predicted, for a device that is not here.

    python benchmarks/near_shapes.py [--device NAME]… [--shape SHAPE]… [--out FILE]

A head with a problem that a device's table lacks races the winners of near shapes and configs
that are good in general. Both these and the configs that the cost model finds most promising for
the problem itself are compiled for the device and predicted with their actual resources. The ratio
of the two best times is what records of that problem could gain.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path

import click

from flashtune.kernels.backends.host import toolchain
from flashtune.kernels.plans.config import Config
from flashtune.kernels.predict.cost_model import shipped_model
from flashtune.kernels.runtime.choice import PREBUILT, Source, contenders
from flashtune.tuner.cli.options import DEVICE, SHAPE
from flashtune.tuner.search.evaluate import PredictingEvaluator
from flashtune.tuner.search.ranking import promising
from flashtune.tuner.search.space import Space
from flashtune.tuner.workers.pool import WorkerPool
from flashtune.tuner.workers.transport import here
from flashtune.tuning_db.device import Device, find_device
from flashtune.tuning_db.problem import Problem, parse_shape
from flashtune.tuning_db.table import prebuilt_devices, prebuilt_table

DEVICES = ("orin", "agx-thor")
SHAPES = (
    "qwen3-vl-2b,probes=593",
    "qwen3-vl-2b,epilogue=logits",
    "qwen3-vl-2b,tokens=2,epilogue=logits",
    "qwen3-vl-2b,tokens=4,epilogue=logits",
    "qwen3-vl-2b,tokens=8,epilogue=logits",
    "gemma-3-1b,probes=1024",
    "gemma-3-1b,probes=512,tokens=4,epilogue=logits",
    "qwen3.5-0.8b,probes=970",
    "qwen3.5-4b,probes=970,epilogue=logits",
    "llama-3.1-8b,probes=501,tokens=4,epilogue=logits",
    "cosmos-reason2-8b,probes=593",
    "cosmos-reason2-8b,probes=256,weight=int8,centroids=int8,rescored=8",
)


def best_us(
    problem: Problem, device: Device, configs: Sequence[Config], compilers: WorkerPool
) -> float | None:
    """The shortest predicted time of the configs that compile and fit."""
    found = PredictingEvaluator(problem, device, compilers).each(configs)
    times = [each.measurement.median_us for each in found]
    return min((each for each in times if each is not None), default=None)


@click.command()
@click.option("--device", "devices", type=DEVICE, multiple=True)
@click.option("--shape", "problems", type=SHAPE, multiple=True)
@click.option("--most", default=24, show_default=True, help="Promising configs to compile.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path))
def main(
    devices: Sequence[Device], problems: Sequence[Problem], most: int, out: Path | None
) -> None:
    """Predict and print."""
    tables = [table for name in prebuilt_devices() if (table := prebuilt_table(name))]
    records = [record for table in tables for record in table.records]
    found = []
    with WorkerPool(here(2)) as compilers:
        for device in devices or map(find_device, DEVICES):
            source = Source(name=PREBUILT, records=records)
            for problem in problems or map(parse_shape, SHAPES):
                start = time.monotonic()
                raced = contenders(problem, device, toolchain(device), [source])
                space = Space(problem, device)
                wanted = promising(space, shipped_model(), most=most, seed=0)
                near = best_us(problem, device, raced, compilers)
                own = best_us(problem, device, wanted, compilers)
                ratio = near / own if near and own else None
                found.append(
                    {
                        "device": device.name,
                        "problem": problem.describe(),
                        "raced_us": near,
                        "promising_us": own,
                        "ratio": ratio,
                    }
                )
                said = (
                    f"{near:.1f} us raced, {own:.1f} promising" if near and own else "none works"
                )
                text = f"{device.name} {problem.describe()}: {said}"
                text += f", {ratio:.3f}" if ratio else ""
                print(f"{text} ({time.monotonic() - start:.0f} s)", flush=True)
    if out:
        out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
