"""One decode head to be solved, and its names.

Usage:
    problem = Problem(vocab_size=151936, hidden_size=2048, n_clusters=9496, n_probes=256)
    problem.cluster_size      # 16
    problem.key               # canonical JSON, the database key
    parse_shape("qwen3-vl-2b")
    parse_shape("vocab=151936,hidden=2048,clusters=9496,probes=512,tokens=4")
"""

import functools
import json
from dataclasses import dataclass, fields
from typing import Any, Protocol

from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.one_line import quoted
from flashtune.tuning_db.registry import Registry

DEFAULT_PROBES = 256
_YOUNGER = frozenset(["model_dtype", "n_rescored", "n_pinned", "in_place"])
LARGEST = 2**31 - 1  # of a problem's numbers: kernels count in 32 bits
MOST_TOKENS = 32  # of one step: heads decode more tokens in several parts


class NumberFormat(Protocol):
    """What a problem needs from a format (kernels/formats/format.py)."""

    @property
    def name(self) -> str:
        """What problems call it."""

    @property
    def quantised(self) -> bool:
        """Whether it has scales."""

    def bytes_of(self, rows: int, width: int) -> int:
        """Bytes of a matrix `[rows, width]`."""


class WhatComesOut(Protocol):
    """What a problem needs from an epilogue (kernels/epilogues/epilogue.py)."""

    @property
    def name(self) -> str:
        """What problems call it."""

    @property
    def written_bytes(self) -> Any:
        """The fewest bytes that a step writes, as a function of the problem."""


