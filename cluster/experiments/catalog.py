"""All experiments, by name."""

import difflib

from cluster.experiments.alfworld import ALFWORLD
from cluster.experiments.cot_weight import COT_WEIGHT
from cluster.experiments.description import Experiment
from cluster.experiments.efficiency import EFFICIENCY
from cluster.experiments.markovian import MARKOVIAN
from cluster.experiments.motivating import MOTIVATING
from cluster.experiments.numberline_blackjack import NUMBERLINE_BLACKJACK
from shared.errors import UserError

EXPERIMENTS = {
    experiment.name: experiment
    for experiment in (MOTIVATING, NUMBERLINE_BLACKJACK, ALFWORLD, MARKOVIAN, COT_WEIGHT, EFFICIENCY)
}


def find_experiment(name: str) -> Experiment:
    """Returns the experiment of a name.

    Raises:
        UserError: There is none.
    """
    if name not in EXPERIMENTS:
        close = difflib.get_close_matches(name, EXPERIMENTS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(EXPERIMENTS)}"
        raise UserError(f"experiment {name!r}: no such experiment; {hint}")
    return EXPERIMENTS[name]
