"""Draws the pictures of the documents: make generated

They are narrow enough to be read on a phone, and have colours for light and dark.
"""

import json
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "pictures"
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
WIDTH = 480
_LIGHT = """
text { fill: #24292f; font: 15px system-ui, sans-serif } .ground { fill: #ffffff }
.small { font-size: 13px; fill: #57606a } .head { font-weight: 600 } .tip { fill: #57606a }
.line { stroke: #57606a; fill: none } .box { fill: #eef0fb; stroke: #3f51b5 }
.read, .score { fill: #3f51b5 } .select { fill: #b3500a } .gather { fill: #1a7f5a }
.other { fill: #8c959f } .left { fill: #d5d9e3 }
"""
_DARK = """
text { fill: #e6e8ee } .ground { fill: #1e2129 } .small, .tip { fill: #aeb4c0 }
.line { stroke: #aeb4c0 } .box { fill: #2a2f3d; stroke: #8c9eff }
.read, .score { fill: #8c9eff } .select { fill: #ffab6b } .gather { fill: #5fd3a8 }
.other { fill: #7d8590 } .left { fill: #454c5b }
"""
STYLE = f"{_LIGHT}@media (prefers-color-scheme: dark) {{{_DARK}}}\n"


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    """Words whose start, middle or end is at x."""
    return f'<text x="{x}" y="{y}" class="{kind}" text-anchor="{anchor}">{words}</text>'


def box(x: float, y: float, width: float, height: float, kind: str, round_: int = 0) -> str:
    """A rectangle of a kind, which says its colour."""
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="{round_}" class="{kind}"/>'
    )


def picture(name: str, title: str, height: int, parts: Sequence[str]) -> None:
    """Write one: its title is what a screen reader reads."""
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        f"<title>{title}</title>",
        f"<style>{STYLE}</style>",
        box(0, 0, WIDTH, height, "ground", 8),
        *parts,
        "</svg>",
    ]
    (FOLDER / name).write_text("\n".join(lines) + "\n", "utf-8")


def what_is_read() -> None:
    """A cell is many rows; a column is a cluster."""
    columns, cell, left = 40, 11, 20
    probed = {3, 11, 12, 29}

    def grid(y: int, rows: int, read: set[int]) -> list[str]:
        return [
            box(
                left + cell * x,
                y + cell * row,
                cell - 2,
                cell - 2,
                "read" if x in read else "left",
            )
            for x in range(columns)
            for row in range(rows)
        ]

    everything = set(range(columns))
    parts = [
        text(left, 30, "Dense head: every row of the weight", "head"),
        *grid(44, 7, everything),
        text(left, 141, "151,936 rows: 622 MB", "small"),
        text(left, 184, "FlashHead, 1: one centroid for each cluster", "head"),
        *grid(198, 1, everything),
        text(left, 228, "9,496 centroids: 39 MB", "small"),
        text(left, 271, "FlashHead, 2: the rows of the best clusters", "head"),
        *grid(285, 7, probed),
        text(left, 382, "256 clusters of 16 rows: 17 MB", "small"),
        text(left, 425, "56 MB a token instead of 622: 9 %"),
        text(left, 447, "Qwen3-VL-2B, bf16, 256 probes. Dark cells are read.", "small"),
    ]
    picture("what-is-read.svg", "What a dense head and what FlashHead read", 466, parts)


def launches() -> None:
    """A row a plan; a frame is a launch."""
    plans: list[tuple[str, list[list[tuple[str, int]]]]] = [
        ("staged, threshold", [[("score", 150)], [("select", 62)], [("gather", 110)]]),
        ("staged, in_gather", [[("score", 150)], [("select", 34), ("gather", 110)]]),
        ("persistent", [[("score", 150), ("select", 34), ("gather", 110)]]),
        ("streamed", [[("score", 150)], [("select", 34), ("gather", 110)]]),
        ("batched", [[("score", 150)], [("select", 62)], [("gather", 130)]]),
        ("dense", [[("gather", 380)]]),
    ]
    notes = {
        "staged, in_gather": "each gather program finds the threshold itself",
        "persistent": "one cooperative launch, with a barrier inside",
        "streamed": "the gather starts while the score pass still runs",
        "batched": "several tokens, on tensor cores",
        "dense": "every row, no clusters",
        "staged, threshold": "three launches, one after another",
    }
    parts, y = [], 20
    for name, frames in plans:
        parts += [text(20, y + 16, name, "head")]
        parts += [text(20, y + 35, notes[name], "small")]
        x = 24
        for number, frame in enumerate(frames):
            under = name == "streamed" and number == 1
            top = y + 46 + (17 if under else 0)
            height = 15 if name == "streamed" else 30
            if under:
                x -= 60
            start = x
            for step, width in frame:
                parts.append(box(x, top, width, height, step, 2))
                x += width
            parts.append(
                f'<rect x="{start - 2}" y="{top - 2}" width="{x - start + 4}" '
                f'height="{height + 4}" rx="4" class="line"/>'
            )
            x += 12
        y += 96
    for number, step in enumerate(("score", "select", "gather")):
        parts.append(box(24 + 105 * number, y + 2, 14, 14, step, 2))
        parts.append(text(44 + 105 * number, y + 15, step))
    parts.append(text(340, y + 15, "frame: one launch", "small"))
    picture("plans.svg", "How plans split a step into launches", y + 34, parts)


