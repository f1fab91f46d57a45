"""Blackjack: gymnasium's rules, what stopping means, rewards, pictures."""

from collections import Counter
from fractions import Fraction
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from gymnasium.envs.toy_text.blackjack import BlackjackEnv as GymnasiumBlackjack

from gflowvlm.envs.blackjack import cards, rendering
from gflowvlm.envs.blackjack.cards import RANKS, SUITS, Card
from gflowvlm.envs.blackjack.environment import BlackjackEnv
from gflowvlm.envs.blackjack.settings import BlackjackSettings
from gflowvlm.shared.response import DONE_TOKEN
from gflowvlm.shared.trajectory import EndReason
from tests.shared.json_answers import parse_response


def dealt(ranks: str, **changes: object) -> BlackjackEnv:
    """Returns an environment with a chosen deck: dealer's two cards, player's two, then the rest."""
    env = BlackjackEnv(BlackjackSettings.model_validate(changes))
    env.reset(seed=0)
    filled = (ranks.replace(" ", "") + "2" * cards.DECK_SIZE)[: cards.DECK_SIZE]
    env.deck = tuple(Card(rank, SUITS[place % 4]) for place, rank in enumerate(filled))
    env._picture = None
    return env


class _Stacked:
    """Stands for gymnasium's random generator and deals the cards of a deck."""

    def __init__(self, deck: tuple[Card, ...]) -> None:
        self._values = iter([card.value for card in deck])

    def choice(self, options: list[Any]) -> Any:
        return next(self._values) if len(options) == len(RANKS) else options[0]


def test_hands_are_played_and_settled_as_by_gymnasium_itself() -> None:
    env, rng = BlackjackEnv(), np.random.default_rng(0)
    theirs = GymnasiumBlackjack(sab=True)
    results = Counter()
    for seed in range(1500):
        env.reset(seed=seed)
        theirs.np_random = _Stacked(env.deck)
        (total, dealer, _), _ = theirs.reset()
        while env.end is None:
            assert (cards.total(env.player), env.deck[0].value) == (total, dealer)
            action = "hit" if rng.random() < 0.5 else "stand"
            reward = env.advance(action)
            (total, dealer, _), their_reward, terminated, _, _ = theirs.step(int(action == "hit"))
            assert (reward, env.end is EndReason.ENVIRONMENT) == (their_reward, terminated)
        results[reward, env.outcome.split()[0]] += 1
    assert set(results) == {(1.0, "win"), (0.0, "draw"), (-1.0, "lose"), (-1.0, "bust")}


def test_ace_and_ten_at_once_beat_a_later_21_but_not_another_ace_and_ten() -> None:
    assert cards.settled(dealt("6 5 A K T").deck, 0) == 1
    assert cards.settled(dealt("A Q A K").deck, 0) == 0
    assert cards.settled(dealt("A Q 5 6 T").deck, 1) == 0


def test_decks_are_independent_uniform_cards() -> None:
    ranks, suits, pairs = Counter(), Counter(), Counter()
    for seed in range(400):
        deck = cards.draw_deck(np.random.default_rng(seed))
        ranks.update(card.rank for card in deck)
        suits.update(card.suit for card in deck)
        pairs.update(a == b for a, b in pairwise(deck))
    drawn = 400 * cards.DECK_SIZE
    assert all(ranks[r] / drawn == pytest.approx(1 / 13, abs=0.01) for r in RANKS)
    assert all(suits[s] / drawn == pytest.approx(1 / 4, abs=0.015) for s in SUITS)
    assert pairs[True] / pairs.total() == pytest.approx(1 / 52, abs=0.005)


