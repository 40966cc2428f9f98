"""FlashHead model folders: what is read from where, and what is said of those that are broken."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flashtune.kernels.head import FlashHead
from flashtune.kernels.integrations.folder_head import flash_head_of
from flashtune.kernels.model_folder.clusters import Clusters, Origin, read_clusters, write_clusters
from flashtune.kernels.model_folder.folder import ModelFolder
from flashtune.kernels.model_folder.head_weight import EMBEDDINGS, HEADS
from flashtune.tuning_db.errors import FlashtuneError

VOCAB, WIDTH, CLUSTERS = 60, 8, 12
FILE = "flash_head_assets/clustering_cache.safetensors"
Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def plain_torch(without_kernels: None) -> None:
    """A CPU without kernels, so that nothing is compiled."""


def weight(vocab: int = VOCAB, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(vocab, WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assets(vocab: int = VOCAB, **changes: torch.Tensor) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(vocab, generator=generator)
    return {
        "centroids": torch.randn(1, 1, WIDTH, CLUSTERS, generator=generator),
        "cluster_assignments": order % CLUSTERS,
        **changes,
    }


CONFIG = {
    "architectures": ["FlashHeadLlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": WIDTH,
    "vocab_size": VOCAB,
    "dtype": "float32",
    "flash_head_cache_dir": "flash_head_assets",
    "n_probes": 3,
}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """A model's folder: `write(config, assets=…, tensors=…)`."""

    def make(
        config: dict[str, Any] | None = None,
        *,
        clusters: dict[str, torch.Tensor] | None = None,
        tensors: dict[str, torch.Tensor] | None = None,
        shards: int = 1,
    ) -> Path:
        folder = tmp_path / "model"
        (folder / "flash_head_assets").mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({**CONFIG, **(config or {})}))
        save_file(assets() if clusters is None else clusters, folder / FILE)
        held = {"lm_head.weight": weight()} if tensors is None else tensors
        held = {**held, "model.norm.weight": torch.ones(WIDTH)}
        if shards == 1:
            save_file(held, folder / "model.safetensors")
            return folder
        files = {}
        for number, (name, tensor) in enumerate(held.items()):
            files[name] = f"model-{number}.safetensors"
            save_file({name: tensor}, folder / files[name])
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
        return folder

    return make


