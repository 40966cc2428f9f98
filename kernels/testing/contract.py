"""The contract of decode steps: what every plan on every kind of device must do.

Usage:
    class TestMyBackend(DecodeContract):
        @pytest.fixture(params=[MyConfig(), MyConfig(rows=64)], ids=str)
        def config(self, request):
            return request.param

        @pytest.fixture
        def runner(self):
            with PLANS.added(MY_PLAN), TARGETS.added(MY_TARGET):
                yield Runner(device=MY_DEVICE)
"""

from flashtune.kernels.testing.plain import PlainHeads
from flashtune.kernels.testing.screened import ScreenedHeads


class DecodeContract(PlainHeads, ScreenedHeads):
    """Inherit from this in a test module: pytest then runs every check on your runner and configs.

    Answers are judged in float64. A check is skipped only if a rule of the plan refuses its
    problem for a reason that `may_refuse` matches.
    """