@pytest.mark.parametrize(
    ("deck", "r", "reward", "outcome"),
    [("T 7 T 9", 1, 20.0, "win 19"), ("T 9 T 9", 0, 10.0, "draw 19"), ("T 9 T 8", -1, 1e-10, "lose 18")],
)
def test_stand_and_done_settle_the_hand_alike(deck: str, r: int, reward: float, outcome: str) -> None:
    for action, end in (("stand", EndReason.ENVIRONMENT), (DONE_TOKEN, EndReason.DONE)):
        env = dealt(deck)
        assert np.exp(env.log_reward) == pytest.approx(reward)
        assert env.step(action)[1] == r
        assert np.exp(env.log_reward) == pytest.approx(reward)
        assert (env.end, env.outcome, env.success) == (end, outcome, r == 1)


def test_every_state_is_worth_what_standing_there_would_give() -> None:
    env = dealt("T 7 5 6 8 9")
    assert env.outcome == "lose 11"
    env.step("hit")
    assert (env.outcome, env.result) == ("win 19", 1)
    assert np.exp(env.log_reward) == pytest.approx(20.0)
    assert not env.success
    assert env.step("hit")[1:4] == (-1.0, True, False)
    assert (env.end, env.outcome, env.success) == (EndReason.ENVIRONMENT, "bust", False)
    assert env.log_reward == env.log_reward_floor == pytest.approx(np.log(1e-10))


def test_an_invalid_response_costs_as_much_as_a_lost_hand() -> None:
    env = dealt("T 7 T 9")
    assert env.step("double")[1] == -1.0
    assert np.exp(env.log_reward) == pytest.approx(1e-10)


def test_the_step_limit_cuts_a_hand_off_and_it_counts_as_it_stands() -> None:
    env = dealt("T 7 5 6 8", max_steps=1)
    assert env.step("hit")[1:4] == (0.0, False, True)
    assert (env.end, env.outcome, env.success) == (EndReason.STEP_LIMIT, "win 19", True)
    env = dealt("T 7 T 9", max_steps=1)
    env.step("hit")
    assert env.end is EndReason.STEP_LIMIT
    env = dealt("T 7 T 9 T", max_steps=1)
    env.step("hit")
    assert env.end is EndReason.ENVIRONMENT


@cache
def final_score(hard: int, ace: bool) -> dict[int, Fraction]:
    """Probabilities of what drawing to 17 comes to, 0 for a bust."""
    count = hard + 10 if ace and hard <= 11 else hard
    if count >= 17:
        return {count if count <= 21 else 0: Fraction(1)}
    odds: dict[int, Fraction] = Counter()
    for value in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 10, 10, 10):
        for score, p in final_score(hard + value, ace or value == 1).items():
            odds[score] += p / 13
    return odds


def value_of_the_17_rule() -> dict[int, float]:
    """Probabilities of winning, drawing and losing, exactly."""
    hands: dict[tuple[int, bool], Fraction] = Counter()
    values = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 10, 10, 10)
    for a in values:
        for b in values:
            for score, p in final_score(a + b, 1 in (a, b)).items():
                hands[score, {a, b} == {1, 10}] += p / 169
    odds = dict.fromkeys((1, 0, -1), Fraction(0))
    for (mine, natural), p in hands.items():
        for (theirs, theirs_natural), q in hands.items():
            ahead = natural and not theirs_natural
            odds[-1 if mine == 0 else 1 if ahead or mine > theirs else 0 if mine == theirs else -1] += p * q
    return {r: float(p) for r, p in odds.items()}


def test_expert_is_the_17_rule_and_wins_as_often_as_its_exact_value() -> None:
    exact = value_of_the_17_rule()
    assert exact == pytest.approx({1: 0.411, 0: 0.102, -1: 0.487}, abs=5e-4)
    env, results, ends, hands = BlackjackEnv(), Counter[int](), Counter[str](), 6000
    for seed in range(hands):
        env.instance_seed = seed
        env._begin()
        while env.end is None:
            action = env.expert_action()
            assert (action == "hit") == (cards.total(env.player) < 17)
            ends[action] += 1
            env.advance(action)
        assert env.success == (env.result == 1)
        results[env.result] += 1
    assert ends["stand"] / (ends["stand"] + ends["[DONE]"]) == pytest.approx(0.5, abs=0.04), "both are demonstrated"
    assert set(ends) == {"hit", "stand", "[DONE]"}
    for r, p in exact.items():
        assert results[r] / hands == pytest.approx(p, abs=4 * np.sqrt(p * (1 - p) / hands))