def winner() -> None:
    """Two ways down: a search ahead of time, and what a head does when it first runs."""

    def chain(x: int, width: int, steps: Sequence[tuple[str, str]]) -> list[str]:
        parts = []
        for number, (first, second) in enumerate(steps):
            y = 50 + 76 * number
            parts += [
                box(x, y, width, 52, "box", 6),
                text(x + width / 2, y + 22, first, "", "middle"),
                text(x + width / 2, y + 41, second, "small", "middle"),
            ]
            if number < len(steps) - 1:
                middle, end = x + width / 2, y + 76
                parts.append(f'<path d="M{middle} {y + 52}V{end - 6}" class="line"/>')
                parts.append(f'<path d="M{middle - 5} {end - 8}h10l-5 8z" class="tip"/>')
        return parts

    parts = [
        text(20, 30, "flashtune search", "head"),
        *chain(
            20,
            212,
            (
                ("propose a config", "sampler, near the best"),
                ("compile it", "several at a time"),
                ("verify it", "against float64"),
                ("time it", "cold weights, median"),
                ("time the finalists again", "side by side, with the default"),
                ("winner", "by more than the noise"),
            ),
        ),
        text(250, 30, "FlashHead, first call", "head"),
        *chain(
            250,
            212,
            (
                ("record of this problem?", "else of the nearest shape"),
                ("of this device?", "else of the nearest device"),
                ("measured, same tools?", "else race up to 8 configs"),
                ("compile, load, check", "a few seconds"),
                ("it fails?", "default, then plain torch"),
                ("run", "head.explain() says why"),
            ),
        ),
        text(20, 515, "The winner goes to your database, and from there to a table.", "small"),
        text(20, 535, "A head reads your database, added tables, then shipped tables.", "small"),
    ]
    picture("winner.svg", "How a winner is chosen, and what a head runs", 552, parts)


def step_times() -> None:
    """What a decode step takes, by committed results: bars, and the floor as the last of them."""
    decode = json.loads((RESULTS / "h100-decode.json").read_text("utf-8"))["rows"]
    one = next(row for row in decode if row["problem"] == "151936x2048 c9496 p256")
    screens = {
        row["contender"]: row
        for row in json.loads((RESULTS / "h100-screens.json").read_text("utf-8"))["rows"]
        if row["problem"].startswith("151936x2048")
    }
    panels = {
        "One H100, 16 bits": [
            ("dense head", one["times_us"]["dense"], "other"),
            ("published design", one["times_us"]["baseline"], "other"),
            ("flashtune", one["times_us"]["winner"], "read"),
            ("byte floor", one["floor_us"], "left"),
        ],
        "Fewer bits too, in another run": [
            ("dense head", screens["dense 16-bit"]["alone_us"], "other"),
            ("dense head, int4", screens["dense int4"]["alone_us"], "other"),
            ("dense head, int8", screens["dense int8"]["alone_us"], "other"),
            ("flashtune, 16 bits", screens["16-bit"]["alone_us"], "read"),
            ("flashtune, int8 screen", screens["screen int8:8"]["alone_us"], "read"),
            ("byte floor, int8 screen", screens["screen int8:8"]["floor_us"], "left"),
        ],
    }
    most, start, y = 240, 182, 44
    parts = []
    for title, bars in panels.items():
        parts.append(text(20, y, title, "head"))
        y += 14
        for name, value, kind in bars:
            width = round(value * (WIDTH - start - 60) / most, 1)
            parts.append(text(start - 8, y + 15, name, "", "end"))
            parts.append(box(start, y + 2, width, 17, kind, 2))
            parts.append(text(start + width + 6, y + 16, f"{value:.1f}", "small"))
            y += 25
        y += 34
    parts += [
        text(
            20, y - 10, "Microseconds a step: Qwen3-VL-2B's head, one token, 256 probes,", "small"
        ),
        text(
            20, y + 8, "cold weights, CUDA graph. Published design: torch.topk, then one", "small"
        ),
        text(
            20, y + 26, "kernel that gathers and multiplies, as this project writes it.", "small"
        ),
    ]
    picture(
        "step-times.svg", "Time of a decode step against dense heads and the floor", y + 42, parts
    )


def main() -> None:
    """Draw them all."""
    FOLDER.mkdir(exist_ok=True)
    step_times()
    what_is_read()
    launches()
    winner()


if __name__ == "__main__":
    main()
