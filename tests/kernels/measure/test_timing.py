import gc
import weakref

import pytest
import torch

from flashtune.kernels.measure.timing import BehindTimer, GraphTimer
from flashtune.kernels.measure.workload import Workload
from flashtune.kernels.weights import Weights
from flashtune.tuning_db.problem import Problem

PROBLEM = Problem(vocab_size=512, hidden_size=64, n_clusters=32, n_probes=4, n_tokens=2)


@pytest.fixture
def workload() -> Workload:
    return Workload.create(PROBLEM, torch.device("cuda"), cold_bytes=0, seed=1)


@pytest.mark.gpu
@pytest.mark.parametrize("make", [GraphTimer, BehindTimer])
def test_each_call_of_a_graph_has_its_own_weights_states_and_output(make, workload) -> None:
    def step(weights: Weights, hidden: torch.Tensor, out: torch.Tensor) -> None:
        first = weights.centroids[0].double() @ hidden.double().T
        out.copy_((1000 * first).long())

    timer = make(step, workload)
    n_sets = len(workload.sets)
    assert n_sets == 2 and timer.calls % n_sets == 0
    for sets in workload.sets:  # what was captured reads them when it is replayed
        sets.centroids[0].fill_(0.5)
    outs = timer.out
    for out in outs:
        out.fill_(-1)
    assert len(timer.sample(3)) == 3
    for call, out in enumerate(outs):
        states = workload.states[call % n_sets]
        wanted = (1000 * states.double().sum(dim=1) / 2).long()
        assert out.tolist() == wanted.tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("make", [GraphTimer, BehindTimer])
def test_a_timer_keeps_what_its_graph_runs_on(make, workload) -> None:
    class Step:
        def __init__(self) -> None:
            self.scratch = torch.zeros(4, device="cuda")

        def __call__(self, weights: Weights, hidden: torch.Tensor, out: torch.Tensor) -> None:
            self.scratch.add_(1)

    step = Step()
    scratch = weakref.ref(step.scratch)
    timer = make(step, workload)
    del step
    gc.collect()
    assert scratch() is not None
    del timer
    gc.collect()
    assert scratch() is None


@pytest.mark.gpu
def test_the_time_of_the_kernel_before_a_step_is_taken_off(workload) -> None:
    def nothing(weights: Weights, hidden: torch.Tensor, out: torch.Tensor) -> None:
        pass

    def much(weights: Weights, hidden: torch.Tensor, out: torch.Tensor) -> None:
        torch.cuda._sleep(200_000)  # cycles: more than 50 us of any GPU

    assert max(BehindTimer(much, workload).sample(3)) > 50
    assert abs(min(BehindTimer(nothing, workload).sample(5))) < 10
