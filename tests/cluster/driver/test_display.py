import io

import pytest
from rich.console import Console

from gflowvlm.cluster.driver.display import RunDisplay, evaluation_lines


def test_without_a_terminal_there_are_plain_lines():
    out = io.StringIO()
    with RunDisplay(Console(file=out, width=200), total=5) as display:
        display.say("policy server is up")
        display.update(step=1, version=1, loss=2.5, success=0.5)
        display.update(step=2, version=2, loss=2.0)
    lines = out.getvalue().splitlines()
    assert lines[0] == "policy server is up"
    assert lines[1].startswith("step 1/5  success 0.50  loss 2.50  version 1")
    assert "\x1b" not in out.getvalue()
    assert len(lines) == 2


def test_on_a_terminal_there_is_a_bar():
    out = io.StringIO()
    with RunDisplay(Console(file=out, width=200, force_terminal=True), total=5) as display:
        display.update(step=3, version=3, loss=2.5)
    assert "step 3/5" in out.getvalue()


def test_80_columns_hold_the_step_the_bar_the_time_left_and_all_figures():
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=True, color_system=None)
    with RunDisplay(console, total=1000) as display:
        display.update(
            step=999,
            version=999,
            loss=12.25,
            success=0.5,
            staleness=1.8,
            tokens_per_s=1130.0,
            env_steps=123456,
            note="evaluating",
        )
    *_, bar, figures = out.getvalue().replace("\x1b[?25h", "").rstrip().splitlines()
    assert "step 999/1000 ━" in bar
    assert bar.rstrip().endswith("-:--:-- left  123456 env steps  evaluating")
    assert figures == "success 0.50  loss 12.25  version 999  staleness 1.8  1130 tokens/s"


@pytest.mark.parametrize(
    ("malformed", "cut", "end", "warnings"),
    [
        (0.0, 0.0, "Div@8 4.00", []),
        (0.04, 0.0, "malformed responses 4%", []),
        (0.6, 0.0, "60%", ["learning_rate"]),
        (0.0, 0.05, "cut off by a limit of tokens 5%", []),
        (0.3, 0.3, "30%", ["sampler.max_model_len", "learning_rate"]),
    ],
)
def test_an_evaluation_says_malformed_and_cut_off_responses_and_warns_of_many(malformed, cut, end, warnings):
    row = {"step": 20, "success": 0.5, "success_bound": None, "success_greedy": 1.0, "samples": 8, "div_at_n": 4.0}
    first, *others = evaluation_lines({**row, "malformed_rate": malformed, "cut_rate": cut})
    assert first.startswith("evaluation at step 20: success 0.50, greedy 1.00, ")
    assert first.endswith(end)
    assert len(others) == len(warnings)
    assert all(word in line for word, line in zip(warnings, others, strict=True))


def test_a_model_that_lacks_the_form_before_training_is_not_told_to_learn_slower():
    row = {"step": 0, "success": 0.0, "success_bound": None, "success_greedy": 0.0, "samples": 8, "div_at_n": 0.0}
    _, warning = evaluation_lines({**row, "malformed_rate": 0.9, "cut_rate": 0.0})
    assert "gflowvlm sft" in warning
    assert "learning_rate" not in warning