def refused(folder: Path, **options: Any) -> str:
    with pytest.raises(FlashtuneError) as caught:
        FlashHead.from_pretrained(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def expected(hidden: torch.Tensor, *, unit: bool = True) -> list[int]:
    """The tokens of three probes, with centroids of unit length or as they are in the file."""
    held = assets()
    centroids, clusters = held["centroids"][0, 0].T, held["cluster_assignments"]
    if unit:
        centroids = centroids / centroids.norm(dim=1, keepdim=True)
    probed = (hidden @ centroids.T).topk(3, dim=1).indices
    candidate = (clusters[None, :, None] == probed[:, None, :]).any(dim=2)
    return (hidden @ weight().T).masked_fill(~candidate, -torch.inf).argmax(dim=1).tolist()


HIDDEN = torch.randn(32, WIDTH, generator=torch.Generator().manual_seed(9))


class TestReading:
    @pytest.mark.parametrize("shards", [1, 2])
    @pytest.mark.parametrize("name", [*HEADS, *EMBEDDINGS])
    def test_the_head_is_found_under_its_names(self, write: Write, name: str, shards: int) -> None:
        folder = write({"tie_word_embeddings": True}, tensors={name: weight()}, shards=shards)
        assert FlashHead.from_pretrained(folder)(HIDDEN).tolist() == expected(HIDDEN)

    @pytest.mark.parametrize("known", [True, False])
    def test_the_head_is_found_without_transformers(
        self, write: Write, monkeypatch: pytest.MonkeyPatch, known: bool
    ) -> None:
        config = {"tie_word_embeddings": True, "model_type": "llama" if known else "nobody-s"}
        folder = write(config, tensors={"wte.weight": weight()})
        if known:
            monkeypatch.setitem(sys.modules, "transformers", None)
        assert FlashHead.from_pretrained(folder)(HIDDEN).tolist() == expected(HIDDEN)

    def test_the_width_is_the_tensors(self, write: Write) -> None:
        """Not `hidden_size`, which models call otherwise, or which means another width."""
        for wrong in (None, 99):
            folder = write({"hidden_size": wrong})
            assert FlashHead.from_pretrained(folder)(HIDDEN).tolist() == expected(HIDDEN)
            assert ModelFolder.open(folder).problem().hidden_size == WIDTH
            shutil.rmtree(folder)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_a_dtype_that_the_config_lacks_is_the_stored_one(
        self, write: Write, dtype: torch.dtype
    ) -> None:
        folder = write({"dtype": None}, tensors={"lm_head.weight": weight(dtype=dtype)})
        head = FlashHead.from_pretrained(folder)
        assert head.weight.dtype is head.centroids.dtype is dtype

    def test_a_single_file_goes_before_an_index(self, write: Write) -> None:
        """As in transformers: an index may be left of the shards that there were before."""
        folder = write()
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"lm_head.weight": "gone.safetensors"}}))
        assert FlashHead.from_pretrained(folder)(HIDDEN).tolist() == expected(HIDDEN)

    def test_no_file_is_written_to(self, write: Write) -> None:
        """The weight is permuted in memory that may be the file's own, mapped."""
        folder = write({"flash_head_special_token_ids": [3]})
        before = {path: path.read_bytes() for path in folder.rglob("*.safetensors")}
        head = FlashHead.from_pretrained(folder)
        assert not torch.equal(head.weight, weight())
        assert {path: path.read_bytes() for path in folder.rglob("*.safetensors")} == before

    def test_a_head_of_its_own_goes_before_the_embedding(self, write: Write) -> None:
        tensors = {"model.embed_tokens.weight": weight(seed=5), "lm_head.weight": weight()}
        head = FlashHead.from_pretrained(str(write(tensors=tensors)))
        assert head(HIDDEN).tolist() == expected(HIDDEN)

    def test_whether_to_race_is_for_the_caller_to_say(self, write: Write) -> None:
        folder = write()
        assert FlashHead.from_pretrained(folder).tune == "race"
        assert FlashHead.from_pretrained(folder, tune="never").tune == "never"

    def test_a_nested_text_config_counts(self, write: Write) -> None:
        text = {"hidden_size": WIDTH, "dtype": "float32"}
        folder = write({"hidden_size": 99, "dtype": None, "text_config": text})
        assert FlashHead.from_pretrained(folder)(HIDDEN).tolist() == expected(HIDDEN)

    def test_centroids_of_two_dimensions_and_small_assignments(self, write: Write) -> None:
        held = assets()
        clusters = {
            "centroids": held["centroids"][0, 0].contiguous(),
            "cluster_assignments": held["cluster_assignments"].to(torch.int32),
        }
        assert FlashHead.from_pretrained(write(clusters=clusters))(HIDDEN).tolist() == expected(
            HIDDEN
        )

    def test_probes_are_the_configs_unless_given(self, write: Write) -> None:
        folder = write()
        assert FlashHead.from_pretrained(folder).n_probes == 3
        assert FlashHead.from_pretrained(folder, n_probes=7).n_probes == 7
        assert "n_probes 13 is more than n_clusters 12" in refused(folder, n_probes=13)

    def test_probes_that_the_config_lacks_are_a_sixteenth(self, write: Write) -> None:
        clusters = assets(
            centroids=torch.randn(WIDTH, 36), cluster_assignments=torch.arange(VOCAB) % 36
        )
        folder = write({"n_probes": None}, clusters=clusters)
        assert FlashHead.from_pretrained(folder).n_probes == 2

    def test_the_head_has_the_configs_dtype(self, write: Write) -> None:
        bf16 = {name: tensor.bfloat16() for name, tensor in (("lm_head.weight", weight()),)}
        folder = write({"dtype": "float16"}, tensors=bf16)
        head = FlashHead.from_pretrained(folder)
        assert head.weight.dtype is head.centroids.dtype is torch.float16
        assert head.explain()["problem"]["centroid_dtype"] == "fp16"

    def test_special_tokens_are_the_configs(self, write: Write) -> None:
        folder = write({"flash_head_special_token_ids": [50, 4]})
        assert FlashHead.from_pretrained(folder).special_token_ids == (4, 50)

    @pytest.mark.parametrize(
        ("config", "usual", "special"),
        [
            ({"eos_token_id": 5}, None, (5,)),
            ({"eos_token_id": [5, 9]}, {"eos_token_id": [9, 3]}, (3, 5, 9)),
            ({"eos_token_id": None}, {"eos_token_id": 7}, (7,)),
            ({"text_config": {"eos_token_id": 8}}, None, (8,)),
            ({"eos_token_id": 60}, {"eos_token_id": -1}, ()),
            ({"eos_token_id": 5, "flash_head_special_token_ids": [4]}, None, (4,)),
            ({"eos_token_id": 5, "flash_head_special_token_ids": []}, None, ()),
        ],
    )
    def test_end_tokens_are_special_unless_the_config_lists_others(
        self,
        write: Write,
        config: dict[str, Any],
        usual: dict[str, Any] | None,
        special: tuple[int, ...],
    ) -> None:
        folder = write({**config, "n_probes": 1})
        if usual is not None:
            (folder / "generation_config.json").write_text(json.dumps(usual))
        head = FlashHead.from_pretrained(folder)
        assert head.special_token_ids == special
        assert flash_head_of(ModelFolder.open(folder), weight()).special_token_ids == special
        assert bool((head.logits(HIDDEN)[:, list(special)] != -1e4).all())

    def test_many_special_tokens_are_read_without_permuting_in_place(self, write: Write) -> None:
        """Clusters are added for those of 12 clusters, and rows with them."""
        head = FlashHead.from_pretrained(
            write({"flash_head_special_token_ids": [*range(0, 60, 3)]})
        )
        assert bool((head.logits(HIDDEN)[:, ::3] != -1e4).all())

    @pytest.mark.parametrize(
        ("named", "given", "kept"),
        [
            ("int8", None, "int8:8"),
            ("int8", "int4/int8", "int4/int8:8"),
            ("int8", "none", "None"),
            (None, "int4", "int4:32"),
            ("none", None, "None"),
            (None, None, "None"),
        ],
    )
    def test_the_screen_is_the_configs_unless_given(
        self, write: Write, named: str | None, given: str | None, kept: str
    ) -> None:
        folder = write({"flash_head_screen": named, "n_probes": CLUSTERS})
        head = FlashHead.from_pretrained(folder, screen=given)
        assert str(head.screen) == kept
        applied = flash_head_of(ModelFolder.open(folder), weight(), screen=given)
        assert str(applied.screen) == kept
        assert head(HIDDEN).tolist() == applied(HIDDEN).tolist()
        assert head(HIDDEN).tolist() == (HIDDEN @ weight().T).argmax(dim=1).tolist()

    @pytest.mark.parametrize(
        ("named", "given", "screen", "found"),
        [
            ("in_place", None, None, "in_place"),
            ("in_place", "in_order", None, "in_order"),
            (None, "in_place", None, "in_place"),
            (None, None, None, "in_order"),
            ("in_place", None, "int8", "in_order"),  # a screen has rows of its own
        ],
    )
    def test_rows_lie_where_the_config_says_unless_given(
        self, write: Write, named: str | None, given: str | None, screen: str | None, found: str
    ) -> None:
        folder = write({"flash_head_rows": named})
        head = FlashHead.from_pretrained(folder, rows=given, screen=screen)
        applied = flash_head_of(ModelFolder.open(folder), weight(), rows=given, screen=screen)
        assert (head.rows, applied.rows) == (found, found)
        assert head(HIDDEN).tolist() == applied(HIDDEN).tolist() == expected(HIDDEN)

    def test_a_vocabulary_that_clusters_do_not_divide(self, write: Write) -> None:
        folder = write(clusters=assets(VOCAB - 5), tensors={"lm_head.weight": weight()[:-5]})
        head = FlashHead.from_pretrained(folder, n_probes=CLUSTERS)
        assert ModelFolder.open(folder).problem().vocab_size == VOCAB
        assert head(HIDDEN).tolist() == (HIDDEN @ weight()[:-5].T).argmax(dim=1).tolist()
        assert head(-HIDDEN).tolist() == (-HIDDEN @ weight()[:-5].T).argmax(dim=1).tolist()

    def test_centroids_are_directions(self, write: Write) -> None:
        """As the method scores them: whatever their length, in whatever layout and dtype."""
        longer = assets(centroids=assets()["centroids"] * torch.linspace(0.1, 30, CLUSTERS))
        folder = write(clusters=longer)
        assert FlashHead.from_pretrained(folder)(HIDDEN).tolist() == expected(HIDDEN)
        assert expected(HIDDEN) != expected(HIDDEN, unit=False)
        applied = flash_head_of(ModelFolder.open(folder), weight())
        assert applied(HIDDEN).tolist() == expected(HIDDEN)

    @pytest.mark.parametrize("ours", ["config", "metadata"])
    def test_centroids_of_our_own_folders_are_mean_rows(self, write: Write, ours: str) -> None:
        folder = write({"flash_head_centroids": "mean_rows"} if ours == "config" else {})
        if ours == "metadata":  # of folders that were made before the config said so
            clusters = replace(read_clusters(folder / FILE), origin=Origin.of(weight()))
            write_clusters(folder / FILE, clusters)
        assert FlashHead.from_pretrained(folder)(HIDDEN).tolist() == expected(HIDDEN, unit=False)
        applied = flash_head_of(ModelFolder.open(folder), weight())
        assert applied(HIDDEN).tolist() == expected(HIDDEN, unit=False)

    def test_a_centroid_of_no_length_stays_zero(self, write: Write) -> None:
        centroids = assets()["centroids"].clone()
        centroids[..., 3] = 0
        head = FlashHead.from_pretrained(write(clusters=assets(centroids=centroids)))
        assert head.centroids[3].abs().sum() == 0

    def test_a_repository_in_the_cache_is_a_folder(
        self, write: Write, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hub = pytest.importorskip("huggingface_hub")
        folder, asked = write(), []

        def snapshot(*names: str, **options: Any) -> str:
            asked.append((names, options))
            return str(folder)

        monkeypatch.setattr(hub, "snapshot_download", snapshot)
        head = FlashHead.from_pretrained("some-one/a.model", revision="v1")
        assert head(HIDDEN).tolist() == expected(HIDDEN)
        assert asked == [
            (("some-one/a.model",), {"revision": "v1", "local_files_only": True}),
        ]


def _spoiled(value: float) -> torch.Tensor:
    centroids = assets()["centroids"].clone()
    centroids[0, 0, 2, 5] = value
    return centroids


class TestRefusals:
    @pytest.mark.parametrize(
        ("clusters", "said"),
        [
            ({"centroids": torch.zeros(WIDTH, CLUSTERS)}, "but has ['centroids']"),
            (assets(centroids=torch.zeros(2, 1, WIDTH, CLUSTERS)), "shape [2, 1, 8, 12]"),
            (assets(centroids=torch.zeros(WIDTH, 0)), "centroids has shape [8, 0]"),
            (assets(cluster_assignments=torch.zeros(0).long()), "assignments has shape [0]"),
            (assets(centroids=torch.zeros(CLUSTERS, WIDTH)), "centroids have 12 columns"),
            (
                assets(centroids=torch.zeros(WIDTH, CLUSTERS).int()),
                "centroids is torch.int32, not bf16, fp16, fp32",
            ),
            (
                assets(centroids=_spoiled(float("nan"))),
                "centroids contains NaN or infinity in 1 of",
            ),
            (assets(centroids=_spoiled(float("-inf"))), "NaN or infinity in 1 of 12 clusters"),
            (
                assets(cluster_assignments=torch.zeros(VOCAB, 1).long()),
                "cluster_assignments has shape [60, 1]",
            ),
            (
                assets(cluster_assignments=torch.zeros(VOCAB)),
                "cluster_assignments is torch.float32, not whole numbers",
            ),
            (
                assets(cluster_assignments=torch.arange(VOCAB) % CLUSTERS + 1),
                "has clusters from 1 to 12, but centroids has clusters 0 to 11",
            ),
            (
                assets(cluster_assignments=torch.arange(VOCAB) // 6),
                "equal sizes (5 tokens, or a little less), but they have 0 to 6",
            ),
            (
                assets(cluster_assignments=torch.arange(VOCAB - 1) % CLUSTERS),
                "has 59 tokens, but lm_head.weight in model.safetensors has 60 rows",
            ),
            (
                assets(cluster_assignments=torch.arange(2 * VOCAB) % CLUSTERS),
                "cluster_assignments has 120 tokens, but lm_head.weight in model.safetensors",
            ),
        ],
    )
    def test_clusters(self, write: Write, clusters: dict[str, torch.Tensor], said: str) -> None:
        folder = write(clusters=clusters)
        error = refused(folder)
        assert str(folder / FILE) in error
        assert said in error

    @pytest.mark.parametrize(
        ("tensors", "file", "said"),
        [
            ({}, "", "looked for lm_head.weight"),
            ({"lm_head.weight": torch.ones(VOCAB)}, "model.safetensors", "shape [60], not [vocab"),
            (
                {"lm_head.weight": torch.ones(VOCAB, 4)},
                "",
                "have 8 columns, but lm_head.weight in model.safetensors has shape [60, 4]",
            ),
            (
                {"lm_head.weight": torch.ones(VOCAB, WIDTH).to(torch.float8_e4m3fn)},
                "model.safetensors",
                "lm_head.weight is fp8 with no scales beside it",
            ),
            (
                {"lm_head.weight": weight(), "lm_head.bias": torch.ones(VOCAB)},
                "model.safetensors",
                "the head has a bias, lm_head.bias",
            ),
            (
                {"lm_head.weight": torch.full((VOCAB, WIDTH), float("inf"))},
                "model.safetensors",
                "lm_head.weight contains NaN or infinity",
            ),
        ],
    )
    def test_weights(
        self, write: Write, tensors: dict[str, torch.Tensor], file: str, said: str
    ) -> None:
        folder = write(tensors=tensors)
        error = refused(folder)
        assert str(folder / file) in error
        assert said in error

    @pytest.mark.parametrize(
        ("config", "said"),
        [
            ({"dtype": "int8"}, "dtype 'int8' must be one of"),
            ({"dtype": ["bfloat16"]}, "must be one of"),
            ({"dtype": {"a": 1}}, "must be one of"),
            ({"n_probes": "many"}, "n_probes must be a positive whole number, not 'many'"),
            ({"flash_head_centroids": "medians"}, "must be mean_rows or absent, not 'medians'"),
            ({"n_probes": 0}, "n_probes must be a positive whole number"),
            (
                {"flash_head_screen": "8 bits"},
                "flash_head_screen: a screen must have the form int8",
            ),
            ({"flash_head_screen": 8}, "a Screen or a string such as int8, not 8"),
            ({"flash_head_rows": "here"}, "flash_head_rows must be one of in_order, in_place"),
            ({"flash_head_special_token_ids": 3}, "must be a list of token ids, not 3"),
            ({"flash_head_special_token_ids": ["</s>"]}, "must be a list of token ids"),
            ({"flash_head_special_token_ids": [60]}, "whole numbers from 0 to 59, not 60"),
            (
                {"flash_head_special_token_ids": [True]},
                "flash_head_special_token_ids must be a list of token ids",
            ),
        ],
    )
    def test_configs(self, write: Write, config: dict[str, Any], said: str) -> None:
        folder = write(config)
        error = refused(folder)
        assert str(folder / "config.json") in error
        assert said in error

    def test_an_embedding_that_is_not_tied_is_no_head(self, write: Write) -> None:
        tensors = {"model.embed_tokens.weight": weight()}
        folder = write({"tie_word_embeddings": False}, tensors=tensors)
        assert "(tie_word_embeddings is false): looked for lm_head.weight" in refused(folder)

    @pytest.mark.parametrize(
        ("file", "said"),
        [
            ("config.json", "No such file or directory: give a model folder"),
            (FILE, "no such file: this is not a FlashHead model"),
            ("model.safetensors", "has neither model.safetensors nor model.safetensors.index"),
        ],
    )
    def test_files_that_are_not_there(self, write: Write, file: str, said: str) -> None:
        folder = write()
        (folder / file).unlink()
        assert said in refused(folder)

    @pytest.mark.parametrize("file", [FILE, "model.safetensors"])
    @pytest.mark.parametrize("size", [0, 4, 200, -4])
    def test_files_that_are_cut_short(self, write: Write, file: str, size: int) -> None:
        folder = write()
        path = folder / file
        path.write_bytes(path.read_bytes()[:size])
        assert f"{path}: " in refused(folder)
        assert "is not a complete safetensors file" in refused(folder)

    @pytest.mark.parametrize("file", ["config.json", FILE, "model.safetensors"])
    def test_files_that_are_folders(self, write: Write, file: str) -> None:
        folder = write()
        (folder / file).unlink()
        (folder / file).mkdir()
        assert str(folder / file) in refused(folder)

    @pytest.mark.parametrize("text", ["[]", '{"weight_map": 3}', "{}", "null", "7"])
    def test_an_index_that_is_none(self, write: Write, text: str) -> None:
        folder = write(shards=2)
        index = folder / "model.safetensors.index.json"
        index.write_text(text)
        assert f"{index}: must be JSON with a weight_map" in refused(folder)

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("{", "not JSON"),
            ('{"a":' * 10**5, "nested more than"),
            ('{"a": "\\ud800"}', "half a character"),
        ],
    )
    @pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
    def test_json_that_is_none(self, write: Write, name: str, text: str, said: str) -> None:
        folder = write(shards=2)
        (folder / name).write_text(text)
        assert f"{folder / name}: {said}" in refused(folder)

    @pytest.mark.parametrize(
        "name", [None, 7, [], {}, "x\0y", "../other", "/etc/passwd", "x" * 300]
    )
    def test_names_that_lead_nowhere_of_the_model_s(
        self, write: Write, tmp_path: Path, name: object
    ) -> None:
        folder = write({"flash_head_cache_dir": name}, shards=2)
        said = ("cannot be the name", "leads out of the model's folder", "no such file")
        assert any(each in refused(folder) for each in said)
        shutil.rmtree(folder)
        folder = write(shards=2)
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
        assert any(each in refused(folder) for each in (*said, "name too long"))

    @pytest.mark.parametrize("file", ["config.json", FILE, "model.safetensors"])
    @pytest.mark.parametrize("whole", [False, True])
    def test_links_out_of_the_folder(
        self, write: Write, tmp_path: Path, file: str, whole: bool
    ) -> None:
        """What a folder of others names is read only if it is theirs."""
        folder, other = write(), tmp_path / "other"
        path = (folder / file).parent if whole and file == FILE else folder / file
        path.rename(other)
        path.symlink_to(other)
        assert "leads out of the model's folder" in refused(folder)
        path.unlink()
        inner = folder / "inner"
        other.rename(inner)
        path.symlink_to(inner)
        assert FlashHead.from_pretrained(folder)(HIDDEN).tolist() == expected(HIDDEN)

    def test_a_snapshot_links_to_its_repository_s_blobs(
        self, write: Write, tmp_path: Path
    ) -> None:
        folder = write()
        blobs = tmp_path / "hub" / "models--a--b" / "blobs"
        snapshot = blobs.parent / "snapshots" / "c0ffee"
        snapshot.parent.mkdir(parents=True)
        blobs.mkdir()
        folder.rename(snapshot)
        for number, path in enumerate([each for each in snapshot.rglob("*") if each.is_file()]):
            path.rename(blobs / str(number))
            path.symlink_to(blobs / str(number))
        assert FlashHead.from_pretrained(snapshot)(HIDDEN).tolist() == expected(HIDDEN)
        (tmp_path / "link").symlink_to(snapshot)
        FlashHead.from_pretrained(tmp_path / "link")
        blobs.rename(tmp_path / "blobs")
        blobs.symlink_to(tmp_path / "blobs")
        assert "leads out of the model's folder" in refused(snapshot)

    @pytest.mark.parametrize("file", ["config.json", FILE, "model.safetensors"])
    @pytest.mark.parametrize("kind", ["pipe", "device"])
    def test_pipes_and_devices_are_not_waited_for(
        self, write: Write, file: str, kind: str
    ) -> None:
        folder = write()
        (folder / file).unlink()
        os.mkfifo(folder / file) if kind == "pipe" else (folder / file).symlink_to("/dev/zero")
        assert str(folder / file) in refused(folder)

    @pytest.mark.parametrize("names", [7, None, "FlashHeadX", {"a": 1}, [7, None, []]])
    def test_architectures_that_are_none(self, write: Write, names: object) -> None:
        config = {"architectures": names, "flash_head_cache_dir": "flash_head_assets"}
        assert ModelFolder.open(write(config)).has_clusters

    @pytest.mark.parametrize(
        "said", ["[" * 3000, "7", "{}", '{"vocab_size": "x"}', "9" * 5000, "null", '{"a": NaN}']
    )
    def test_metadata_that_is_none(self, write: Write, said: str) -> None:
        folder = write()
        save_file(assets(), folder / FILE, {"flashtune": said})
        assert "its metadata 'flashtune' cannot be read" in refused(folder)
        text = json.dumps({"vocab_size": True, "hidden_size": 8, "dtype": "bf16", "digest": "x"})
        save_file(assets(), folder / FILE, {"flashtune": text})
        assert "vocab_size is True" in refused(folder)

    def test_an_index_that_names_the_wrong_shard(self, write: Write) -> None:
        folder = write(shards=2)
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"lm_head.weight": "model-1.safetensors"}}))
        assert "model-1.safetensors: lacks lm_head.weight" in refused(folder)
        index.write_text(json.dumps({"weight_map": {"lm_head.weight": "model-7.safetensors"}}))
        assert "model-7.safetensors: no such file" in refused(folder)

    def test_neither_a_folder_nor_in_the_cache(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert "absent/config.json: No such file" in refused(tmp_path / "absent")
        monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
        with pytest.raises(
            FlashtuneError, match="no such folder, and Hugging Face's cache was not searched"
        ):
            FlashHead.from_pretrained("some-one/a.model")

    def test_a_repository_that_is_not_in_the_cache(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hub = pytest.importorskip("huggingface_hub")
        monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(FlashtuneError, match="download it with `hf download some-one"):
            FlashHead.from_pretrained("some-one/a.model")


class TestOrigin:
    """Assets that say what they were made from are held against the model."""

    def make(self, write: Write, origin: torch.Tensor, held: torch.Tensor, **config: Any) -> Path:
        folder = write(config, tensors={"lm_head.weight": held})
        clusters = read_clusters(folder / FILE)
        write_clusters(
            folder / FILE,
            Clusters(
                centroids=clusters.centroids,
                assignments=clusters.assignments,
                origin=Origin.of(origin),
            ),
        )
        return folder

    def test_the_same_weight_is_taken(self, write: Write) -> None:
        folder = self.make(write, weight(), weight())
        head = FlashHead.from_pretrained(folder)
        assert head(HIDDEN).tolist() == expected(HIDDEN, unit=False)

    def test_the_file_has_no_key_that_others_do_not_know(self, write: Write) -> None:
        folder = self.make(write, weight(), weight())
        tensors = load_file(folder / FILE)
        assert {name: list(tensor.shape) for name, tensor in tensors.items()} == {
            "centroids": [1, 1, WIDTH, CLUSTERS],
            "cluster_assignments": [VOCAB],
        }

    def test_another_weight_is_refused(self, write: Write) -> None:
        folder = self.make(write, weight(), weight(seed=3))
        error = refused(folder)
        assert str(folder / FILE) in error
        assert "made for a weight of the same shape with other values" in error
        assert "lm_head.weight in model.safetensors" in error

    def test_a_weight_of_another_dtype_may_be_the_same_one(self, write: Write) -> None:
        folder = self.make(write, weight(dtype=torch.bfloat16), weight(seed=3))
        assert FlashHead.from_pretrained(folder).vocab_size == VOCAB

    def test_other_shapes_are_named(self) -> None:
        here = Origin.of(weight())
        assert Origin.of(weight(VOCAB + 1)).why_not(here) == "vocab_size 61, not 60"
        wide = Origin.of(torch.ones(VOCAB, 9))
        assert wide.why_not(here) == "hidden_size 9, not 8"

    @pytest.mark.parametrize("text", ["", "3", "{}", '{"vocab_size": 60}'])
    def test_metadata_that_is_broken(self, write: Write, text: str) -> None:
        folder = write()
        save_file(assets(), folder / FILE, metadata={"flashtune": text})
        assert "its metadata 'flashtune' cannot be read" in refused(folder)


@pytest.mark.parametrize("source", [None, 7, b"model", [], "\0", "\ud800", "a/\0"])
def test_what_can_be_no_folder_is_one_line(source: Any) -> None:
    with pytest.raises(FlashtuneError) as caught:
        ModelFolder.open(source)
    assert str(caught.value).isprintable()