FORMATS: Registry[NumberFormat] = Registry("a format", room="flashtune.kernels.formats")
EPILOGUES: Registry[WhatComesOut] = Registry("epilogue", room="flashtune.kernels.epilogues")


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Problem:
    """A FlashHead decode step: score centroids, probe the best clusters, compute their logits.

    Shapes: centroids `[n_clusters, hidden_size]`, weight `[vocab_size, hidden_size]` (rows of a
    cluster contiguous; if in_place, rows by token id), hidden states `[n_tokens, hidden_size]`.

    Args:
        vocab_size: Tokens; a multiple of n_clusters.
        hidden_size: Width of the hidden state.
        n_clusters: Clusters, all of the same size.
        n_probes: The least number of clusters that are probed.
        n_tokens: Tokens per step.
        weight_dtype: The number format of the rows.
        centroid_dtype: The number format of the centroids.
        epilogue: What comes out: `argmax`, the best token `[n_tokens]`, or `logits`, `[n_tokens,
            vocab_size]` in the model's dtype, filled where no cluster was probed.
        model_dtype: If the weight's format is quantised, the dtype of the model itself: of its
            hidden states, its logits, and the rows that decide.
        n_rescored: How many of the best candidates the model's own rows decide.
        n_pinned: How many of the first clusters are always probed, in addition to the best.
        in_place: Rows are read from the model's weight, by token id.

    Raises:
        FlashtuneError: If FlashHead cannot solve the shape.
    """

    vocab_size: int
    hidden_size: int
    n_clusters: int
    n_probes: int
    n_tokens: int = 1
    weight_dtype: str = "bf16"
    centroid_dtype: str = "bf16"
    epilogue: str = "argmax"
    model_dtype: str = ""
    n_rescored: int = 0
    n_pinned: int = 0
    in_place: bool = False

    def __post_init__(self) -> None:
        """Reject unsolvable problems, with one line that says why."""
        for name in ("vocab_size", "hidden_size", "n_clusters", "n_probes", "n_tokens"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise FlashtuneError(
                    f"{name} must be a positive whole number, not {quoted(value)}"
                )
            if value > LARGEST:
                raise FlashtuneError(f"{name} must be at most {LARGEST}, not {quoted(value)}")
        if self.vocab_size % self.n_clusters:
            raise FlashtuneError(
                f"vocab_size {self.vocab_size} is not a multiple of n_clusters "
                f"{self.n_clusters}: pad the vocabulary, or choose a number that divides it"
            )
        if self.n_probes > self.n_clusters:
            raise FlashtuneError(
                f"n_probes {self.n_probes} is more than n_clusters {self.n_clusters}"
            )
        for name in ("weight_dtype", "centroid_dtype"):
            if getattr(self, name) not in FORMATS:
                raise FlashtuneError(
                    f"{name} must be one of {', '.join(FORMATS)}, "
                    f"not {quoted(getattr(self, name))}"
                )
        self._check_model_dtype()
        for name, most in (("n_rescored", self.vocab_size), ("n_pinned", self.n_clusters)):
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value <= most:
                raise FlashtuneError(
                    f"{name} must be a whole number from 0 to {most}, not {quoted(value)}"
                )
        if type(self.in_place) is not bool or (
            self.in_place and FORMATS[self.weight_dtype].quantised
        ):
            raise FlashtuneError(
                "in_place must be true or false, and false if the weight is quantised, not "
                f"{self.in_place!r} with {self.weight_dtype}"
            )
        if self.epilogue not in EPILOGUES:
            raise FlashtuneError(
                f"epilogue must be one of {', '.join(EPILOGUES)}, not {quoted(self.epilogue)}"
            )

    def _check_model_dtype(self) -> None:
        plain = [name for name, each in FORMATS.items() if not each.quantised]
        if FORMATS[self.weight_dtype].quantised:
            if self.model_dtype not in plain:
                raise FlashtuneError(
                    f"model_dtype must be one of {', '.join(plain)} if the weight is "
                    f"{self.weight_dtype}, not {quoted(self.model_dtype)}"
                )
        elif self.model_dtype != "" or self.n_rescored:
            raise FlashtuneError(
                "model_dtype and n_rescored are only for quantised weights: leave them out with "
                f"{self.weight_dtype}"
            )

    @property
    def state_dtype(self) -> str:
        """The dtype of hidden states and logits."""
        return self.model_dtype or self.weight_dtype

    @property
    def cluster_size(self) -> int:
        """Tokens in a cluster."""
        return self.vocab_size // self.n_clusters

    @property
    def centroid_bytes(self) -> int:
        """Bytes of all centroids, read once per step."""
        return FORMATS[self.centroid_dtype].bytes_of(self.n_clusters, self.hidden_size)

    @property
    def cluster_bytes(self) -> int:
        """Bytes of the weight rows of one cluster."""
        return FORMATS[self.weight_dtype].bytes_of(self.cluster_size, self.hidden_size)

    @property
    def distinct_clusters(self) -> float:
        """How many distinct clusters all tokens probe, if each chooses its own at random."""
        missed = (1 - self.n_probes / self.n_clusters) ** self.n_tokens
        return self.n_clusters * (1 - missed)

    @property
    def read_bytes(self) -> int:
        """The fewest bytes a step must read: all centroids and every probed cluster, once each.

        Includes the model's own rows by which candidates are decided.
        """
        again = FORMATS[self.state_dtype].bytes_of(self.n_rescored, self.hidden_size)
        clusters = min(self.n_clusters, self.distinct_clusters + self.n_pinned)
        return self.centroid_bytes + round(clusters * self.cluster_bytes) + self.n_tokens * again

    @property
    def written_bytes(self) -> int:
        """Bytes of the logits, each written once; token ids are not counted."""
        return int(EPILOGUES[self.epilogue].written_bytes(self))

    @property
    def minimum_bytes(self) -> int:
        """The fewest bytes a step must read from memory and write to it."""
        return self.read_bytes + self.written_bytes

    @property
    def key(self) -> str:
        """Canonical JSON: sorted keys, no spaces."""
        return _key_of(self)

    def data(self) -> dict[str, Any]:
        """The problem as plain data.

        A newer field is left out at its default, so that older records keep their keys.
        """
        data = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: each for name, each in data.items() if each or name not in _YOUNGER}

    @classmethod
    def from_json(cls, data: Any) -> "Problem":
        """Build from a decoded JSON object; raises FlashtuneError on any other or missing key."""
        names = {field.name for field in fields(cls)}
        if not isinstance(data, dict) or not names - _YOUNGER <= set(data) <= names:
            needed = sorted(names - _YOUNGER)
            raise FlashtuneError(
                f"a problem must have the keys {needed}, may have {sorted(_YOUNGER)}, and must "
                "have no others"
            )
        return cls(**data)

    def describe(self) -> str:
        """A short readable name: `151936x2048 c9496 p256`, plus unusual settings."""
        text = f"{self.vocab_size}x{self.hidden_size} c{self.n_clusters} p{self.n_probes}"
        if self.n_tokens > 1:
            text += f" t{self.n_tokens}"
        if self.weight_dtype != "bf16":
            text += f" {self.weight_dtype}"
        if self.centroid_dtype != self.weight_dtype:
            text += f" centroids {self.centroid_dtype}"
        if self.model_dtype not in ("", "bf16"):
            text += f" of {self.model_dtype}"
        if self.n_rescored:
            text += f" r{self.n_rescored}"
        if self.n_pinned:
            text += f" pinned {self.n_pinned}"
        if self.in_place:
            text += " in place"
        if self.epilogue != "argmax":
            text += f" {self.epilogue}"
        return text


