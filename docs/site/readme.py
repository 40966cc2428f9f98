"""Writes the README's tables again, from committed results: make generated

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`.
"""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
SHAPES = {
    "128256x2048 c8016 p256": "Llama-3.2-1B, 256 probes",
    "128256x3072 c8016 p256": "Llama-3.2-3B, 256 probes",
    "151936x1024 c9496 p256": "Qwen3-0.6B, 256 probes",
    "151936x2048 c9496 p256": "Qwen3-VL-2B, 256 probes",
    "262144x1152 c16384 p512": "Gemma-3-1B, 512 probes",
    "262144x640 c16384 p512": "Gemma-3-270M, 512 probes",
}


def _read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text("utf-8"))


def _table(headings: list[str], rows: list[list[str]]) -> str:
    lines = [headings, ["---", *("---:" for _ in headings[1:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def decode() -> str:
    """Microseconds a step of one token on an H100, and how many times as fast as dense."""
    found = {row["problem"]: row for row in _read("h100-decode.json")["rows"]}
    rows = []
    for problem, name in SHAPES.items():
        times, floor = found[problem]["times_us"], found[problem]["floor_us"]
        values = [times["dense"], times["baseline"], times["winner"], floor]
        faster = f"{times['dense'] / times['winner']:.1f}"
        rows.append([name, *(f"{value:.1f}" for value in values), faster])
    return _table(
        ["head", "dense", "published design", "flashtune", "byte floor", "dense / flashtune"], rows
    )


def bench() -> str:
    """What `flashtune bench` said of a small model on a CPU."""
    data = _read("zen3-bench-smollm2-135m.json")
    rows = [
        [
            row["head"],
            f"{row['tokens_s']:.1f}",
            f"{row['ratio']:.2f}",
            f"{row['share']:.1%}".replace("%", " %"),
            f"{row['added_mb']:g}",
            f"{row['same_answers']} of {data['prompts']}",
            f"{100 * row['same_tokens']:.3g} %",
        ]
        for row in data["rows"]
    ]
    return _table(
        [
            "head",
            "tokens/s",
            "to dense",
            "head's share of a step",
            "MB added",
            "same answers",
            "same tokens",
        ],
        rows,
    )


def written(text: str) -> str:
    """The text with its tables as the results have them."""
    tables = {"decode": decode, "bench": bench}

    def put(found: re.Match[str]) -> str:
        return f"{found[1]}\n\n{tables[found[2]]()}\n\n{found[3]}"

    pattern = r"(<!-- table: (\w+) -->)\n(?:(?!<!--).)*(<!-- end of table -->)"
    return re.sub(pattern, put, text, flags=re.DOTALL)


if __name__ == "__main__":
    README.write_text(written(README.read_text("utf-8")), "utf-8")
