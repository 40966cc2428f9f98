"""The FlashHead module on an NVIDIA GPU."""

import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flashtune.kernels.backends.host import device_of
from flashtune.kernels.backends.nvidia.driver import loaded
from flashtune.kernels.backends.nvidia.probe import Gauge
from flashtune.kernels.head import FlashHead
from flashtune.kernels.measure.probe import probe
from flashtune.kernels.plans.config import parse_config, slack_of
from flashtune.kernels.testing.runner import judge_of
from flashtune.tuning_db.problem import EPILOGUES, Problem

pytestmark = pytest.mark.gpu


def make_head(seed: int = 0, n_probes: int = 64, tune: str = "never") -> FlashHead:
    generator = torch.Generator("cuda").manual_seed(seed)
    weight = torch.randn(16384, 512, generator=generator, device="cuda").bfloat16()
    centroids = torch.randn(1024, 512, generator=generator, device="cuda")
    order = torch.randperm(16384, generator=generator, device="cuda")
    unit = torch.nn.functional.normalize(centroids).bfloat16()
    return FlashHead(weight, unit, order // 16, n_probes=n_probes, tune=tune)


def states(n_tokens: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(n_tokens, 512, generator=generator, device="cuda").bfloat16()


def why_wrong(head: FlashHead, out: torch.Tensor, hidden: torch.Tensor) -> str | None:
    found = head.explain(len(hidden))
    problem = replace(
        Problem(**found["problem"]), epilogue="logits" if out.dim() == 2 else "argmax"
    )
    config = parse_config(found["config"])
    return judge_of(config, head.decoder.weights, problem).why_wrong(out, hidden, slack_of(config))


@pytest.mark.parametrize("n_tokens", [1, 3, 20])
def test_a_kernel_runs_and_its_tokens_are_right(n_tokens: int) -> None:
    head = make_head()
    for seed in range(3):
        hidden = states(n_tokens, seed)
        assert why_wrong(head, head(hidden), hidden) is None
        assert why_wrong(head, head.logits(hidden), hidden) is None
    for epilogue in EPILOGUES:
        assert head.explain(n_tokens, epilogue=epilogue)["level"] != "torch"
        assert head.explain(n_tokens, epilogue=epilogue)["troubles"] == []


@pytest.mark.parametrize("warm", ["called", "prepared"])
def test_a_call_can_be_captured(warm: str) -> None:
    head = make_head()
    hidden = states(2)
    if warm == "called":
        head(hidden)
    else:
        head.prepare(2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = head(hidden)
    for seed in range(3):
        fresh = states(2, seed)
        hidden.copy_(fresh)
        graph.replay()
        assert why_wrong(head, out, fresh) is None
        assert why_wrong(head, head(fresh), fresh) is None  # eager calls between replays


def test_logits_can_be_captured_and_fill_their_output_each_time() -> None:
    head = make_head()
    head.prepare(2, epilogue="logits")
    hidden = states(2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = head.logits(hidden)
        tokens = out.argmax(dim=1)
    for seed in range(3):
        fresh = states(2, seed)
        hidden.copy_(fresh)
        graph.replay()
        assert why_wrong(head, out, fresh) is None
        assert torch.equal(tokens, out.argmax(dim=1))
    assert head.explain(2, epilogue="logits")["level"] != "torch"


def test_a_capture_without_preparation_still_answers() -> None:
    head = make_head()
    hidden = states(1)
    make_head()(hidden)  # what torch loads on first use is not loaded in a capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = head(hidden)
    graph.replay()
    assert why_wrong(head, out, hidden) is None
    head(hidden)
    assert head.explain()["level"] != "torch"


def test_an_uneven_vocabulary_and_special_tokens() -> None:
    """Eager and captured, with logits of both signs, against all that may be candidates."""
    generator = torch.Generator("cuda").manual_seed(3)
    vocab, clusters, special = 16384 - 5, 1024, [7, 9000]
    weight = torch.randn(vocab, 512, generator=generator, device="cuda").abs().bfloat16()
    centroids = torch.randn(clusters, 512, generator=generator, device="cuda").bfloat16()
    weight[special] *= 1.5
    assignments = torch.arange(vocab, device="cuda") % clusters
    hidden = states(2)
    pinned = torch.isin(assignments, assignments[special]).nonzero()[:, 0].tolist()
    for sign in (1, -1):
        rows = sign * weight
        plain = FlashHead(rows, centroids, assignments, n_probes=64)
        head = FlashHead(rows, centroids, assignments, n_probes=64, special_token_ids=special)
        head.prepare(2)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = head(hidden)
        for seed in range(3):
            hidden.copy_(states(2, seed).abs() if seed else states(2, seed))
            graph.replay()
            logits = hidden.double() @ rows.double().T
            found = plain(hidden)
            assert why_wrong(plain, found, hidden) is None and int(found.max()) < vocab
            for row, token in enumerate(found.tolist()):
                best = max([token, *pinned], key=lambda token, row=row: logits[row, token])
                assert head(hidden)[row] == out[row] == best
        assert head.explain(2)["level"] != "torch"


def test_two_streams_do_not_disturb_each_other() -> None:
    head = make_head()
    inputs = [states(1, seed) for seed in range(2)]
    expected = [head(hidden).item() for hidden in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    tokens: list[list[torch.Tensor]] = [[], []]
    for _ in range(200):
        for number, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                tokens[number].append(head(inputs[number]))
    torch.cuda.synchronize()
    assert [torch.cat(found).unique().tolist() for found in tokens] == [[one] for one in expected]


def test_threads_on_one_stream_do_not_disturb_each_other() -> None:
    head = make_head()
    inputs = [states(1, seed) for seed in range(4)]
    expected = [head(hidden).item() for hidden in inputs]
    found: dict[int, list[int]] = {}

    def work(number: int) -> None:
        tokens = [head(inputs[number]) for _ in range(200)]
        found[number] = torch.cat(tokens).unique().tolist()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(4)] == [[one] for one in expected]


# torch captures nothing at all to begin with, and warns of it
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_torch_compile_traces_it(mode: str) -> None:
    torch.compiler.reset()
    head = make_head()
    head.prepare(1)
    compiled = torch.compile(head, fullgraph=True, mode=mode)
    for seed in range(5):
        hidden = states(1, seed)
        assert torch.equal(compiled(hidden).clone(), head(hidden))
    logits = torch.compile(head.logits, fullgraph=True, mode=mode)
    for seed in range(5):
        hidden = states(1, seed)
        assert why_wrong(head, logits(hidden).clone(), hidden) is None


def test_a_head_that_moves_is_bound_again() -> None:
    head = make_head().cpu()
    hidden = states(1)
    assert head(hidden.cpu()).device.type == "cpu"
    head.cuda()
    assert why_wrong(head, head(hidden), hidden) is None
    assert head.explain()["level"] != "torch"


@pytest.mark.usefixtures("racing")
def test_what_was_never_measured_is_raced_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASHTUNE_DB", str(tmp_path / "tuning.db"))
    monkeypatch.setattr("flashtune.kernels.runtime.records.prebuilt_devices", lambda: ())
    head = make_head(tune="race")
    data = head.explain()
    assert (data["level"], data["raced"], data["troubles"]) == ("exact", True, [])
    timed = [each for each in data["race"]["timed"] if each["outcome"] in ("ok", "pruned")]
    assert len(timed) > 1
    assert data["median_us"] <= data["race"]["timed"][0]["median_us"]
    assert data["race"]["seconds"] < 25
    hidden = states(1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = head(hidden)
    graph.replay()
    assert why_wrong(head, out, hidden) is None
    again = make_head(tune="race").explain()
    assert (again["race"], again["config"]) == (None, data["config"])


@pytest.mark.usefixtures("racing")
def test_a_race_takes_no_more_memory_than_it_says_and_unloads_what_it_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASHTUNE_DB", str(tmp_path / "tuning.db"))
    monkeypatch.setattr("flashtune.kernels.runtime.records.prebuilt_devices", lambda: ())
    head = make_head(tune="race")
    modules, _ = loaded()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    data = head.explain()
    taken = torch.cuda.max_memory_allocated() - before
    assert data["raced"] and len(data["race"]["timed"]) > 2
    assert 0 < taken <= data["race"]["most_bytes"]
    assert loaded()[0] - modules <= 3, "only the winner's own"


def test_the_gpu_is_probed_in_under_a_second() -> None:
    where = torch.device("cuda", 0)
    device = device_of(where)
    gauge = Gauge(device, where, 32)
    begun = time.monotonic()
    figures = probe(gauge)
    assert time.monotonic() - begun < 1.0
    assert figures.bandwidth is not None and figures.launch_us is not None
    assert figures.load_us is not None and figures.barrier_us is not None
    assert (figures.overlapped_us is None) == (device.capability < 90)
    if device.memory_bandwidth:
        assert 0.3 < figures.bandwidth / device.memory_bandwidth < 1.1
    for time_us in (figures.launch_us, figures.load_us, figures.barrier_us):
        assert 0.05 < time_us < 50


@pytest.mark.usefixtures("racing")
def test_nothing_is_raced_while_a_stream_is_captured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASHTUNE_DB", str(tmp_path / "tuning.db"))
    head, hidden = make_head(tune="race"), states(1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = head(hidden)
    graph.replay()
    assert not (tmp_path / "tuning.db").exists()
    assert why_wrong(head, out, hidden) is None
