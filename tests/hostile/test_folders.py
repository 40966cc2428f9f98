"""Mutated model folders: one line, or a head; nothing outside the folder is read."""

import copy
import json
import random
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from flashtune.kernels.head import FlashHead
from flashtune.kernels.model_folder.clusters import Clusters, Origin, write_clusters
from flashtune.kernels.model_folder.folder import read_model
from flashtune.tuner.clustering.clustered_folder import ClusterRequest, cluster_model
from flashtune.tuning_db.errors import FlashtuneError
from hostile.mutation import dumped, mutate, spoil

COUNT, CLUSTERED = 150, 25
VOCAB, WIDTH, N_CLUSTERS = 64, 16, 8
CLUSTERING = "flash_head_assets/clustering_cache.safetensors"
INDEX = "model.safetensors.index.json"
OUTSIDE = 0.1234  # every number of the files that lie outside
CONFIG: dict[str, Any] = {
    "architectures": ["X"],
    "hidden_size": WIDTH,
    "vocab_size": VOCAB,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
    "n_probes": 2,
    "flash_head_cache_dir": "flash_head_assets",
    "flash_head_special_token_ids": [3, 5],
    "flash_head_centroids": "mean_rows",
}
NAMES = ("../outside", "{}/outside", "flash_head_assets/../../outside", "/", "..", "~", "link",
         "/proc/self", "a" * 300, "a/" * 3000, "\0", "\ud800", "", None, 7, [], {})  # fmt: skip


@pytest.fixture(autouse=True)
def plain_torch(without_kernels: None) -> None:
    """A CPU without kernels, so that nothing is compiled."""


def write(folder: Path, path: Path) -> None:
    """A good folder, its weights in one file by an index, and a good one outside."""
    shutil.rmtree(folder, ignore_errors=True)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(VOCAB, WIDTH, generator=generator).bfloat16()
    centroids = torch.randn(N_CLUSTERS, WIDTH, generator=generator).bfloat16()
    if path != folder:
        weight, centroids = (torch.full_like(each, OUTSIDE) for each in (weight, centroids))
    path.joinpath(CLUSTERING).parent.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(CONFIG))
    (path / "weights.safetensors").write_bytes(save({"lm_head.weight": weight}))
    (path / INDEX).write_text(
        json.dumps({"weight_map": {"lm_head.weight": "weights.safetensors"}})
    )
    clusters = Clusters(
        centroids=centroids,
        assignments=torch.arange(VOCAB) % N_CLUSTERS,
        origin=Origin.of(weight) if path == folder else None,
    )
    write_clusters(path / CLUSTERING, clusters)


def mutate_folder(r: random.Random, folder: Path, outside: Path) -> None:
    config, index = copy.deepcopy(CONFIG), json.loads((folder / INDEX).read_text())
    way = r.randrange(7)
    name = r.choice(NAMES)
    name = name.format(outside.parent) if isinstance(name, str) else name
    if way == 0:
        config["flash_head_cache_dir"] = name
    elif way == 1:
        file = f"{name}/weights.safetensors" if isinstance(name, str) else name
        index["weight_map"]["lm_head.weight"] = file
    elif way == 2:
        mutate(r, config)
    elif way == 3:
        mutate(r, index)
    elif way == 4:
        path = folder / r.choice((CLUSTERING, "weights.safetensors", "config.json", INDEX))
        path.write_bytes(spoil(r, path.read_bytes()))
        return
    elif way == 5:
        path = folder / r.choice((CLUSTERING, "weights.safetensors"))
        path.write_bytes(with_header(r, path.read_bytes()))
    else:
        path = folder / r.choice((CLUSTERING, "weights.safetensors", "flash_head_assets"))
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        path.symlink_to(outside / path.relative_to(folder))
    (folder / "config.json").write_bytes(dumped(config))
    (folder / INDEX).write_bytes(dumped(index))


def with_header(r: random.Random, data: bytes) -> bytes:
    """A safetensors file with a header that is changed in one place."""
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    mutate(r, header)
    text = dumped(header)
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def test_mutated_folders_give_one_line_or_a_head(tmp_path: Path) -> None:
    r, folder, outside, made = random.Random(7), tmp_path / "model", tmp_path / "outside", 0
    write(folder, outside)
    hidden = torch.randn(2, WIDTH).bfloat16()
    for _ in range(COUNT):
        write(folder, folder)
        mutate_folder(r, folder, outside)
        try:
            read_model(str(folder))
            head = FlashHead.from_pretrained(folder, device="cpu", tune="never")
        except FlashtuneError as error:
            assert str(error).isprintable()
            continue
        made += 1
        assert ((head(hidden) >= 0) & (head(hidden) < VOCAB)).all()
        for tensor in (head.weight, head.centroids):
            assert not torch.allclose(tensor.float(), torch.tensor(OUTSIDE), atol=1e-3)
    assert COUNT / 20 < made < COUNT


def test_mutated_folders_are_clustered_or_refused(tmp_path: Path) -> None:
    r, folder, outside = random.Random(8), tmp_path / "model", tmp_path / "outside"
    write(folder, outside)
    held = {path: path.read_bytes() for path in outside.rglob("*") if path.is_file()}
    for number in range(CLUSTERED):
        write(folder, folder)
        mutate_folder(r, folder, outside)
        out = tmp_path / f"made-{number}"
        request = ClusterRequest(
            model=str(folder),
            out=out,
            n_clusters=8,
            n_probes=2,
            iterations=1,
            link=number % 2 == 0,
        )
        try:
            cluster_model(request)
        except FlashtuneError as error:
            assert str(error).isprintable()
            assert not out.exists()
        assert all(path.read_bytes() == data for path, data in held.items())
        copies = (path.read_bytes() for path in out.rglob("*.safetensors"))
        assert not set(held.values()) & set(copies)
