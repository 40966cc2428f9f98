"""`flashtune bench`, and what `flashtune cluster` chooses by it, on tiny random models."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

import flashtune
from flashtune.kernels.model_folder.folder import ModelFolder
from flashtune.tuner.bench import bench as bench_module
from flashtune.tuner.bench import default_probes
from flashtune.tuner.bench.timed_answer import Run
from flashtune.tuner.cli.main import cli
from flashtune.tuner.clustering.decode_state import RunningModel

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

VOCAB, WIDTH, CLUSTERS = 128, 16, 16
PROMPTS = ["w1 w2 w3", "w9", "w50 w51 w52 w53 w54", "w7 w8", "w100", "w4 w4"]

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def plain_torch(without_kernels: None) -> None:
    """A CPU without kernels, so that nothing is compiled."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, and with one of it with clusters: 16 of 8 tokens, 3 probes."""
    path = tmp_path_factory.mktemp("made") / "model"
    words = {f"w{number}": number for number in range(VOCAB)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="w0"
    ).save_pretrained(path)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, eos_token_id=5, bos_token_id=0,
        tie_word_embeddings=False, initializer_range=0.5,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    result = run("cluster", "--model", path, "--out", path.parent / "flash", "--device", "cpu",
                 "--clusters", CLUSTERS, "--probes", 3)  # fmt: skip
    assert result.exit_code == 0, result.output
    return path.parent


@pytest.fixture
def model(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "model", tmp_path / "model"))


@pytest.fixture
def flash(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "flash", tmp_path / "flash"))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


def run(*arguments: object) -> Result:
    words = [str(argument) for argument in arguments]
    return CliRunner().invoke(cli, words, catch_exceptions=False)


@pytest.fixture
def bench(prompts: Path) -> Callable[..., Result]:
    def call(folder: Path, *arguments: object) -> Result:
        words = ("--device", "cpu", "--prompts", prompts, "--tokens", 12)
        return run("bench", "--model", folder, *words, *arguments)

    return call


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Steps take what a test says: by probes, None being the dense head."""

    def pretend(times: dict[int | None, float]) -> None:
        measured = bench_module.timed_answers

        def timed_answers(running: RunningModel, *arguments: Any) -> Run:
            linear = running.model.get_output_embeddings()
            head = getattr(linear, "head", None)
            run = measured(running, *arguments)
            return replace(run, step_us=times[head.n_probes if head else None])

        monkeypatch.setattr(bench_module, "timed_answers", timed_answers)

    return pretend


def written(folder: Path, n_probes: int | None, n_tokens: int) -> list[list[int]]:
    """The answers as transformers writes them, past no end token."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if n_probes is not None:
        flashtune.apply(model, assets=folder, n_probes=n_probes, always=True)
    answers = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        out = model.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
            max_new_tokens=n_tokens, do_sample=False, pad_token_id=0,
        )  # fmt: skip
        answers.append(out[0, inputs["input_ids"].shape[1] :].tolist())
    return answers


def same_start(one: list[int], other: list[int]) -> int:
    pairs = list(zip(one, other, strict=False))
    return next((at for at, (a, b) in enumerate(pairs) if a != b), len(pairs))


