import dataclasses
import json
from typing import Any

import pytest

from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import MOST_TOKENS, PRESETS, Problem, parse_shape


def test_key_is_canonical_json(problem: Problem) -> None:
    assert problem.key == (
        '{"centroid_dtype":"bf16","epilogue":"argmax","hidden_size":64,"n_clusters":64,'
        '"n_probes":8,"n_tokens":1,"vocab_size":1024,"weight_dtype":"bf16"}'
    )
    assert Problem.from_json(json.loads(problem.key)) == problem


def test_every_field_changes_the_key(problem: Problem) -> None:
    changes: dict[str, Any] = {
        "vocab_size": 2048,
        "hidden_size": 128,
        "n_clusters": 32,
        "n_probes": 9,
        "n_tokens": 2,
        "weight_dtype": "fp16",
        "centroid_dtype": "fp32",
        "epilogue": "logits",
    }
    keys = {dataclasses.replace(problem, **{name: value}).key for name, value in changes.items()}
    assert len(keys | {problem.key}) == len(changes) + 1


def test_sizes_in_bytes(problem: Problem) -> None:
    assert problem.cluster_size == 16
    assert problem.centroid_bytes == 64 * 64 * 2
    assert problem.cluster_bytes == 16 * 64 * 2
    two = dataclasses.replace(problem, n_tokens=2, weight_dtype="fp32")
    distinct = 64 * (1 - (1 - 8 / 64) ** 2)  # 15 of 64 clusters: one in eight is probed twice
    assert two.distinct_clusters == distinct == 15
    assert two.minimum_bytes == two.read_bytes == 64 * 64 * 2 + 15 * 16 * 64 * 4
    logits = dataclasses.replace(two, epilogue="logits")
    assert logits.read_bytes == two.read_bytes
    assert logits.minimum_bytes == two.read_bytes + 2 * 1024 * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be a positive"),
        ({"hidden_size": True}, "hidden_size must be a positive"),
        ({"n_tokens": 1.0}, "n_tokens must be a positive"),
        (
            {"vocab_size": 64 * 10**400},
            "vocab_size must be at most 2147483647, not a whole number",
        ),
        ({"hidden_size": 2**31}, "hidden_size must be at most 2147483647, not 2147483648"),
        ({"n_tokens": 10**5000}, "n_tokens must be at most .*not a whole number of more than 50"),
        ({"n_clusters": -(10**5000)}, "n_clusters must be a positive whole number"),
        ({"n_clusters": "6" * 5000}, "n_clusters must be a positive whole number"),
        ({"model_dtype": []}, "are only for quantised weights"),
        ({"n_clusters": 63}, "not a multiple"),
        ({"n_probes": 65}, "more than n_clusters"),
        ({"weight_dtype": []}, "weight_dtype must be one of"),
        ({"weight_dtype": "int3"}, "weight_dtype must be one of"),
        ({"weight_dtype": "int4"}, "model_dtype must be one of bf16, fp16, fp32 if"),
        ({"model_dtype": "bf16"}, "are only for quantised weights"),
        ({"n_rescored": 8}, "are only for quantised weights"),
        ({"in_place": 1}, "in_place must be true or false"),
        ({"n_pinned": -1}, "n_pinned must be a whole number from 0 to 64"),
        ({"centroid_dtype": "BF16"}, "centroid_dtype must be one of"),
        ({"epilogue": "beam"}, "epilogue must be one of"),
    ],
)
def test_rejects_what_cannot_be_solved(
    problem: Problem, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(FlashtuneError, match=message):
        dataclasses.replace(problem, **change)


@pytest.mark.parametrize("data", [None, [], {}, {"vocab_size": 16}])
def test_from_json_wants_just_its_keys(data: Any, problem: Problem) -> None:
    with pytest.raises(FlashtuneError, match="must have the keys"):
        Problem.from_json(data)
    with pytest.raises(FlashtuneError, match="must have the keys"):
        Problem.from_json({**dataclasses.asdict(problem), "extra": 1})


def test_describe_names_what_differs(problem: Problem) -> None:
    assert problem.describe() == "1024x64 c64 p8"
    odd = dataclasses.replace(problem, n_tokens=4, weight_dtype="fp16")
    assert odd.describe() == "1024x64 c64 p8 t4 fp16 centroids bf16"
    assert dataclasses.replace(problem, epilogue="logits").describe() == "1024x64 c64 p8 logits"
    assert dataclasses.replace(problem, in_place=True).describe() == "1024x64 c64 p8 in place"


@pytest.mark.parametrize("name", PRESETS)
def test_presets_parse(name: str) -> None:
    vocab, hidden, clusters = PRESETS[name]
    problem = parse_shape(name.upper())
    assert (problem.vocab_size, problem.hidden_size, problem.n_clusters) == (
        vocab,
        hidden,
        clusters,
    )
    assert problem.cluster_size == 16


def test_shapes_from_pairs() -> None:
    text = "vocab=1024,hidden=64,clusters=64,probes=4,tokens=2,dtype=fp16"
    assert parse_shape(text) == Problem(
        vocab_size=1024,
        hidden_size=64,
        n_clusters=64,
        n_probes=4,
        n_tokens=2,
        weight_dtype="fp16",
        centroid_dtype="fp16",
    )
    assert parse_shape("qwen3-0.6b, probes=512").n_probes == 512
    assert parse_shape("qwen3-0.6b,epilogue=logits").epilogue == "logits"
    assert parse_shape("qwen3-0.6b,rows=in_place").in_place
    assert parse_shape("qwen3-0.6b,rows=in_order") == parse_shape("qwen3-0.6b")
    screened = parse_shape("qwen3-0.6b,weight=int4,centroids=int8,rescored=32,pinned=1,dtype=fp16")
    assert (screened.weight_dtype, screened.centroid_dtype) == ("int4", "int8")
    assert (screened.model_dtype, screened.n_rescored, screened.n_pinned) == ("fp16", 32, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "unknown shape"),
        ("qwen9", "unknown shape 'qwen9'"),
        ("qwen3-0.6b,row=3", "unknown key 'row'"),
        ("qwen3-0.6b,rows=3", "must be one of in_order, in_place, not '3'"),
        ("qwen3-0.6b,rows=in_place,weight=int8", "false if the weight is quantised"),
        ("qwen3-0.6b,probes", "must be a whole number"),
        ("qwen3-0.6b,probes=-1", "must be a whole number, not '-1'"),
        ("qwen3-0.6b,probes=0", "n_probes must be a positive"),
        ("qwen3-0.6b,dtype=int8", "model_dtype must be one of .* not 'int8'"),
        ("qwen3-0.6b,epilogue=beam", "epilogue must be one of argmax, logits, not 'beam'"),
        ("qwen3-0.6b,", "unknown key ''"),
        ("hidden=64", "lacks vocab, clusters"),
        ("vocab=1024,hidden=64,clusters=64,probes=65", "more than n_clusters"),
    ],
)
def test_bad_shapes_name_the_bad_part(text: str, message: str) -> None:
    with pytest.raises(FlashtuneError, match=message) as caught:
        parse_shape(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("digit", ["²", "٣", "1" * 5000])
def test_numbers_that_are_no_shape(digit: str) -> None:
    with pytest.raises(FlashtuneError, match=r"hidden in shape .* must be a whole number"):
        parse_shape(f"vocab=1024,hidden={digit},clusters=7")


def test_a_shape_has_as_many_tokens_as_a_head_decodes_at_once() -> None:
    assert parse_shape(f"qwen3-0.6b,tokens={MOST_TOKENS}").n_tokens == MOST_TOKENS == 32
    with pytest.raises(FlashtuneError, match=r"tokens=33 .* is more than 32"):
        parse_shape("qwen3-0.6b,tokens=33")


def test_younger_fields_leave_older_keys_as_they_were(problem: Problem) -> None:
    """Records of databases and tables that were written before must still be found."""
    assert "n_rescored" not in problem.key and "model_dtype" not in problem.data()
    assert Problem.from_json(problem.data()) == problem
    in_place = dataclasses.replace(problem, in_place=True)
    assert "in_place" not in problem.key and Problem.from_json(in_place.data()) == in_place
    screened = dataclasses.replace(
        problem, weight_dtype="int8", model_dtype="bf16", n_rescored=8, n_pinned=2
    )
    assert Problem.from_json(screened.data()) == screened
    assert screened.key != dataclasses.replace(screened, n_rescored=4).key
