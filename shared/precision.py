"""What models compute in, and how far apart sampler and learner may then be."""

from typing import Literal, NamedTuple

Precision = Literal["float32", "bfloat16"]
FewerBits = Literal["8bit", "4bit"]


class MismatchLimits(NamedTuple):
    """How far sampler and learner may be apart at start, nats: in the mean, and at a high quantile."""

    mean: float
    high: float


MISMATCH_LIMITS: dict[Precision, MismatchLimits] = {
    "float32": MismatchLimits(2e-5, 1e-4),
    "bfloat16": MismatchLimits(0.02, 0.2),
}
"""What each precision keeps with right weights: the engines order their sums differently."""

QUANTIZED_LIMITS: dict[FewerBits, MismatchLimits] = {
    "8bit": MismatchLimits(0.1, 1.0),
    "4bit": MismatchLimits(0.5, 5.0),
}
"""What a learner with rounded weights keeps: enough to tell it from another model."""
