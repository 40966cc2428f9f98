"""Mutated cost models, calibrations and checkpoints: one line, or what can be used."""

import copy
import gzip
import json
import os
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save

from flashtune.kernels.model_folder.clusters import ASSIGNMENTS, Origin
from flashtune.kernels.predict.cost_model import MODEL_FILE
from flashtune.tuner.cli.main import cli
from flashtune.tuner.clustering.clustered_folder import ClusterRequest, cluster_model
from flashtune.tuner.clustering.kmeans import BalancedKMeans
from flashtune.tuner.predict.calibration import SHIPPED, read_calibration
from flashtune.tuner.predict.fit import digest
from flashtune.tuning_db.errors import FlashtuneError
from hostile.mutation import Raw, dumped, mutate, spoil

COUNT = 40
SAMPLES = 300  # of a calibration: enough for intervals
TIMES = (1e-3, 1e12, 1e-9, 0, 5e-324, 1e300, Raw("1e999"), None, True)
COUNTS = (0, 1, 2**31 - 1, 2**31, -1, 1.5, True, "7", None)
NUMBERS = (1e-7, 1e-6, 1e6, 1e7, 0, -1, 5e-324, 1e308, Raw("1e999"), True, "1")


def check(model: Path, calibration: Path) -> int:
    """What `model check` ends with: its verdict, or one line."""
    words = ["model", "check", "--json", "--cost-model", model, "--calibration", calibration]
    found = CliRunner().invoke(cli, [str(each) for each in words])
    assert found.exception is None or isinstance(found.exception, SystemExit)
    errors = [line for line in found.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == (found.exit_code == 2)
    assert all(line.isprintable() for line in found.output.splitlines())
    if found.exit_code != 2:
        json.loads(found.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    return found.exit_code


def fitted_to(calibration: Path) -> dict[str, Any]:
    """The model that ships, which says that it was fitted to something else."""
    data: dict[str, Any] = json.loads(Path(str(MODEL_FILE)).read_text("utf-8"))
    return {**data, "calibration": digest(read_calibration(calibration))}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = json.loads(gzip.decompress(Path(str(SHIPPED)).read_bytes()))
    data["samples"] = random.Random(1).sample(data["samples"], SAMPLES)
    path = tmp_path_factory.mktemp("measured") / "a.json.gz"
    path.write_bytes(gzip.compress(json.dumps(data).encode()))
    return path


def test_mutated_cost_models_are_refused_or_checked(tmp_path: Path, measured: Path) -> None:
    r, path, ends = random.Random(11), tmp_path / "model.json", set()
    good = fitted_to(measured)
    for number in range(COUNT):
        data = copy.deepcopy(good)
        model = data["model"] if number % 2 else r.choice(data["held_out"])
        if number % 5 == 0:
            path.write_bytes(spoil(r, dumped(data)))
        elif number % 5 == 1:
            mutate(r, data)
        elif number % 5 == 2:
            mutate(r, model)
        elif number % 5 == 3:
            model["constants"][r.choice(list(model["constants"]))] = r.choice(NUMBERS)
        else:
            intervals = data["model"]["intervals"]
            intervals[r.choice(list(intervals))] = [r.choice(NUMBERS) for _ in range(2)]
        if number % 5:
            path.write_bytes(dumped(data))
        ends.add(check(path, measured))
    assert 2 in ends and len(ends) > 1  # its verdict is 0 or 1


def test_mutated_calibrations_are_refused_or_checked(tmp_path: Path, measured: Path) -> None:
    """With a model that says it was fitted to just what is read."""
    r, path, model = random.Random(12), tmp_path / "a.json.gz", tmp_path / "model.json"
    good, read = json.loads(gzip.decompress(measured.read_bytes())), 0
    for number in range(COUNT):
        data = copy.deepcopy(good)
        row = r.choice(data["samples"])
        if number % 4 == 0:
            row["median_us"] = r.choice(TIMES)
        elif number % 4 == 1:
            row["uses"][0] = ["score", *(r.choice(COUNTS) for _ in range(5))]
        else:
            mutate(r, row if number % 4 == 2 else data)
        packed = gzip.compress(dumped(data))
        path.write_bytes(packed if number % 7 else spoil(r, packed))
        try:
            model.write_text(json.dumps(fitted_to(path)))
        except FlashtuneError as error:
            assert str(error).isprintable()
            continue
        read += 1
        check(model, path)
    assert COUNT / 20 < read < COUNT


@pytest.mark.parametrize(
    "held_out",
    [
        lambda fits: [],
        lambda fits: fits[1:],
        lambda fits: [*fits, {**fits[0], "shapes": []}],
        lambda fits: [*fits, {**fits[0], "shapes": ["another", "gemma-3-1b"]}],
        lambda fits: [*fits, {**fits[0], "shapes": [each["shapes"][0] for each in fits[:6]]}],
    ],
)
def test_a_fit_of_other_shapes_is_of_another_calibration(
    tmp_path: Path, measured: Path, held_out: Any
) -> None:
    path, data = tmp_path / "model.json", fitted_to(measured)
    path.write_text(json.dumps({**data, "held_out": held_out(data["held_out"])}))
    assert check(path, measured) == 2


@pytest.mark.parametrize(
    "change",
    [
        *({"uses": [["score", 1, 1, 1, 1, value]]} for value in (2**31, -1, 1.5, True, "7")),
        {"uses": [["score", 0, 1, 1, 1, 1]]}, {"uses": [["score", 1, 0, 1, 1, 1]]},
        {"uses": [["score", 1, 1, 1, 1]]}, {"uses": [[7, 1, 1, 1, 1, 1]]}, {"uses": {}},
        {"outcome": "crash", "median_us": None}, {"outcome": "said"}, {"median_us": None},
        {"problem": -1}, {"problem": 10**6}, {"problem": True}, {"more": 1},
    ],
)  # fmt: skip
def test_a_sample_that_is_none_is_refused(
    tmp_path: Path, measured: Path, change: dict[str, Any]
) -> None:
    path, data = tmp_path / "a.json.gz", json.loads(gzip.decompress(measured.read_bytes()))
    data["samples"][3] |= change
    path.write_bytes(gzip.compress(json.dumps(data).encode()))
    with pytest.raises(FlashtuneError, match="flashtune model calibrate"):
        read_calibration(path)


def test_clusters_of_other_sizes_are_not_gone_on_from() -> None:
    kmeans = BalancedKMeans(torch.randn(64, 16), n_clusters=8)
    good = torch.arange(64) % 8
    for wrong in (torch.zeros_like(good), good.clamp(min=1), good[:63], good - 1, good.int()):
        with pytest.raises(FlashtuneError, match="differ in size"):
            kmeans.resume(wrong, 1)
    kmeans.resume(good, 1)
    assert kmeans.assignments is not None


def test_a_checkpoint_is_of_the_same_clustering_or_refused(tmp_path: Path) -> None:
    r, source, out = random.Random(13), tmp_path / "model", tmp_path / "made"
    weight = torch.randn(64, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    source.mkdir()
    config = {"hidden_size": 16, "vocab_size": 64, "tie_word_embeddings": False}
    (source / "config.json").write_text(json.dumps(config))
    (source / "model.safetensors").write_bytes(save({"lm_head.weight": weight}))
    good = torch.arange(64) % 8
    wrong = (
        torch.zeros_like(good), good - 1, good + 1, good * 2**40, good[:63], good[:0],
        good.float(), good.bool(), good.int(), good.view(8, 8),
    )  # fmt: skip
    path, made = tmp_path / "made.checkpoint", 0
    request = ClusterRequest(model=str(source), out=out, n_clusters=8, n_probes=2, iterations=2)
    for number in range(COUNT):
        run = {"origin": asdict(Origin.of(weight)), "n_clusters": 8, "seed": 0}
        said: dict[str, Any] = {"run": run, "iteration": 1}
        clusters = r.choice(wrong) if number % 3 == 0 else good
        if number % 3 == 1:
            mutate(r, said)
        text = dumped(said).decode("utf-8", "replace")
        text = text if number % 8 else r.choice(("[]", "null", "", "7", "[" * 3000))
        data = save({ASSIGNMENTS: clusters.contiguous()}, {"flashtune": text})
        if number == 5:
            os.mkfifo(path)
        else:
            path.write_bytes(data if number % 7 else spoil(r, data))
        try:
            cluster_model(request)
        except FlashtuneError as error:
            assert str(error).isprintable()
            assert sorted(each.name for each in tmp_path.iterdir()) == ["made.checkpoint", "model"]
            path.unlink()
        else:
            made += 1
            for each in sorted(out.rglob("*"), reverse=True):
                each.rmdir() if each.is_dir() else each.unlink()
            out.rmdir()
    assert COUNT / 20 < made < COUNT
