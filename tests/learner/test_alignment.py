"""Teaching a vision tower to write the words of a picture as embeddings of a language model."""

import io
import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image

from gflowvlm.learner.alignment import (
    AlignmentProgress,
    AlignmentSettings,
    VisionAlignment,
    WrittenPicture,
    placed_log_likelihood,
)
from gflowvlm.learner.pretrained_policy import join_pretrained
from gflowvlm.learner.tiny_policy import build_tiny_policy
from tests.learner.made_language_models import tiny_language_model, tiny_tokenizer


@pytest.mark.parametrize("target", [(), (2,), (1, 1), (1, 2, 1), (2, 1, 2, 1)])
def test_all_ways_to_place_the_words_count(target: tuple[int, ...]) -> None:
    scores = torch.log_softmax(torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(1)).double(), dim=-1)
    expected = 0.0
    for row in itertools.product(range(3), repeat=4):
        if tuple(word for word in row if word) == target:
            expected += math.exp(sum(float(scores[0, place, word]) for place, word in enumerate(row)))
    # Beside a longer one, so that it is padded.
    both = placed_log_likelihood(scores.expand(2, -1, -1), [target, (1, 1, 1, 1)])
    assert float(both[0]) == pytest.approx(math.log(expected), abs=1e-5)


def shade(value: int) -> bytes:
    """A picture whose upper and lower half are of one of two shades each."""
    array = np.zeros((64, 64, 3), dtype=np.uint8)
    array[:32], array[32:] = 40 + 160 * (value // 2), 40 + 160 * (value % 2)
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_tower_learns_to_write_words_and_the_language_model_stays(tmp_path_factory: pytest.TempPathFactory) -> None:
    tokenizer = tiny_tokenizer()
    vision = build_tiny_policy(tmp_path_factory.mktemp("vision"), seed=3)
    network, inputs = join_pretrained(tiny_language_model(tokenizer), tokenizer, vision)
    before = {name: weight.clone() for name, weight in network.model.text_model.state_dict().items()}
    pictures = [WrittenPicture(shade(value), (str(value // 2), str(value % 2))) for value in range(4)] * 4
    alignment = VisionAlignment(network, inputs, pictures, AlignmentSettings(steps=60, batch_size=16, warmup_steps=5))
    unread = alignment.share_read()
    seen: list[AlignmentProgress] = []
    alignment.train(seen.append)
    assert unread < 0.5
    assert alignment.share_read() == 1.0
    assert [progress.step for progress in seen] == list(range(1, 61))
    assert seen[-1].loss < 0.5 * seen[0].loss
    after = network.model.text_model.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_pictures_with_more_words_than_image_tokens_are_left_out(tmp_path_factory: pytest.TempPathFactory) -> None:
    tokenizer = tiny_tokenizer()
    vision = build_tiny_policy(tmp_path_factory.mktemp("vision"), seed=3)
    network, inputs = join_pretrained(tiny_language_model(tokenizer), tokenizer, vision)
    with pytest.raises(ValueError, match="no picture"):
        VisionAlignment(network, inputs, [WrittenPicture(shade(0), ("1",) * 17)], AlignmentSettings())
    short = VisionAlignment(network, inputs, [WrittenPicture(shade(0), ("1",) * 16)], AlignmentSettings())
    assert short.share_read() in (0.0, 1.0)
