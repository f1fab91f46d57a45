"""All experiments, by name."""

import difflib

from gflowvlm.shared.errors import UserError
from gflowvlm.studies.experiments.alfworld import ALFWORLD
from gflowvlm.studies.experiments.cot_weight import COT_WEIGHT
from gflowvlm.studies.experiments.description import Experiment
from gflowvlm.studies.experiments.efficiency import EFFICIENCY
from gflowvlm.studies.experiments.markovian import MARKOVIAN
from gflowvlm.studies.experiments.motivating import MOTIVATING
from gflowvlm.studies.experiments.numberline_blackjack import NUMBERLINE_BLACKJACK

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
