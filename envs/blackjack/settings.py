"""Blackjack's settings."""

from typing import ClassVar, Literal

from pydantic import Field

from gflowvlm.shared.task_settings import TaskSettings


class BlackjackSettings(TaskSettings):
    """Blackjack: beat the dealer without going over 21."""

    environment: ClassVar[str] = "gflowvlm.envs.blackjack.environment:BlackjackEnv"
    tokenizer_texts: ClassVar[tuple[str, ...]] = (
        "user:\nassistant:\n stand hit dealer player card cards sum total of you are and or a in on with",
        "Beat the dealer without going over 21. hit takes a card, stand and [DONE] end the hand.",
        'Answer: {"dealer": "", "player": "", "total": , "thoughts": "", "action": ""}',
        "State 0: dealer A player 1 Action 0: hit\nActions: stand hit",
    )

    name: Literal["blackjack"] = Field("blackjack", description="Chooses this task.")
