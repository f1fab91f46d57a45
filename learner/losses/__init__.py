"""GFlowNet objectives: pure functions of padded log-probability tensors, all with one signature."""

from __future__ import annotations

from collections.abc import Callable

from learner.losses.db import db
from learner.losses.output import LossOutput
from learner.losses.subtb import subtb
from learner.losses.tb import tb
from learner.losses.var_tb import var_tb

LossFunction = Callable[..., LossOutput]

LOSSES: dict[str, LossFunction] = {"db": db, "subtb": subtb, "tb": tb, "var_tb": var_tb}
"""Name in the run configuration -> loss. All take the same keyword tensors; `tb` also needs `log_z`,
and `subtb` takes `subtb_lambda`."""

__all__ = ["LOSSES", "LossFunction", "LossOutput", "db", "subtb", "tb", "var_tb"]
