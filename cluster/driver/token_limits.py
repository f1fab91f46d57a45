"""Trajectories that a limit of tokens cut off: counted, and said once of each kind."""

from collections import Counter
from collections.abc import Callable, Iterable

from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.trajectory import EndReason


class TokenLimits:
    """Counts them.

    Args:
        config: The run's configuration.
        say: Called with the warning, at the first of each kind.
    """

    def __init__(self, config: RunConfig, say: Callable[[str], None]) -> None:
        self._config, self._say = config, say
        self._ends: Counter[EndReason] = Counter()

    @property
    def counts(self) -> dict[str, int]:
        """The metrics ``responses_cut`` and ``prompts_too_long``."""
        return {
            "responses_cut": self._ends[EndReason.RESPONSE_CUT],
            "prompts_too_long": self._ends[EndReason.PROMPT_TOO_LONG],
        }

    def note(self, ends: Iterable[EndReason]) -> None:
        """Takes in why trajectories ended."""
        for end in ends:
            if end.by_token_limit and self._ends[end] == 0:
                self._say(self._warning(end))
            self._ends[end] += 1

    def _warning(self, end: EndReason) -> str:
        longest = f"sampler.max_model_len ({self._config.sampler.max_model_len})"
        if end is EndReason.PROMPT_TOO_LONG:
            return (
                f"a prompt left no room for a response in {longest}: such trajectories are incomplete and count as "
                "prompts_too_long; raise it, shorten task.max_steps, or set task.prompt=markov"
            )
        return (
            f"a response was cut off at policy.max_response_tokens ({self._config.policy.max_response_tokens}), or at "
            f"what its prompt left of {longest}: such trajectories are incomplete and count as responses_cut; raise "
            "the limit where they are many"
        )