class TestBench:
    def test_answers_are_those_that_transformers_writes(
        self, flash: Path, bench: Callable[..., Result]
    ) -> None:
        result = bench(
            flash, "--rounds", 6, "--probes", 1, "--probes", 3, "--probes", 16, "--json"
        )
        assert result.exit_code == 0, result.output
        data = json.loads(result.stdout)
        dense = written(flash, None, 12)
        assert [row["n_probes"] for row in data["rows"]] == [None, 1, 3, 16]
        assert [row["own"] for row in data["rows"]] == [False, False, True, False]
        for row in data["rows"]:
            answers = written(flash, row["n_probes"], 12)
            kept = [same_start(a, b) for a, b in zip(dense, answers, strict=True)]
            assert row["tokens"] == sum(map(len, dense)) and row["answers"] == 6
            assert row["same_tokens"] == sum(kept)
            whole = [n == len(right) for n, right in zip(kept, dense, strict=True)]
            assert row["same_answers"] == sum(whole)
            assert 0 < row["head_share"] < 1 and row["tokens_per_s"] > 0
        assert data["rows"][0]["ratio"] == 1 and data["rows"][0]["added_bytes"] == 0
        assert data["rows"][1]["same_answers"] < 6 == data["rows"][3]["same_answers"]
        assert data["rows"][2]["added_bytes"] == (VOCAB + CLUSTERS) * WIDTH * 4 + 4 * VOCAB
        assert not data["interrupted"] and data["clusters"]

    def test_what_comes_after_an_end_token_does_not_count(
        self, flash: Path, bench: Callable[..., Result]
    ) -> None:
        path = flash / "generation_config.json"
        first = written(flash, None, 12)[0]
        path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": first[2]}))
        data = json.loads(bench(flash, "--rounds", 1, "--json").stdout)
        dense = written(flash, None, 12)[0]
        assert [row["tokens"] for row in data["rows"]] == [len(dense)] * 4
        assert len(dense) == first.index(first[2]) + 1 < 12

    def test_a_prompt_that_comes_again_counts_once(
        self, flash: Path, bench: Callable[..., Result]
    ) -> None:
        data = json.loads(bench(flash, "--rounds", 2, "--batch", 4, "--json").stdout)
        assert (data["rounds"], data["batch"]) == (2, 4)
        assert {row["answers"] for row in data["rows"]} == {6}

    def test_quality_counts_the_same_answers(
        self, flash: Path, prompts: Path, bench: Callable[..., Result]
    ) -> None:
        words = ("--screen", "none", "--screen", "int8", "--probes", 3, "--probes", 6)
        benched = json.loads(bench(flash, *words, "--rounds", 6, "--json").stdout)
        result = run("quality", "--model", flash, "--prompts", prompts, "--tokens", 12,
                     "--device", "cpu", *words, "--json")  # fmt: skip
        judged = json.loads(result.stdout)
        assert judged["answers"] == 6
        names = [(row["head"], row["n_probes"]) for row in judged["rows"]]
        rows = {(row["head"], row["n_probes"]): row for row in benched["rows"]}
        assert names == [("fp32", 3), ("fp32", 6), ("int8:8", 3), ("int8:8", 6)]
        for name, row in zip(names, judged["rows"], strict=True):
            assert row["answers"] * 6 == pytest.approx(rows[name]["same_answers"])
        assert ("no clusters int8:8", None) in rows

    def test_a_model_without_clusters_is_compared_with_screens(
        self, model: Path, bench: Callable[..., Result]
    ) -> None:
        result = bench(model, "--rounds", 1)
        assert result.exit_code == 0, result.output
        assert "no clusters int8:8" in result.stdout and "no clusters int4:32" in result.stdout
        assert "make them with `flashtune cluster` for" in result.stdout
        assert "only one round: the noise is unknown" in result.stdout
        refused = bench(model, "--probes", 3)
        assert refused.exit_code == 2
        assert "has no clusters to probe: make them with `flashtune cluster`" in refused.output
        assert "give --screen int8" in bench(model, "--screen", "none").output

    def test_a_table_for_people(
        self, flash: Path, bench: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("COLUMNS", "80")
        text = bench(flash, "--rounds", 2).stdout
        lines = text.splitlines()
        assert lines[0].startswith("tokens per prompt: 12, batch size: 1, rounds: 2, on ")
        table = lines[1:6]
        assert all(len(line.rstrip()) <= 80 for line in table)
        assert [line.split()[0] for line in table] == ["head", "dense", "fp32", "fp32", "no"]
        assert " 3* " in table[2]
        assert text.count("ratio: tok/s over the dense head's") == 1
        assert "recommended: " in text and "* set in the model's config" in text

    def test_the_recommendation_is_the_verdicts(
        self, flash: Path, bench: Callable[..., Result], timed: Callable[..., None]
    ) -> None:
        timed({None: 1110.0, 1: 1000.0, 16: 1030.0})
        words = ("--screen", "none", "--probes", 1, "--probes", 16, "--rounds", 6)
        data = json.loads(bench(flash, *words, "--json").stdout)
        assert data["recommended"]["n_probes"] == 16
        assert (
            "takes 2.9% less time per step but keeps fewer answers" in data["recommended"]["why"]
        )
        assert [row["ratio"] for row in data["rows"]] == pytest.approx([1, 1.11, 1110 / 1030])
        assert data["rows"][1]["tokens_per_s"] == pytest.approx(1000)

    def test_noise_is_named(
        self, flash: Path, bench: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        measured, steps = bench_module.timed_answers, list[float]()

        def pretended(running: RunningModel, *arguments: Any) -> Run:
            head = getattr(running.model.get_output_embeddings(), "head", None)
            step_us = 1000.0 if head else steps.pop(0)
            return replace(measured(running, *arguments), step_us=step_us)

        monkeypatch.setattr(bench_module, "timed_answers", pretended)
        words = ("--screen", "none", "--probes", 1, "--rounds", 4)
        steps += [1000, 1000, 1000, 1010, 1000]  # the first is to prepare
        assert "NOISY" not in bench(flash, *words).stdout
        steps += [1000, 1000, 1400, 800, 1200]
        assert bench(flash, *words).stdout.count("NOISY: step times are uncertain by ") == 1

    def test_no_more_rounds_begin_after_the_timeout(
        self, flash: Path, bench: Callable[..., Result]
    ) -> None:
        words = ("--screen", "none", "--probes", 1, "--rounds", 6, "--timeout", 0.001)
        result = bench(flash, *words)
        assert result.exit_code == 0
        assert "OUT OF TIME: 2 of 6 rounds" in result.stdout
        data = json.loads(bench(flash, *words, "--json").stdout)
        assert (data["rounds"], data["planned_rounds"], data["interrupted"]) == (2, 6, False)
        assert "OUT OF TIME" not in bench(flash, *words[:4], "--rounds", 1).stdout

    def test_ctrl_c_keeps_what_was_measured(
        self, flash: Path, bench: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        measured, calls = bench_module.timed_answers, []
        words = ("--screen", "none", "--probes", 1, "--probes", 16, "--rounds", 6)

        def stopped(*arguments: Any) -> Run:
            calls.append(arguments)
            if len(calls) == 3 + 5:  # 3 to prepare, and in the second round the second one
                raise KeyboardInterrupt
            return measured(*arguments)

        monkeypatch.setattr(bench_module, "timed_answers", stopped)
        result = bench(flash, *words, "--json")
        assert result.exit_code == 130
        assert "these are the results so far" in result.stderr
        data = json.loads(result.stdout)
        assert data["interrupted"] and [row["answers"] for row in data["rows"]] == [1, 1, 1]
        calls.clear()
        result = bench(flash, *words)
        assert result.exit_code == 130 and "INTERRUPTED: " in result.stdout
        calls[:] = [()] * 5  # before there is anything to compare
        result = bench(flash, *words)
        assert result.exit_code == 130 and result.stdout == ""
        assert "interrupted before there was anything to compare" in result.stderr

    def test_a_picture(
        self,
        flash: Path,
        bench: Callable[..., Result],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        pytest.importorskip("matplotlib")
        picture = tmp_path / "bench.png"
        bench(flash, "--rounds", 2, "--plot", picture)
        assert picture.read_bytes().startswith(b"\x89PNG")
        monkeypatch.setattr(RunningModel, "load", None)
        for name in ("bench.odd", "absent/bench.png"):
            result = bench(flash, "--plot", tmp_path / name)
            assert result.exit_code == 2 and f"{name}: cannot be written" in result.output

    def test_what_cannot_be_done_is_a_line(
        self, flash: Path, bench: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert (
            "17 probes are more than the model's 16 clusters"
            in bench(flash, "--probes", 17).output
        )
        with monkeypatch.context() as patch:
            patch.setattr(bench_module, "free_bytes", lambda _: 1000)
            result = bench(flash)
            assert result.exit_code == 2 and "give fewer --probes or --screen" in result.output
        with monkeypatch.context() as patch:
            patch.setitem(__import__("sys").modules, "transformers", None)
            assert "pip install 'flashtune[hf]'" in bench(flash).output
        (flash / "model.safetensors").write_bytes(b"odd")
        result = bench(flash)
        assert result.exit_code == 2 and "is not a complete safetensors file" in result.output


class TestCluster:
    """What it chooses unless it is told."""

    def made(self, model: Path, prompts: Path, *arguments: object) -> dict[str, Any]:
        out = model.parent / "made"
        result = run("cluster", "--model", model, "--out", out, "--clusters", CLUSTERS,
                     "--prompts", prompts, "--tokens", 12, "--device", "cpu", *arguments,
                     "--json")  # fmt: skip
        assert result.exit_code == 0, result.output
        data: dict[str, Any] = json.loads(result.stdout)
        assert ModelFolder.open(out).config["n_probes"] == data["n_probes"]
        return data

    def test_probes_keep_the_answers_where_that_costs_little(
        self,
        model: Path,
        prompts: Path,
        timed: Callable[..., None],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        timed({None: 1110.0} | {number: 1000 + 2 * number for number in range(1, 17)})
        monkeypatch.setattr(default_probes, "_ENOUGH", 6)
        data = self.made(model, prompts)
        dense, chosen = written(model, None, 12), data["n_probes"]
        assert written(model.parent / "made", chosen, 12) == dense
        assert written(model.parent / "made", chosen - 1, 12) != dense
        assert f"fp32 with {chosen} probes (1." in data["why"]
        assert "6 of 6 answers the same" in data["why"]

    def test_few_answers_promise_nothing_but_of_all_clusters(
        self, model: Path, prompts: Path, timed: Callable[..., None]
    ) -> None:
        timed({None: 1110.0, 1: 1000.0, 16: 1032.0})  # no other number is tried
        assert self.made(model, prompts)["n_probes"] == CLUSTERS

    def test_probes_stay_few_where_more_cost_much(
        self, model: Path, prompts: Path, timed: Callable[..., None]
    ) -> None:
        timed({None: 3000.0} | {number: 1000 + 200 * number for number in range(1, 17)})
        data = self.made(model, prompts)
        assert data["n_probes"] == 1
        assert "to keep 95% of the answers, use fp32 with" in data["why"]

    def test_a_screen_that_is_given_is_chosen_for(
        self, model: Path, prompts: Path, timed: Callable[..., None]
    ) -> None:
        timed({None: 1110.0} | dict.fromkeys(range(1, 17), 1000.0))
        data = self.made(model, prompts, "--screen", "int8")
        assert data["screen"] == "int8:8" and "int8:8 with" in data["why"]

    def test_it_takes_a_bounded_time(
        self, model: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(default_probes, "STEP_SECONDS", 0.0)
        monkeypatch.setattr(default_probes, "ANSWER_SECONDS", 0.0)
        data = self.made(model, prompts)
        assert data["n_probes"] == 1 and "answers of 12 tokens take more than 0 s" in data["why"]

    def test_a_model_that_cannot_be_run_gets_the_usual_probes(
        self, model: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(default_probes, "free_bytes", lambda _: 1000)
        data = self.made(model, prompts)
        assert data["n_probes"] == 1
        assert "a sixteenth of the clusters" in data["why"] and "are free on cpu" in data["why"]

    def test_probes_that_are_given_are_taken(
        self, model: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(RunningModel, "load", None)
        data = self.made(model, prompts, "--probes", 3)
        assert data["n_probes"] == 3 and data["why"] == ""