@functools.lru_cache(maxsize=256)  # every record of a search has the same
def _key_of(problem: Problem) -> str:
    return json.dumps(problem.data(), sort_keys=True, separators=(",", ":"))


PRESETS = {
    "qwen3-vl-2b": (151936, 2048, 9496),
    "qwen3-0.6b": (151936, 1024, 9496),
    "llama-3.2-1b": (128256, 2048, 8016),
    "llama-3.2-3b": (128256, 3072, 8016),
    "gemma-3-1b": (262144, 1152, 16384),
    "gemma-3-270m": (262144, 640, 16384),
    "llama-3.1-8b": (128256, 4096, 8016),
    "cosmos-reason2-8b": (151936, 4096, 9496),
    "cosmos-reason2-32b": (151936, 5120, 9496),
    "qwen3.5-0.8b": (248320, 1024, 15520),
    "qwen3.5-2b": (248320, 2048, 15520),
    "qwen3.5-4b": (248320, 2560, 15520),
    "qwen3.5-9b": (248320, 4096, 15520),
}
_SHAPE_KEYS = {
    "vocab": "vocab_size",
    "hidden": "hidden_size",
    "clusters": "n_clusters",
    "probes": "n_probes",
    "tokens": "n_tokens",
    "rescored": "n_rescored",
    "pinned": "n_pinned",
}
_NAME_KEYS = ("dtype", "weight", "centroids", "epilogue", "rows")
IN_ORDER, IN_PLACE = "in_order", "in_place"
ROWS = (IN_ORDER, IN_PLACE)  # a cluster's rows side by side, or in the model's order
_MOST_DIGITS = 18  # int() refuses thousands of digits with its own error


def parse_shape(text: str) -> Problem:
    """Read `--shape`: a preset's name, `key=value` pairs, or a preset followed by pairs.

    Raises FlashtuneError naming the part that is wrong.
    """
    first, *rest = (part.strip() for part in text.split(","))
    values: dict[str, Any] = {"n_probes": DEFAULT_PROBES}
    names: dict[str, str] = {"dtype": "bf16", "epilogue": "argmax"}
    if "=" in first:
        rest = [first, *rest]
    elif first.lower() in PRESETS:
        vocab, hidden, clusters = PRESETS[first.lower()]
        values |= {"vocab_size": vocab, "hidden_size": hidden, "n_clusters": clusters}
    else:
        raise FlashtuneError(
            f"unknown shape {quoted(first)}: give a preset ({', '.join(PRESETS)}) "
            "or vocab=…,hidden=…,clusters=…[,probes=…,tokens=…,dtype=…,weight=…,centroids=…,"
            "rescored=…,epilogue=…,rows=…]"
        )
    for pair in rest:
        name, _, value = pair.partition("=")
        if name not in _SHAPE_KEYS and name not in _NAME_KEYS:
            known = ", ".join((*_SHAPE_KEYS, *_NAME_KEYS))
            raise FlashtuneError(
                f"unknown key {quoted(name)} in shape {quoted(text)}: use {known}"
            )
        if name in _NAME_KEYS:
            names[name] = value
        elif value.isascii() and value.isdecimal() and len(value) <= _MOST_DIGITS:
            values[_SHAPE_KEYS[name]] = int(value)
        else:
            raise FlashtuneError(
                f"{name} in shape {quoted(text)} must be a whole number, not {quoted(value)}"
            )
    if values.get("n_tokens", 1) > MOST_TOKENS:
        raise FlashtuneError(
            f"tokens={values['n_tokens']} in shape {quoted(text)} is more than {MOST_TOKENS}: "
            f"a head decodes more tokens in parts of {MOST_TOKENS}"
        )
    missing = [key for key in ("vocab", "hidden", "clusters") if _SHAPE_KEYS[key] not in values]
    if missing:
        raise FlashtuneError(f"shape {quoted(text)} lacks {', '.join(missing)}")
    rows = names.get("rows", IN_ORDER)
    if rows not in ROWS:
        raise FlashtuneError(
            f"rows in shape {quoted(text)} must be one of {', '.join(ROWS)}, not {quoted(rows)}"
        )
    weight = names.get("weight", names["dtype"])
    values |= {
        "weight_dtype": weight,
        "centroid_dtype": names.get("centroids", weight),
        "epilogue": names["epilogue"],
        "in_place": rows == IN_PLACE,
    }
    if weight in FORMATS and FORMATS[weight].quantised:
        values["model_dtype"] = names["dtype"]
    return Problem(**values)
