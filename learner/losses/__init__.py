"""GFlowNet objectives: pure functions of padded log-probability tensors, all with one signature."""

from __future__ import annotations

from collections.abc import Callable

from gflowvlm.learner.losses.db import db
from gflowvlm.learner.losses.fl_db import fl_db
from gflowvlm.learner.losses.fl_subtb import fl_subtb
from gflowvlm.learner.losses.flow_db import flow_db
from gflowvlm.learner.losses.flow_subtb import flow_subtb
from gflowvlm.learner.losses.output import LossOutput
from gflowvlm.learner.losses.subtb import subtb
from gflowvlm.learner.losses.tb import tb
from gflowvlm.learner.losses.var_tb import var_tb

LossFunction = Callable[..., LossOutput]

LOSSES: dict[str, LossFunction] = {
    "tb": tb,
    "var_tb": var_tb,
    "db": db,
    "subtb": subtb,
    "flow_db": flow_db,
    "flow_subtb": flow_subtb,
    "fl_db": fl_db,
    "fl_subtb": fl_subtb,
}
"""Name in the run configuration -> loss. All take the same keyword tensors; `tb` also needs `log_z`, the
`flow_*` and `fl_*` losses `log_flow`, and the `*subtb` losses take `subtb_lambda`."""

__all__ = [
    "LOSSES",
    "LossFunction",
    "LossOutput",
    "db",
    "fl_db",
    "fl_subtb",
    "flow_db",
    "flow_subtb",
    "subtb",
    "tb",
    "var_tb",
]
