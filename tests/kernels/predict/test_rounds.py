"""The expected rounds of the search for a threshold."""

import pytest

from flashtune.kernels.predict.rounds import mean_rounds


def test_more_slack_takes_fewer_rounds() -> None:
    rounds = [mean_rounds(9496, 256, slack) for slack in (0, 8, 16, 32, 64)]
    assert rounds == sorted(rounds, reverse=True)
    assert len(set(rounds)) == 5
    assert 1 <= rounds[-1] < rounds[0] < 8


@pytest.mark.parametrize(("clusters", "probes", "slack"), [(1, 1, 0), (31, 31, 0), (97, 1, 8)])
def test_odd_sizes_end(clusters: int, probes: int, slack: int) -> None:
    assert 1 <= mean_rounds(clusters, probes, slack) <= 64


def test_a_slack_that_takes_any_count_takes_one_round() -> None:
    assert mean_rounds(40, 1, 64) == 1
