"""`flashtune cluster` and `flashtune quality`, on tiny random models made here."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from flashtune.kernels.formats.screen import Screen
from flashtune.kernels.head import FlashHead
from flashtune.kernels.measure.timing import Timing
from flashtune.kernels.model_folder.clusters import Clusters, read_clusters
from flashtune.kernels.model_folder.folder import HeadParts, ModelFolder
from flashtune.tuner.cli.main import cli
from flashtune.tuner.clustering import clustered_folder, head_latency, quality_report
from flashtune.tuner.clustering.decode_state import Answers, RunningModel, decode_states
from flashtune.tuner.clustering.head_form import HeadForm, with_clusters
from flashtune.tuner.clustering.head_latency import HeadLatency
from flashtune.tuner.clustering.kmeans import BalancedKMeans
from flashtune.tuner.clustering.quality import Study
from flashtune.tuning_db.errors import FlashtuneError

VOCAB, WIDTH = 200, 16
EMBEDDING = "model.embed_tokens.weight"
STATES = torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(5))


@pytest.fixture(autouse=True)
def plain_torch(without_kernels: None) -> None:
    """A CPU without kernels, so that nothing is compiled."""


@pytest.fixture(autouse=True)
def few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_latency, "_REPLAYS", 3)


class Continued:
    """What a model that has continued some text gives."""

    interrupted = False

    def answers(self, *_: Any, **__: Any) -> Answers:
        return Answers(states=STATES, lengths=(10,) * 4)

    def logits(self, raw: torch.Tensor) -> torch.Tensor:
        return raw


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """Decode steps without a model that is run."""
    monkeypatch.setattr(quality_report, "require_transformers", lambda: None)
    monkeypatch.setattr(
        "flashtune.tuner.clustering.decode_state.require_transformers", lambda: None
    )
    monkeypatch.setattr(quality_report.RunningModel, "load", lambda *_: Continued())
    return STATES


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(4))


@pytest.fixture
def model(tmp_path: Path, weight: torch.Tensor) -> Path:
    folder = tmp_path / "model"
    (folder / "templates").mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": WIDTH,
        "vocab_size": VOCAB,
        "dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "templates" / "chat.jinja").write_text("{{ hello }}")
    save_file({EMBEDDING: weight}, folder / "model.safetensors")
    return folder


def run(*arguments: object) -> Result:
    words = [str(argument) for argument in arguments]
    return CliRunner().invoke(cli, words, catch_exceptions=False)


def done(*arguments: object) -> Result:
    result = run(*arguments, "--device", "cpu")
    assert result.exit_code == 0, result.output
    return result


def refused(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    return result.output


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "flash"


@pytest.fixture
def flash(model: Path, out: Path) -> Path:
    """A clustered model: 20 clusters of 10 tokens, 5 probes."""
    done("cluster", "--model", model, "--out", out, "--clusters", 20, "--probes", 5)
    return out


class TestCluster:
    def test_the_folder_is_the_model_and_its_clusters(
        self, model: Path, out: Path, weight: torch.Tensor
    ) -> None:
        before = files(model)
        told = done("cluster", "--model", model, "--out", out, "--json").stdout
        assert files(model) == before
        assert sorted(path.name for path in out.parent.iterdir()) == ["flash", "model"]
        made = files(out)
        assert {name: made[name] for name in before if name != "config.json"} == {
            name: data for name, data in before.items() if name != "config.json"
        }
        assert json.loads(made["config.json"]) == {
            **json.loads(before["config.json"]),
            "architectures": ["FlashHeadLlamaForCausalLM"],
            "flash_head_cache_dir": "flash_head_assets",
            "flash_head_centroids": "mean_rows",
            "n_probes": 1,
        }
        data = json.loads(told)
        assert 0 < data.pop("fit") < 1
        assert "1 probes, a sixteenth of the clusters, not chosen by measurement" in data.pop(
            "why"
        )
        assert data == {
            "out": str(out),
            "vocab_size": VOCAB,
            "hidden_size": WIDTH,
            "n_clusters": 13,
            "n_probes": 1,
            "screen": None,
            "iterations": 15,
        }

    def test_a_flash_head_of_it_answers_as_the_dense_head(
        self, flash: Path, weight: torch.Tensor
    ) -> None:
        head = FlashHead.from_pretrained(flash, n_probes=20)
        assert torch.equal(head(STATES), (STATES @ weight.T).argmax(dim=1))
        assert FlashHead.from_pretrained(flash).n_probes == 5

    def test_probes_find_more_than_chance_would(self, flash: Path, weight: torch.Tensor) -> None:
        rows = weight[::3]  # a hidden state along a row has that token on top
        tokens = FlashHead.from_pretrained(flash)(rows)
        found = (tokens == (rows @ weight.T).argmax(dim=1)).double().mean()
        assert found > 0.75  # of random clusters, 5 of 20 would hold a quarter

    def test_a_flash_head_model_may_be_clustered_again(self, flash: Path, tmp_path: Path) -> None:
        again = tmp_path / "again"
        done("cluster", "--model", flash, "--out", again, "--clusters", 10)
        config = json.loads((again / "config.json").read_text())
        assert config["architectures"] == ["FlashHeadLlamaForCausalLM"]
        assert len(read_clusters(ModelFolder.open(again).clustering_file).centroids) == 10

    @pytest.mark.parametrize("link", [False, True])
    def test_weights_are_copies_unless_links_are_asked_for(
        self, model: Path, out: Path, link: bool
    ) -> None:
        done("cluster", "--model", model, "--out", out, *(["--link"] if link else []))
        same = {name: os.path.samefile(model / name, out / name) for name in files(model)}
        assert {name for name, shared in same.items() if shared} == (
            {"model.safetensors"} if link else set()
        )

    def test_links_of_a_cache_are_followed(self, model: Path, tmp_path: Path, out: Path) -> None:
        cache = tmp_path / "models--a--b" / "snapshots" / "c0ffee"
        cache.mkdir(parents=True)
        model.rename(tmp_path / "models--a--b" / "blobs")
        for name in ("config.json", "model.safetensors"):
            (cache / name).symlink_to(f"../../blobs/{name}")
        done("cluster", "--model", cache, "--out", out, "--link")
        assert not any(path.is_symlink() for path in out.rglob("*"))
        assert load_file(out / "model.safetensors")[EMBEDDING].shape == (VOCAB, WIDTH)

    @pytest.mark.parametrize(
        ("target", "said"),
        [
            ("/etc", "leads out of the model's folder"),
            ("../other", "leads out of the model's folder"),
            (".", "is a symbolic link to a folder"),
        ],
    )
    def test_links_to_what_is_not_the_model_s_are_not_copied(
        self, model: Path, tmp_path: Path, out: Path, target: str, said: str
    ) -> None:
        (tmp_path / "other").write_text("mine")
        (model / "notes").symlink_to(target)
        assert said in refused("cluster", "--model", model, "--out", out)
        assert not out.exists()

    def test_ctrl_c_keeps_what_is_done(
        self, model: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = tmp_path / "whole"
        done("cluster", "--model", model, "--out", whole)
        steps, step = [], BalancedKMeans.step

        def stopped(self: BalancedKMeans) -> float:
            steps.append(self.iteration)
            if len(steps) == 6:
                raise KeyboardInterrupt
            return step(self)

        monkeypatch.setattr(BalancedKMeans, "step", stopped)
        result = run("cluster", "--model", model, "--out", out)
        assert result.exit_code == 130
        assert "run the same command again to continue" in result.output
        assert not out.exists()
        checkpoint = tmp_path / "flash.checkpoint"
        assert checkpoint.exists()
        error = refused("cluster", "--model", model, "--out", out, "--seed", 1)
        assert f"{checkpoint}: the checkpoint of another clustering" in error
        done("cluster", "--model", model, "--out", out)
        assert steps == [*range(6), *range(5, 15)]
        assert files(out) == files(whole)
        assert not checkpoint.exists()

    def test_a_folder_that_cannot_be_finished_is_not_there(
        self, model: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupted(*_: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(clustered_folder, "write_clusters", interrupted)
            assert run("cluster", "--model", model, "--out", out).exit_code == 130
        assert sorted(p.name for p in tmp_path.iterdir()) == ["flash.checkpoint", "model"]
        done("cluster", "--model", model, "--out", out)

    def test_a_recall_chooses_the_probes(
        self, model: Path, out: Path, states: torch.Tensor, weight: torch.Tensor
    ) -> None:
        options = ("--clusters", 20, "--recall", 0.9, "--screen", "none")
        done("cluster", "--model", model, "--out", out, *options)
        dense = (states @ weight.T).argmax(dim=1)

        def agreement(n_probes: int) -> float:
            head = FlashHead.from_pretrained(out, n_probes=n_probes)
            return float((head(states) == dense).double().mean())

        chosen = ModelFolder.open(out).config["n_probes"]
        assert agreement(chosen) >= 0.9 > agreement(chosen - 1)

    def test_a_recall_chooses_the_fastest_screen_with_its_fewest_probes(
        self, model: Path, out: Path, states: torch.Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        speed = {"fp32": 100, "int8:8": 60, "int4/int8:8": 50, "int4:2": 20, "int4:0": 5}
        timed = []

        def of(self: HeadLatency, form: HeadForm, n_probes: int) -> tuple[Timing, str]:
            timed.append((str(form), n_probes))
            return Timing(speed[str(form)], 1.0, 3), "torch"

        monkeypatch.setattr(HeadLatency, "of", of)
        screens = [word for text in list(speed)[1:] for word in ("--screen", text)]
        told = done("cluster", "--model", model, "--out", out, "--clusters", 20, "--recall", 0.975,
                    *screens, "--json")  # fmt: skip
        config = ModelFolder.open(out).config
        parts = ModelFolder.open(out).read_head()
        forms = [with_clusters("fp32", Screen.parse(text)) for text in list(speed)[1:]]
        study = Study.of(parts, states, forms=forms)
        least = {str(form): study.least_probes(0.975, form) for form in forms}
        assert least["int4:0"] is None, "it is fast, and does not reach the recall"
        picked = "int4:2" if least["int4:2"] else "int4/int8:8"
        assert config["flash_head_screen"] == picked == json.loads(told.stdout)["screen"]
        assert config["n_probes"] == least[picked] == json.loads(told.stdout)["n_probes"]
        assert dict(timed)["int8:8"] == least["int8:8"] and len(timed) == len(dict(timed))
        assert "int4:0" not in dict(timed)

    def test_a_screen_may_be_given_with_the_probes(self, model: Path, out: Path) -> None:
        options = ("--clusters", 20, "--probes", 5, "--screen", "int4/int8")
        told = done("cluster", "--model", model, "--out", out, *options)
        assert "5 probes, screened in int4/int8:8" in told.output
        assert ModelFolder.open(out).config["flash_head_screen"] == "int4/int8:8"
        again = out.parent / "again"
        done("cluster", "--model", out, "--out", again, "--clusters", 20, "--screen", "none")
        assert "flash_head_screen" not in ModelFolder.open(again).config

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--clusters", "201"], "201 clusters cannot be made of 200 tokens"),
            (["--clusters", "4", "--probes", "5"], "5 probes are more than the 4 clusters"),
            (["--probes", "5", "--recall", "0.9"], "give either --probes or --recall"),
            (["--recall", "1.5"], "--recall"),
            (["--screen", "int9"], "must be among int8, int4, not 'int9'"),
            (
                ["--screen", "int8", "--screen", "int4"],
                "give just one --screen, or --recall to choose",
            ),
        ],
    )
    def test_what_cannot_be_done(
        self, model: Path, out: Path, arguments: list[str], said: str
    ) -> None:
        assert said in refused("cluster", "--model", model, "--out", out, *arguments)
        assert [path.name for path in out.parent.iterdir()] == ["model"]

    def test_nothing_is_overwritten(self, model: Path, tmp_path: Path) -> None:
        before = files(model)
        error = refused("cluster", "--model", model, "--out", model)
        assert f"{model}: already exists" in error
        assert files(model) == before
        (tmp_path / "flash.partial").mkdir()
        error = refused("cluster", "--model", model, "--out", tmp_path / "flash")
        assert "flash.partial: already exists" in error
        error = refused("cluster", "--model", model, "--out", tmp_path / "no" / "where")
        assert "no: no such folder" in error

    def test_of_two_at_once_the_first_one_stays(
        self, model: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Begun together, both work; the one that is done later leaves the other's as it is."""
        write, others = clustered_folder.write_clusters, []

        def overtaken(path: Path, clusters: Clusters) -> None:
            write(path, clusters)
            if not others:
                others.append("began")
                monkeypatch.setattr(clustered_folder, "_check_output", lambda *_: None)
                done("cluster", "--model", model, "--out", out)

        monkeypatch.setattr(clustered_folder, "write_clusters", overtaken)
        error = refused("cluster", "--model", model, "--out", out)
        assert f"{out}: was created by another process" in error
        assert FlashHead.from_pretrained(out).vocab_size == VOCAB
        assert sorted(path.name for path in tmp_path.iterdir()) == ["flash", "model"]

    def test_a_checkpoint_is_written_by_two_at_once(
        self, model: Path, out: Path, tmp_path: Path
    ) -> None:
        weight = ModelFolder.open(model).head_weight().read()
        kmeans = BalancedKMeans(weight, 20)
        kmeans.step()
        checkpoints = [clustered_folder.Checkpoint(out, kmeans) for _ in range(4)]
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda each: [each.save() for _ in range(20)], checkpoints))
        checkpoints[0].load()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["flash.checkpoint", "model"]

    def test_a_disk_that_is_too_small(
        self, model: Path, out: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        full = type("Usage", (), {"free": 1000})
        monkeypatch.setattr(clustered_folder.shutil, "disk_usage", lambda _: full)
        assert "or give --link" in refused("cluster", "--model", model, "--out", out)
        done("cluster", "--model", model, "--out", out, "--link")

    def test_a_disk_that_cannot_be_written_to(
        self, model: Path, out: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(clustered_folder.shutil, "copyfile", full)
            error = refused("cluster", "--model", model, "--out", out)
            assert f"{out}: cannot be written: " in error and "No space left" in error
            patch.setattr(Path, "write_bytes", full)
            (out.parent / "flash.checkpoint").unlink()
            assert "No space left" in refused("cluster", "--model", model, "--out", out)
        assert [path.name for path in out.parent.iterdir()] == ["model"]

    def test_transformers_is_asked_for_before_the_work(
        self, model: Path, out: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(__import__("sys").modules, "transformers", None)
        error = refused("cluster", "--model", model, "--out", out, "--recall", "0.9")
        assert "pip install 'flashtune[hf]'" in error
        assert [path.name for path in out.parent.iterdir()] == ["model"]


class TestQuality:
    def report(self, flash: Path, *arguments: object) -> dict[str, Any]:
        data: dict[str, Any] = json.loads(
            done("quality", "--model", flash, "--json", *arguments).stdout
        )
        return data

    def test_shares_are_those_of_the_head_itself(
        self, flash: Path, states: torch.Tensor, weight: torch.Tensor
    ) -> None:
        probes = ("--probes", 1, "--probes", 6, "--probes", 20)
        data = self.report(flash, "--screen", "none", *probes)
        assert (data["states"], data["n_clusters"], data["n_probes"]) == (40, 20, 5)
        logits = states @ weight.T
        clusters = read_clusters(ModelFolder.open(flash).clustering_file)
        scores = states @ clusters.centroids.T
        for row, n_probes in zip(data["rows"], (1, 6, 20), strict=True):
            head = FlashHead.from_pretrained(flash, n_probes=n_probes)
            agree = (head(states) == logits.argmax(dim=1)).double().mean()
            probed = scores.topk(n_probes).indices
            inside = (clusters.assignments[None, :, None] == probed[:, None]).any(dim=2)
            five = inside.gather(1, logits.topk(5).indices).all(dim=1).double().mean()
            mass = (logits.softmax(dim=1) * inside).sum(dim=1).mean()
            assert row["n_probes"] == n_probes
            assert row["top1"] == pytest.approx(float(agree), abs=1e-12)
            assert row["top5"] == pytest.approx(float(five), abs=1e-12)
            assert row["mass"] == pytest.approx(float(mass), abs=1e-5)
            assert "interrupted" in data and not data["interrupted"]
            assert row["median_us"] > 0 and row["level"] == "torch"
        assert data["dense"]["median_us"] > 0 and data["recall"] is None

    def test_special_tokens_are_found_always(
        self, flash: Path, states: torch.Tensor, weight: torch.Tensor
    ) -> None:
        plain = self.report(flash, "--screen", "none", "--probes", 1)["rows"][0]
        path = flash / "config.json"
        config = json.loads(path.read_text())
        special = (states @ weight.T).argmax(dim=1)[:30].tolist()
        path.write_text(json.dumps({**config, "flash_head_special_token_ids": special}))
        row = self.report(flash, "--screen", "none", "--probes", 1)["rows"][0]
        assert row["top1"] >= 0.75 > plain["top1"]
        assert row["mass"] > plain["mass"]

    def test_the_usual_probes_and_the_models_own(self, flash: Path, states: torch.Tensor) -> None:
        numbers = [row["n_probes"] for row in self.report(flash, "--screen", "none")["rows"]]
        assert numbers == [1, 2, 4, 5, 8]
        data = self.report(flash, "--screen", "none", "--recall", 0.95)
        found = data["recall"]["n_probes"]
        assert data["recall"]["target"] == 0.95
        assert found in [row["n_probes"] for row in data["rows"]]
        [row] = [row for row in data["rows"] if row["n_probes"] == found]
        assert row["top1"] >= 0.95

    def test_a_table_for_people(self, flash: Path, states: torch.Tensor) -> None:
        text = done("quality", "--model", flash, "--recall", 1, "--screen", "none").output
        assert "40 decode steps, 20 clusters" in text
        assert "5*" in text and "dense" in text
        assert "probes are the fewest that reach a recall of 100.00%" in text
        assert "runs torch: fp32, dense fp32" in text

    def test_a_table_of_80_columns_cuts_no_number(
        self, flash: Path, states: torch.Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("COLUMNS", "80")
        text = done("quality", "--model", flash, "--screen", "int8").stdout
        assert "…" not in text and "no clusters int8:8" in text
        row = next(line for line in text.splitlines() if line.startswith("dense fp32"))
        assert row.split()[2:6] == ["1.0000", "1.0000", "1.0000", "4/4"] and len(row) <= 80

    def test_each_form_has_its_lines(self, flash: Path, states: torch.Tensor) -> None:
        options = ("--probes", 2, "--probes", 5, "--screen", "int8", "--screen", "int4:0")
        data = self.report(flash, *options)
        heads = [(row["head"], row["n_probes"]) for row in data["rows"]]
        assert heads == [(head, n) for head in ("fp32", "int8:8", "int4:0") for n in (2, 5)]
        assert [row["head"] for row in data["whole"]] == [
            "no clusters int8:8", "dense int4", "dense int8", "dense q6_k", "dense fp32"
        ]  # fmt: skip
        last = data["whole"][-1]
        assert last["median_us"] == data["dense"]["median_us"] and last["added_bytes"] == 0
        assert data["whole"][0]["top1"] == 1 and data["whole"][0]["n_probes"] is None
        assert "median_us" not in data["whole"][3]
        plain, screened = data["rows"][1], data["rows"][3]
        assert plain["read_bytes"] == (20 + 50) * 64
        assert screened["read_bytes"] == (20 + 50) * 20 + 8 * 64
        assert screened["added_bytes"] == (20 + 200) * 20 + 4 * 200
        assert plain["added_bytes"] == (20 + 200) * 64 + 4 * 200

    def test_the_screen_of_a_folder_is_its_own(self, flash: Path, states: torch.Tensor) -> None:
        path = flash / "config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps({**config, "flash_head_screen": "int8:4"}))
        text = done("quality", "--model", flash, "--screen", "none").output
        [line] = [line for line in text.splitlines() if "5*" in line]
        assert "int8:4" in line
        path.write_text(json.dumps({**config, "flash_head_screen": "int7"}))
        error = refused("quality", "--model", flash)
        assert "flash_head_screen" in error and "int7" in error and str(flash) in error

    def test_a_recall_names_the_pair(self, flash: Path, states: torch.Tensor) -> None:
        options = ("--recall", 0.9, "--screen", "int8", "--probes", 2)
        text = done("quality", "--model", flash, *options).output
        assert "is the fastest of those that reach a recall of 90.00%" in text
        recall = self.report(flash, *options)["recall"]
        assert recall["target"] == 0.9 and recall["screen"] in (None, "int8:8")

    def test_a_picture(self, flash: Path, states: torch.Tensor, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        picture = tmp_path / "quality.png"
        done("quality", "--model", flash, "--plot", picture, "--screen", "int8")
        assert picture.read_bytes().startswith(b"\x89PNG")
        error = refused("quality", "--model", flash, "--plot", tmp_path / "quality.odd")
        assert "quality.odd: cannot be written" in error

    def test_a_picture_that_cannot_be_written_is_told_before_the_work(
        self, flash: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pytest.importorskip("matplotlib")
        monkeypatch.setattr(quality_report, "study_model", None)
        for name in ("quality.odd", "quality", "absent/quality.png"):
            error = refused("quality", "--model", flash, "--plot", tmp_path / name)
            assert f"{name}: cannot be written" in error

    def test_ctrl_c_while_timing_keeps_what_was_counted(
        self, flash: Path, states: torch.Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = self.report(flash, "--screen", "none")
        probing, timed = HeadLatency.probing, []

        def stopped(self: HeadLatency, n_probes: int, form: HeadForm) -> Any:
            timed.append(n_probes)
            if len(timed) == 2:
                raise KeyboardInterrupt
            return probing(self, n_probes, form)

        monkeypatch.setattr(HeadLatency, "probing", stopped)
        options = ("--device", "cpu", "--screen", "none")
        result = run("quality", "--model", flash, *options, "--json")
        assert result.exit_code == 130
        assert "these are the results so far" in result.stderr
        data = json.loads(result.stdout)
        assert data["interrupted"] and not whole["interrupted"]
        shares = ("n_probes", "top1", "top5", "mass")
        assert [[row[name] for name in shares] for row in data["rows"]] == [
            [row[name] for name in shares] for row in whole["rows"]
        ]
        assert ["median_us" in row for row in data["rows"]] == [True] + [False] * (
            len(data["rows"]) - 1
        )
        timed.clear()
        assert "- not timed" in run("quality", "--model", flash, *options).stdout

    def test_ctrl_c_while_decoding_keeps_what_was_counted(
        self, flash: Path, states: torch.Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stopped = Continued()
        stopped.interrupted = True
        monkeypatch.setattr(quality_report.RunningModel, "load", lambda *_: stopped)
        options = ("--device", "cpu", "--screen", "none")
        result = run("quality", "--model", flash, *options, "--json")
        assert result.exit_code == 130
        data = json.loads(result.stdout)
        assert data["interrupted"] and data["states"] == len(STATES)
        assert all("median_us" not in row and row["mass"] > 0 for row in data["rows"])

    def test_a_number_of_probes_is_not_chosen_from_a_part(
        self, model: Path, out: Path, states: torch.Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def stopped(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(Continued, "answers", stopped)
        result = run("cluster", "--model", model, "--out", out, "--recall", 0.9)
        assert result.exit_code == 130
        assert not out.exists()

    def test_what_is_not_installed_is_named(
        self, flash: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        modules = __import__("sys").modules
        monkeypatch.setitem(modules, "transformers", None)
        monkeypatch.setitem(modules, "matplotlib.figure", None)
        assert "pip install 'flashtune[hf]'" in refused("quality", "--model", flash)
        error = refused("quality", "--model", flash, "--plot", tmp_path / "a.png")
        assert "pip install 'flashtune[plot]'" in error

    @pytest.mark.parametrize(
        ("text", "said"),
        [(b"\n \n", "contains no prompts"), (b"\xff\xff", "is not UTF-8"), (None, "No such file")],
    )
    def test_prompts_that_are_none(
        self, flash: Path, tmp_path: Path, text: bytes | None, said: str
    ) -> None:
        path = tmp_path / "prompts.txt"
        if text is not None:
            path.write_bytes(text)
        error = refused("quality", "--model", flash, "--prompts", path)
        assert f"{path}: " in error and said in error

    def test_more_probes_than_clusters(self, flash: Path, states: torch.Tensor) -> None:
        assert "21 probes are more than the model's 20 clusters" in refused(
            "quality", "--model", flash, "--probes", 21
        )

    def test_a_model_without_clusters(self, model: Path, states: torch.Tensor) -> None:
        error = refused("quality", "--model", model)
        assert "make one from it with `flashtune cluster`" in error


class TestDecodeStates:
    """With a model that transformers runs, where it is installed."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> ModelFolder:
        transformers = pytest.importorskip("transformers")
        tokenizers = pytest.importorskip("tokenizers")
        words = {word: number for number, word in enumerate(["[UNK]", *"abcdefgh"])}
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        path = tmp_path / "tiny"
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, unk_token="[UNK]"
        ).save_pretrained(path)
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=9, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, eos_token_id=3, bos_token_id=0,
        )  # fmt: skip
        transformers.LlamaForCausalLM(config).save_pretrained(path)
        return ModelFolder.open(path)

    def test_states_give_the_tokens_that_the_model_writes(self, folder: ModelFolder) -> None:
        import transformers

        prompts = ["a b c", "d", "h g f e d c b a", "b b"]
        states = decode_states(folder, prompts, 6, "cpu")
        weight = folder.head_weight().read()
        tokens = (states @ weight.T).argmax(dim=1).tolist()
        model = transformers.AutoModelForCausalLM.from_pretrained(folder.path)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder.path)
        expected = []
        for prompt in prompts:
            inputs = tokenizer(prompt, return_tensors="pt")
            written = model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0)
            expected += written[0, inputs["input_ids"].shape[1] :].tolist()
        assert tokens == expected

    @pytest.mark.parametrize(
        "settings",
        [
            {"num_beams": 3, "num_return_sequences": 2},
            {"do_sample": True, "num_return_sequences": 3, "temperature": 5.0},
            {"return_dict_in_generate": True, "output_scores": True},
            {"prompt_lookup_num_tokens": 3},
            {"repetition_penalty": 9.0, "min_new_tokens": 6, "suppress_tokens": [1, 2]},
            {"use_cache": False, "max_length": 3, "stop_strings": ["a"]},
        ],
    )
    def test_the_models_own_settings_change_nothing(
        self, folder: ModelFolder, settings: dict[str, Any]
    ) -> None:
        prompts = ["a b c", "d", "h g f e d c b a"]
        expected = decode_states(folder, prompts, 6, "cpu")
        path = folder.path / "generation_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
        assert torch.equal(decode_states(folder, prompts, 6, "cpu"), expected)

    def test_a_tokenizer_may_give_more_than_ids(self, folder: ModelFolder) -> None:
        expected = decode_states(folder, ["a b c", "d"], 3, "cpu")
        path = folder.path / "tokenizer_config.json"
        for names in (["input_ids", "token_type_ids", "attention_mask"], ["input_ids"]):
            config = {**json.loads(path.read_text()), "model_input_names": names}
            path.write_text(json.dumps(config))
            assert torch.equal(decode_states(folder, ["a b c", "d"], 3, "cpu"), expected)

    def test_what_a_model_raises_is_a_line(
        self, folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def short(*_: Any, **__: Any) -> None:
            raise IndexError("index out of range in self\nand a long story")

        model = RunningModel.load(folder, "cpu")
        monkeypatch.setattr(model.model, "forward", short)
        with pytest.raises(
            FlashtuneError, match=r"the longest has 5 characters\): IndexError"
        ) as caught:
            model.answers(["a b c", "d"], 3)
        assert "\n" not in str(caught.value)
        with pytest.raises(FlashtuneError, match="gives no logits: IndexError"):
            model.logits(torch.ones(1, 9))

    def test_an_interrupted_model_gives_what_it_has(
        self, folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("flashtune.tuner.clustering.decode_state._BATCH", 1)
        expected = decode_states(folder, ["a b c"], 3, "cpu")
        model = RunningModel.load(folder, "cpu")
        further, calls = model._continue, []

        def stopped(*arguments: Any) -> Any:
            calls.append(arguments)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return further(*arguments)

        monkeypatch.setattr(model, "_continue", stopped)
        assert torch.equal(
            model.answers(["a b c", "d"], 3, keep_interrupted=True).states, expected
        )
        assert model.interrupted
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            model.answers(["a b c", "d"], 3)

    def test_progress_is_shown_at_each_step(
        self, folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A batch of long answers can take minutes."""
        monkeypatch.setattr("flashtune.tuner.clustering.decode_state._BATCH", 1)
        shown: list[int] = []
        monkeypatch.setattr(
            "flashtune.tuner.progress.StepProgress.show", lambda _, done: shown.append(done)
        )
        answers = RunningModel.load(folder, "cpu").answers(["a b c", "d"], 6)
        first, second = ([*range(steps), 6] for steps in answers.lengths)
        assert shown == [*first, *(6 + done for done in second)]

    def test_out_of_time_it_gives_whole_answers(
        self, folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("flashtune.tuner.clustering.decode_state._BATCH", 1)
        monkeypatch.setattr("flashtune.tuner.clustering.decode_state._FIRST", 1)
        model = RunningModel.load(folder, "cpu")
        whole = model.answers(["a b c", "d"], 6)
        now, further = [0.0], model._continue
        monkeypatch.setattr(
            "flashtune.tuner.clustering.decode_state.time.monotonic", lambda: now[0]
        )

        def slow(*arguments: Any) -> Any:
            now[0] += 60
            return further(*arguments)

        monkeypatch.setattr(model, "_continue", slow)
        cut = model.answers(["a b c", "d"], 6, seconds=100)
        assert cut.lengths == whole.lengths[:1]
        assert torch.equal(cut.states, whole.states[: whole.lengths[0]])
        with pytest.raises(FlashtuneError, match="1 answers of 6 tokens take more than 50 s"):
            model.answers(["a b c", "d"], 6, seconds=50)

    @pytest.mark.parametrize(
        ("kind", "changes", "returned"),
        [
            ("Cohere", {"logit_scale": 0.25}, lambda raw: raw * 0.25),
            ("Granite", {"logits_scaling": 8.0}, lambda raw: raw / 8),
            ("Gemma2", {"final_logit_softcapping": 2.0}, lambda raw: 2 * torch.tanh(raw / 2)),
            ("Llama", {}, lambda raw: raw),
        ],
    )
    def test_logits_are_those_that_the_model_returns(
        self, folder: ModelFolder, kind: str, changes: dict[str, float], returned: Any
    ) -> None:
        import transformers

        config = getattr(transformers, f"{kind}Config")(
            vocab_size=9, hidden_size=16, intermediate_size=16, num_hidden_layers=1, head_dim=8,
            num_attention_heads=2, num_key_value_heads=2, eos_token_id=3, bos_token_id=0,
            pad_token_id=0, **changes,
        )  # fmt: skip
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder.path)
        model = RunningModel.load(folder, "cpu")
        raw = torch.randn(5, 9)
        torch.testing.assert_close(model.logits(raw), returned(raw))
        weight = model.model.get_output_embeddings().weight.detach()
        clusters = Clusters(centroids=weight[::3].clone(), assignments=torch.arange(9) // 3)
        parts = HeadParts(weight=weight, clusters=clusters, n_probes=1, special_token_ids=[])
        states = model.answers(["a b c", "d"], 3).states
        study = Study.of(parts, states, model.logits)
        probed = (states @ clusters.centroids.T).argmax(dim=1)
        inside = clusters.assignments[None] == probed[:, None]
        mass = (returned(states @ weight.T).softmax(dim=1) * inside).sum(dim=1).mean()
        assert study.row(1).mass == pytest.approx(float(mass), abs=1e-5)

    def test_a_folder_that_transformers_cannot_load(self, folder: ModelFolder) -> None:
        config = json.loads((folder.path / "config.json").read_text())
        (folder.path / "config.json").write_text(json.dumps({**config, "model_type": "odd"}))
        with pytest.raises(FlashtuneError, match="transformers cannot load it") as caught:
            decode_states(folder, ["a"], 1, "cpu")
        assert "\n" not in str(caught.value)
