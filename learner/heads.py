"""What some objectives learn besides the policy: log Z(g), a state's flow or value, read off its hidden state.

The head sits on the last hidden state of a prompt's last token, which has seen the whole state z_t and nothing
of the response. It is part of the learner only: saved with a checkpoint, never with the adapter.
"""

from __future__ import annotations

import math
from enum import StrEnum

import torch
from torch import Tensor, nn

HIDDEN = 128
"""Width inside the head."""


class HeadKind(StrEnum):
    """What a head's number means; nats unless said otherwise."""

    LOG_Z = "log_z"
    """log Z_φ(g), at a trajectory's first state (Malkin et al. 2022, arXiv 2201.13259)."""
    LOG_FLOW = "log_flow"
    """log F_φ(z_t), at every visited state (Bengio et al. 2023, arXiv 2111.09266)."""
    LOG_FLOW_AHEAD = "log_flow_ahead"
    """log F̃_φ(z_t) = log F(z_t) − log R(z_t ⊤): what is still to come (Pan et al. 2023, arXiv 2302.01687)."""
    VALUE = "value"
    """V_φ(z_t), the expected return of PPO; in rewards, not in nats."""


HEAD_OF_LOSS: dict[str, HeadKind] = {
    "tb": HeadKind.LOG_Z,
    "flow_db": HeadKind.LOG_FLOW,
    "flow_subtb": HeadKind.LOG_FLOW,
    "fl_db": HeadKind.LOG_FLOW_AHEAD,
    "fl_subtb": HeadKind.LOG_FLOW_AHEAD,
}
"""GFlowNet losses with a head -> what it learns. The other losses have none."""


class StateHead(nn.Module):
    """A scalar of a state: ``centre + MLP(LayerNorm(hidden state))``, float32, nats.

    `centre` is a constant that the first batch sets (`centre_on`): log-flows are tens of nats, which a small
    network that starts at zero would need many steps to reach. The MLP starts at exactly zero, so that it
    disturbs the policy's features only as far as it has learned something.

    Args:
        kind: What the number means.
        features: Width of the hidden states.
        seed: Seed of the initialisation.
    """

    def __init__(self, kind: HeadKind, features: int, seed: int) -> None:
        super().__init__()
        self.kind = kind
        # The fork keeps the caller's random state.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.norm = nn.LayerNorm(features)
            self.inner = nn.Linear(features, HIDDEN)
            self.outer = nn.Linear(HIDDEN, 1)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)
        self.centre: Tensor
        self.register_buffer("centre", torch.zeros(()))

    def forward(self, hidden: Tensor) -> Tensor:
        """(N, features) hidden states of any precision -> (N,) nats."""
        inner = nn.functional.gelu(self.inner(self.norm(hidden.float())))
        return self.centre + self.outer(inner).squeeze(-1)

    def centre_on(self, estimates: Tensor) -> None:
        """Sets the constant to the median of estimates of what the head learns.

        The median, because a few invalid ends at a floor of −1000 nats would drag a mean out of all sense.

        Args:
            estimates: (K,) nats; those that are not finite are left out. Without any, the constant stays.
        """
        finite = estimates[estimates.isfinite()]
        if finite.numel() > 0:
            self.centre.fill_(float(finite.median()))

    def named_trainable(self) -> list[tuple[str, nn.Parameter]]:
        """Returns the trainable parameters by name, in one fixed order; the names start with the head's kind."""
        return [(f"{self.kind}.{name}", parameter) for name, parameter in self.named_parameters()]


def first_estimates(
    *, log_pf: Tensor, log_p_stop: Tensor, log_reward: Tensor, length: Tensor, stopped: Tensor, ahead: bool
) -> Tensor:
    """Estimates, of the log-flow through every state, by what followed it in the one trajectory at hand.

    F(z_t) · Π_{k≥t} P_F(k) = R(x) where balance holds (P_B = 1). A cut-off trajectory stands as if it had ended.

    Args:
        log_pf: (K, T), as the losses take it; so are the other tensors.
        log_p_stop: (K, T+1).
        log_reward: (K, T+1).
        length: (K,).
        stopped: (K,) bool.
        ahead: Estimate log F − log R_t instead.

    Returns:
        (K, T+1) nats; NaN in the padding.
    """
    state = torch.arange(log_reward.shape[1])
    steps = torch.where(state[:-1] < length[:, None], log_pf, 0.0)
    to_go = torch.nn.functional.pad(steps.flip(1).cumsum(dim=1).flip(1), (0, 1))
    last = length[:, None]
    end = log_reward.gather(1, last) - torch.where(stopped[:, None], log_p_stop.gather(1, last), 0.0)
    estimates = end - to_go
    if ahead:
        estimates = estimates - log_reward
    return torch.where(state <= last, estimates, math.nan)
