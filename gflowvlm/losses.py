"""The GFlowNet losses: pure functions of padded log-probability tensors, all with one signature.

docs/objectives.md says what each is for and what stands behind it. `LOSSES` has them by the name that
``objective.loss`` has; `gflowvlm.api.policy.Policy.loss_inputs` makes their arguments from a run's trajectories.

Example:
    One trajectory of one move, + and then the stop, twice as likely as its reward says:

    >>> import torch
    >>> tensors = dict(
    ...     log_pf=torch.log(torch.tensor([[0.5]])),  # (K, T) of the moves
    ...     log_p_stop=torch.log(torch.tensor([[0.1, 0.8]])),  # (K, T+1) of stopping at the states
    ...     log_reward=torch.log(torch.tensor([[0.1, 0.2]])),  # (K, T+1) of stopping there
    ...     length=torch.tensor([1]),
    ...     stopped=torch.tensor([True]),
    ...     instance=torch.tensor([0]),
    ... )
    >>> output = gflowvlm.losses.tb(**tensors, log_z=torch.tensor([0.0]))
    >>> round(float(output.loss), 3)  # (log 0.5 + log 0.8 - log 0.2)²
    0.48
    >>> sorted(gflowvlm.losses.LOSSES)
    ['db', 'fl_db', 'fl_subtb', 'flow_db', 'flow_subtb', 'subtb', 'tb', 'var_tb']
"""

from gflowvlm.learner.losses import (
    LOSSES,
    LossFunction,
    LossOutput,
    db,
    fl_db,
    fl_subtb,
    flow_db,
    flow_subtb,
    subtb,
    tb,
    var_tb,
)

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
