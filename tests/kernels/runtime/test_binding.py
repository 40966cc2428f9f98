"""From a choice to a step: the whole chain of fallbacks, with kernels run by the interpreter."""

import json
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from toys.interpreted import InterpretedStep

from flashtune.kernels.backends.target import baseline_config, default_config
from flashtune.kernels.backends.torch import TorchStep, decode
from flashtune.kernels.backends.triton.backend import TritonBackend
from flashtune.kernels.head import FlashHead
from flashtune.kernels.plans.candidate import Candidate
from flashtune.kernels.plans.config import Config, config_data
from flashtune.kernels.plans.staged import StagedConfig
from flashtune.kernels.runtime import binding, records
from flashtune.kernels.weights import Weights
from flashtune.tuning_db import table
from flashtune.tuning_db.device import Toolchain, find_device
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.record import Measurement, Outcome, Provenance, Record
from flashtune.tuning_db.store import Store

H200 = find_device("nvidia-h200")
PROBLEM = Problem(vocab_size=512, hidden_size=64, n_clusters=32, n_probes=4)
TUNED = StagedConfig(score_rows=8, score_block=64, gather_block=64)
TOOLS = Toolchain(triton="3.6.0")


def make_head(n_probes: int = 4) -> FlashHead:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-3, 4, (512, 64), generator=generator).bfloat16()
    centroids = torch.nn.functional.normalize(torch.randn(32, 64, generator=generator))
    order = torch.randperm(512, generator=generator)
    return FlashHead(weight, centroids.bfloat16(), order // 16, n_probes=n_probes)


def states(n_tokens: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, (n_tokens, 64), generator=generator).bfloat16()


def record(config: Config, problem: Problem = PROBLEM) -> Record:
    return Record(
        device=H200.name,
        toolchain=TOOLS,
        problem=problem,
        config=config_data(config),
        provenance=Provenance.MEASURED,
        measurement=Measurement(outcome=Outcome.OK, median_us=10.0),
        created="2026-01-31T12:00:00Z",
    )


@pytest.fixture(autouse=True)
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An H200 that isn't there, a database of its own, and no prebuilt tables."""
    path = tmp_path / "tuning.db"
    monkeypatch.setenv("FLASHTUNE_DB", str(path))
    for module in ("runtime.binding", "head"):
        monkeypatch.setattr(f"flashtune.kernels.{module}.device_of", lambda _: H200)
    monkeypatch.setattr(binding, "toolchain", lambda _: TOOLS)
    monkeypatch.setattr(records, "prebuilt_devices", lambda: ())
    yield path


@pytest.fixture
def interpreted(interpreted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are rendered and loaded as ever, but run by Triton's interpreter."""
    monkeypatch.setattr(
        TritonBackend, "loader", lambda _, candidate, *rest: lambda: InterpretedStep(candidate)
    )


Broken = Callable[[Config], bool]


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Steps in plain torch; `broken` says of which configs compiling fails."""
    fake: dict[str, Any] = {"broken": lambda config: False, "compiled": []}

    def compile_step(candidate: Candidate, *_: Any) -> Callable[[], binding.Step]:
        problem, config = candidate.problem, candidate.config
        fake["compiled"].append(config)
        if fake["broken"](config):
            raise RuntimeError("ptxas fell over\nat length")
        return lambda: lambda weights, hidden, out: TorchStep(problem)(weights, hidden, out)

    monkeypatch.setattr(binding, "compile_step", compile_step)
    yield fake


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [line.getMessage() for line in caplog.records if line.levelno >= logging.WARNING]


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("n_tokens", [1, 3])
def test_a_tuned_kernel_is_found_and_gives_the_right_tokens(
    database: Path, n_tokens: int, caplog: pytest.LogCaptureFixture
) -> None:
    with Store(database) as store:
        store.add(record(TUNED, replace(PROBLEM, n_tokens=n_tokens)))
    head = make_head(n_probes=4)
    tokens = head(states(n_tokens))
    data = json.loads(json.dumps(head.explain(n_tokens)))
    assert (data["level"], data["source"]) == ("exact", "user database")
    assert data["config"]["score_rows"] == 8
    assert warnings_of(caplog) == []
    logits = head.weight.double() @ states(n_tokens).double().T
    plain = torch.empty(n_tokens, dtype=torch.int64)
    TorchStep(replace(PROBLEM, n_tokens=n_tokens))(head.decoder.weights, states(n_tokens), plain)
    position = torch.argsort(head.ids)
    for row in range(n_tokens):  # more clusters may be probed, so that a logit may be better
        assert logits[position[tokens[row]], row] >= logits[position[plain[row]], row]


@pytest.mark.usefixtures("interpreted")
def test_a_kernel_that_probes_all_clusters_gives_the_dense_argmax() -> None:
    head = make_head(n_probes=32)
    hidden = states(2)
    dense = torch.empty(512, 2).index_copy_(
        0, head.ids.long(), head.weight.float() @ hidden.float().T
    )
    best = dense.max(dim=0).values
    smallest = [int((dense[:, row] == best[row]).nonzero()[0, 0]) for row in range(2)]
    assert head(hidden).tolist() == smallest
    assert head.explain(2)["level"] == "default"


@pytest.mark.usefixtures("interpreted")
def test_a_step_made_in_inference_mode_also_runs_outside_it(database: Path) -> None:
    with Store(database) as store:
        store.add(record(baseline_config(PROBLEM, H200)))
    head = make_head()
    with torch.inference_mode():
        token = head(states(1)).item()
    assert head.explain()["config"]["selection"] == "torch_topk"
    assert head(states(1)).tolist() == [token]


def test_the_nearest_shape_serves_where_the_database_lacks_the_problem(
    database: Path, faked: dict[str, Any]
) -> None:
    with Store(database) as store:
        store.add(record(TUNED, replace(PROBLEM, n_tokens=4)))
    head = make_head()
    head(states(1))
    assert head.explain()["level"] == "nearest_shape"
    assert faked["compiled"] == [TUNED]


def test_a_prebuilt_table_serves_after_the_users_database(
    database: Path, faked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "prebuilt_devices", lambda: (H200.name,))
    monkeypatch.setattr(
        records,
        "prebuilt_table",
        lambda name: table.TuningTable(device=name, records=(record(TUNED),)),
    )
    assert make_head().explain()["source"] == "prebuilt table"
    with Store(database) as store:
        store.add(record(StagedConfig(score_block=64, gather_block=64)))
    assert make_head().explain()["source"] == "user database"


def test_an_added_table_serves_between_the_users_database_and_what_ships(
    database: Path, tmp_path: Path, faked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also as the nearest shape, where no source knows just this problem."""
    shipped = record(StagedConfig(score_block=64, gather_block=64))
    monkeypatch.setattr(records, "prebuilt_devices", lambda: (H200.name,))
    monkeypatch.setattr(
        records,
        "prebuilt_table",
        lambda name: table.TuningTable(device=name, records=(shipped,)),
    )
    monkeypatch.setenv("FLASHTUNE_TABLES", str(tmp_path))
    few = replace(PROBLEM, n_probes=3)
    added = (record(TUNED), record(TUNED, replace(few, n_tokens=2)))
    table.write_table(tmp_path / "fleet.json", table.TuningTable(device=H200.name, records=added))
    data = make_head().explain()
    assert (data["source"], data["level"]) == ("added table", "exact")
    assert data["config"]["score_rows"] == 8
    assert make_head(n_probes=3).explain(2)["source"] == "added table"
    with Store(database) as store:
        store.add(shipped)
    assert make_head().explain()["source"] == "user database"


def test_an_added_table_that_cannot_be_read_is_one_warning_and_left_out(
    tmp_path: Path,
    faked: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("FLASHTUNE_TABLES", str(tmp_path))
    table.write_table(
        tmp_path / "good.json", table.TuningTable(device=H200.name, records=(record(TUNED),))
    )
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "pipe.json").mkdir()
    head = make_head()
    head(states(1))
    head(states(2))
    data = head.explain()
    assert (data["source"], data["config"]["score_rows"]) == ("added table", 8)
    [skipped] = data["skipped"]
    assert "added table: skipped 2 of 3 tables" in skipped and "bad.json" in skipped
    assert warnings_of(caplog) == [skipped.removeprefix("added table: ")]


def test_a_folder_of_tables_that_is_not_there_is_one_warning(
    tmp_path: Path,
    faked: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("FLASHTUNE_TABLES", str(tmp_path / "nowhere"))
    head = make_head()
    assert head(states(1)).shape == (1,)
    assert head.explain()["level"] == "default"
    [warning] = warnings_of(caplog)
    assert "nowhere" in warning and "set FLASHTUNE_TABLES" in warning


def test_a_kernel_that_fails_gives_way_to_the_default(
    database: Path, faked: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with Store(database) as store:
        store.add(record(TUNED))
    faked["broken"] = lambda config: config == TUNED
    head = make_head()
    for _ in range(3):
        head(states(1))
    assert faked["compiled"] == [TUNED, default_config(PROBLEM, H200)]
    assert head.explain()["level"] == "default"
    assert warnings_of(caplog) == [
        "FlashHead: the exact config failed: RuntimeError: ptxas fell over "
        "(default is used instead). See head.explain() for details"
    ]


def test_where_all_kernels_fail_plain_torch_answers_with_one_warning(
    database: Path, faked: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with Store(database) as store:
        store.add(record(TUNED))
    faked["broken"] = lambda config: True
    head = make_head()
    for n_tokens in (1, 2, 1):
        assert head(states(n_tokens)).shape == (n_tokens,)
    data = head.explain()
    assert data["level"] == "torch"
    assert len(data["troubles"]) == 2
    assert len(warnings_of(caplog)) == 1
    assert "plain torch is used instead" in warnings_of(caplog)[0]


@pytest.mark.parametrize("broken", ["load_source", "triton", "device_of", "toolchain"])
def test_nothing_that_is_broken_on_the_way_escapes(
    broken: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("broken on purpose")

    if broken == "triton":
        monkeypatch.setitem(
            __import__("sys").modules, "flashtune.kernels.backends.triton.backend", None
        )
    elif broken == "load_source":
        monkeypatch.setattr("flashtune.kernels.backends.triton.backend.load_source", fail)
    else:
        monkeypatch.setattr(binding, broken, fail)
    head = make_head()
    assert head(states(2)).shape == (2,)
    assert head.explain(2)["level"] == "torch"
    assert len(warnings_of(caplog)) == 1
    assert broken == "triton" or "broken on purpose" in warnings_of(caplog)[0]


def test_a_database_that_cannot_be_read_is_left_out(
    database: Path, faked: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    database.write_bytes(b"no database at all" * 100)
    head = make_head()
    head(states(1))
    assert head.explain()["level"] == "default"
    assert len(warnings_of(caplog)) == 1
    assert "the tuning database is not used" in warnings_of(caplog)[0]
    assert "FLASHTUNE_DB" in warnings_of(caplog)[0]


def test_a_table_that_cannot_be_read_is_left_out(
    faked: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    newer = '{"schema_version": 99, "device": "nvidia-h200", "records": []}'
    monkeypatch.setattr(records, "prebuilt_devices", lambda: (H200.name,))
    monkeypatch.setattr(
        records, "prebuilt_table", lambda name: table.loads_table(newer, origin=name)
    )
    head = make_head()
    head(states(1))
    assert head.explain()["level"] == "default"
    assert len(head.explain()["troubles"]) == 1
    assert "upgrade flashtune" in warnings_of(caplog)[0]


@pytest.mark.parametrize("answer", [-1, 512, "worst"])
def test_a_step_that_answers_wrongly_is_not_used(
    answer: int | str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def step(weights: Weights, hidden: torch.Tensor, out: torch.Tensor) -> None:
        logits = hidden.float() @ weights.weight.float().T
        out.copy_(weights.ids[logits.argmin(dim=1)] if answer == "worst" else torch.tensor(answer))

    monkeypatch.setattr(binding, "compile_step", lambda *_: lambda: step)
    head = make_head()
    assert 0 <= int(head(states(1))) < 512
    assert head.explain()["level"] == "torch"
    wrong = "not the best ones" if answer == "worst" else "not in the vocabulary"
    assert wrong in warnings_of(caplog)[0]


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("n_tokens", [1, 3])
def test_a_kernel_tuned_for_tokens_serves_for_logits(
    database: Path, n_tokens: int, caplog: pytest.LogCaptureFixture
) -> None:
    with Store(database) as store:
        store.add(record(TUNED, replace(PROBLEM, n_tokens=n_tokens)))
    head = make_head(n_probes=32)
    hidden = states(n_tokens)
    logits = head.logits(hidden)
    dense = torch.empty(n_tokens, 512, dtype=torch.float32)
    dense[:, head.ids.long()] = hidden.float() @ head.weight.float().T
    assert torch.equal(logits, dense.bfloat16())
    data = head.explain(n_tokens, epilogue="logits")
    assert (data["level"], data["problem"]["epilogue"]) == ("nearest_shape", "logits")
    assert data["config"]["score_rows"] == 8
    assert {"field": "epilogue", "wanted": "logits", "found": "argmax"} in data["differences"]
    assert warnings_of(caplog) == []


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("unwritten", "it left logits unwritten"),
        ("shifted", "its tokens are not the best ones"),
    ],
)
def test_a_step_whose_logits_are_wrong_is_not_used(
    broken: str, message: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def step(weights: Weights, hidden: torch.Tensor, out: torch.Tensor) -> None:
        logits = decode(weights, hidden, 4, "logits")
        if broken == "unwritten":
            logits[0, 5] = out[0, 5]
        out.copy_(logits.roll(1, dims=1) if broken == "shifted" else logits)

    monkeypatch.setattr(binding, "compile_step", lambda *_: lambda: step)
    head = make_head()
    head.logits(states(1))
    assert head.explain(epilogue="logits")["level"] == "torch"
    assert message in warnings_of(caplog)[0]


def test_every_stream_has_a_step_of_its_own_and_spares_go_first() -> None:
    made = []

    def new_step() -> binding.Step:
        made.append(lambda *_: None)
        return made[-1]

    spare = new_step()
    bound = binding.Bound(
        problem=PROBLEM,
        choice=None,
        troubles=[],
        new_step=new_step,
        spares=[spare],  # type: ignore[arg-type]
    )
    assert [bound.take_step() for _ in range(3)] == [spare, *made[1:]]
    assert len(made) == 3


@pytest.mark.parametrize("prepared", [False, True])
def test_a_stream_that_is_captured_first_takes_a_spare_or_plain_torch(
    prepared: bool,
    faked: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    head = make_head()
    if prepared:
        head.prepare(1, 2)
    monkeypatch.setattr(head.decoder, "_index", 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    compiled = len(faked["compiled"])
    steps = [head.decoder._step("argmax", 1, stream) for stream in range(3)]
    assert len(faked["compiled"]) == compiled  # nothing compiles while a stream is captured
    assert len(set(map(id, steps))) == 3
    assert [isinstance(step, TorchStep) for step in steps] == [not prepared] * 3
    assert len(warnings_of(caplog)) == (0 if prepared else 1)
    assert ("argmax", 1, 0) in head.decoder._steps or not prepared


def _falls_over(*_: Any) -> None:
    raise RuntimeError("the driver has had enough\nand says much more")


def test_a_call_that_fails_is_answered_by_plain_torch_from_then_on(
    faked: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    head, hidden = make_head(), states(40)  # a part of 32 tokens, then one of 8
    expected = head(hidden).tolist()
    assert head.explain(40)["level"] == "default"
    head.decoder._steps["argmax", 32, 0] = _falls_over
    for _ in range(2):
        assert head(hidden).tolist() == expected
    data = head.explain(40)
    assert (data["level"], data["config"]) == ("torch", {"plan": "torch"})
    assert data["troubles"] == [
        "a call of the default config failed: RuntimeError: the driver has had enough"
    ]
    assert head.explain(8)["level"] == "default"  # which goes on as it did
    [warning] = warnings_of(caplog)
    assert "the driver has had enough (plain torch is used instead)" in warning
    assert isinstance(head.decoder._step("argmax", 32, 7), TorchStep)


def test_what_torch_itself_raises_is_raised(
    faked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    head = make_head()
    head(states(1))
    head.decoder._steps["argmax", 1, 0] = _falls_over
    with monkeypatch.context() as patch:
        patch.setattr(TorchStep, "__call__", _falls_over)
        with pytest.raises(RuntimeError, match="had enough"):
            head(states(1))
    data = head.explain()
    assert (data["level"], data["troubles"]) == ("default", [])  # no fault of the kernel's


def test_compiled_code_has_what_lasts_made_in_another_thread(
    faked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its CUDA graphs have a pool of memory of their own, for the thread that captures."""
    head, threads = make_head(), []
    monkeypatch.setattr(head.decoder, "_index", 0)
    monkeypatch.setattr(head.decoder, "decode", lambda hidden, epilogue: hidden)
    capturing = True
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    prepare = head.decoder.prepare

    def noted(*arguments: Any) -> None:
        threads.append(threading.get_ident())
        prepare(*arguments)

    monkeypatch.setattr(head.decoder, "prepare", noted)
    head.decoder.decode_compiled(states(40), "logits")
    assert not threads  # nothing compiles while a stream is captured
    capturing = False
    for _ in range(2):
        head.decoder.decode_compiled(states(40), "logits")
    assert len(threads) == 1 and threads[0] != threading.get_ident()
    assert set(head.decoder._bounds) == {("logits", 32), ("logits", 8)}
