"""The times of decode.py against the byte floor, as a picture.

python benchmarks/decode.py --tokens 1 --tokens 2 … --json decode.json
python benchmarks/plot.py decode.json docs/performance.png      # needs matplotlib
"""

import json
from collections import defaultdict
from pathlib import Path

import click
import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.ticker import ScalarFormatter

MICROSECONDS = (5, 10, 20, 50, 100, 200, 500)
LINES = {"dense": "tab:gray", "baseline": "tab:orange", "winner": "tab:blue"}


@click.command()
@click.argument("results", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("picture", type=click.Path(dir_okay=False, path_type=Path))
def main(results: Path, picture: Path) -> None:
    """Draw RESULTS, one panel a shape, to PICTURE."""
    data = json.loads(results.read_text())
    shapes = defaultdict(list)
    for row in data["rows"]:
        shapes[row["problem"].split(" t")[0]].append(row)
    columns = min(3, len(shapes))
    lines = -(-len(shapes) // columns)
    figure, panels = pyplot.subplots(
        lines, columns, figsize=(4.2 * columns, 3.4 * lines), squeeze=False, sharex=True
    )
    for panel in panels.flat[len(shapes) :]:
        panel.set_axis_off()
    for panel, (shape, rows) in zip(panels.flat, shapes.items(), strict=False):
        rows.sort(key=lambda row: row["tokens"])
        tokens = [row["tokens"] for row in rows]
        for name, color in LINES.items():
            times = [row["times_us"][name] for row in rows]
            panel.plot(tokens, times, marker="o", markersize=3, color=color, label=name)
        floors = [row["floor_us"] for row in rows]
        panel.plot(tokens, floors, linestyle="--", color="black", label="byte floor")
        panel.set(xscale="log", yscale="log", title=shape, xticks=tokens)
        panel.title.set_fontsize(9)
        panel.set_yticks(MICROSECONDS)
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_formatter(ScalarFormatter())
            axis.set_minor_locator(pyplot.NullLocator())
        panel.grid(visible=True, which="both", linewidth=0.3)
    for panel in panels[-1]:
        panel.set_xlabel("tokens")
    for line in panels:
        line[0].set_ylabel("µs a call")
    panels[0][0].legend(fontsize=8)
    figure.suptitle(f"{data['device']}, measured: CUDA graph, cold weights, medians", fontsize=10)
    figure.tight_layout()
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main()