def test_history_tells_past_hands_by_value_but_not_the_current_one() -> None:
    env = dealt("A 7 5 K 2 3")
    assert "State 0: picture" in env.prompt()
    env.step("hit")
    env.step("hit")
    assert (
        "State 0: dealer A player 5 10 Action 0: hit\nState 1: dealer A player 5 10 2 Action 1: hit\nState 2: picture\n"
        in env.prompt()
    )


@pytest.mark.parametrize(
    ("deck", "fields", "words"),
    [
        ("K 2 5 9", {"dealer": "10", "player": "5 9", "total": 14}, {"below", "less", "before"}),
        ("A 2 A 6", {"dealer": "A", "player": "A 6", "total": 17}, {"equal", "same", "matches"}),
        ("3 2 A J", {"dealer": "3", "player": "A 10", "total": 21}, {"above", "more", "after"}),
    ],
)
def test_demonstrations_read_the_cards_and_compare_the_total_with_17(
    deck: str, fields: dict[str, object], words: set[str]
) -> None:
    parsed = [parse_response(text) for text in dealt(deck).demonstrations("hit")]
    assert all(p.fields == fields for p in parsed)
    assert all(p.thoughts.startswith(f"{fields['total']} ") and p.thoughts.endswith(" 17") for p in parsed)
    assert {next(w for w in words if w in p.thoughts.split()) for p in parsed} == words


@pytest.mark.parametrize("size", [64, 100, 336])
def test_the_hole_card_is_hidden_until_the_player_stands(size: int) -> None:
    some, other = dealt("T 7 9 8", image_size=size), dealt("T 8 9 8", image_size=size)
    assert some.image_png() == other.image_png()
    assert dealt("9 7 9 8", image_size=size).image_png() != some.image_png()
    some.step("stand")
    other.step("stand")
    assert some.image_png() != other.image_png()
    bust = [dealt(deck, image_size=size) for deck in ("T 7 9 8 K", "T 8 9 8 K")]
    for env in bust:
        env.step("hit")
        assert env.end is EndReason.ENVIRONMENT
    assert bust[0].image_png() == bust[1].image_png()


@pytest.mark.parametrize(("size", "corner"), [(64, (11, 12)), (336, (26, 28))])
@pytest.mark.parametrize("others", [0, 1, 4])
def test_every_card_shows_its_rank_and_suit_however_many_lie_on_it(
    size: int, corner: tuple[int, int], others: int
) -> None:
    covering = [Card("5", "C")] * others
    hands = [[Card(rank, suit), *covering] for rank in RANKS for suit in SUITS]
    pictures = {rendering.draw([None], hand, size).tobytes() for hand in hands}
    assert len(pictures) == 52
    corners = set()
    for hand in hands[::4]:
        picture = np.array(rendering.draw([None], hand, size).convert("L"))
        # The rank stands above the suit, at the upper end of the strip that no other card covers.
        corners.add((picture[size // 2 : size // 2 + corner[1], : corner[0]] < 200).tobytes())
    assert len(corners) == 13


def test_the_longest_hand_is_drawn_whole() -> None:
    env = dealt("T 7" + "A" * 40, max_steps=64)
    while env.end is None:
        env.step("hit")
    assert (len(env.player), env.outcome) == (22, "bust")
    lower = np.array(env.picture())[env.image_size // 2 :].reshape(-1, 3)
    assert (np.abs(lower.astype(int) - rendering.TABLE).sum(axis=1) > 60).any()
    with_one_less = rendering.draw((None, env.deck[0]), env.player[:-1], env.image_size)
    assert with_one_less.tobytes() != env.picture().tobytes()
