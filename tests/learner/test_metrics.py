import torch

from gflowvlm.learner.distributed import Ranks
from gflowvlm.learner.metrics import StepMetrics

ALONE = Ranks(0, 1, torch.device("cpu"))


def test_sums_means_and_maxima_are_told_apart():
    metrics = StepMetrics(sums={"a": 2.0}, means={"b": (6.0, 4.0)}, maxima={"c": -1.0})
    assert metrics.over_ranks(ALONE) == {"a": 2.0, "b": 1.5, "c": -1.0}


def test_a_mean_of_nothing_is_zero():
    assert StepMetrics(means={"b": (0.0, 0.0)}).over_ranks(ALONE) == {"b": 0.0}


def test_together_the_second_wins():
    both = StepMetrics(means={"loss": (1.0, 1.0)}) | StepMetrics(means={"loss": (2.0, 1.0)}, sums={"n": 1.0})
    assert both.over_ranks(ALONE) == {"loss": 2.0, "n": 1.0}
