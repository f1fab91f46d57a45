"""Which rows of a final report are of which policy."""

import itertools

from gflowvlm.run.final_report import before_and_after, measured_on, ordered


def row(split, version, success=0.5):
    return {"split": split, "version": version, "success": success}


def test_rows_are_told_apart_in_whatever_order_they_were_played():
    rows = [row(split, version) for split in ("id", "ood") for version in (0, 3)]
    for played in itertools.permutations(rows):
        assert before_and_after(played, 3) == {split: (row(split, 0), row(split, 3)) for split in ("id", "ood")}
        assert ordered(played, 3) == rows


def test_where_the_base_model_stayed_best_both_rows_are_of_it():
    first, second = row("id", 0, 0.25), row("id", 0, 0.5)
    assert before_and_after([first, second], 0) == {"id": (first, second)}
    assert ordered([first, second], 0) == [first, second]


def test_a_missing_row_is_none():
    assert before_and_after([row("id", 3)], 3) == {"id": (None, row("id", 3))}
    assert before_and_after([row("id", 0)], 3) == {"id": (row("id", 0), None)}


def test_alfworlds_report_says_which_games_it_plays():
    assert measured_on(["numberline"]) == measured_on([])
    assert "neither in training" in measured_on(["numberline"])
    assert "neither" not in measured_on(["alfworld"])
    assert "neither" in (both := measured_on(["numberline", "alfworld"]))
    assert "`task.seen_games` says which" in both
