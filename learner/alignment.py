"""Teaches a vision tower and its connector to write what stands in a picture, in a language model's own words.

The language model is not run. A picture's image tokens, in reading order, are to be the embeddings of the words that
stand in it, with blanks (a line break) between them; which of the tokens says which word is left open, and all ways to
place them count (as in CTC, but a word is never said twice). What the language model then finds at the image tokens
is near to text it can read, so that few demonstrations are enough to teach it the rest.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from gflowvlm.learner.schedule import rate_to_zero
from gflowvlm.shared.pictures import decode_pictures
from gflowvlm.shared.policy_inputs import PolicyInputs
from gflowvlm.shared.settings import Settings

_BLANK = "\n"
_IMPOSSIBLE = -1e9
_CHUNK = 256


class AlignmentSettings(Settings):
    """Training of a vision tower and its connector on the words in pictures."""

    steps: int = Field(1200, ge=1, le=10_000_000)
    batch_size: int = Field(64, ge=1, le=65_536)
    learning_rate: float = Field(2e-3, gt=0, le=1, description="Peak; a cosine takes it to 0.")
    warmup_steps: int = Field(50, ge=0)
    weight_decay: float = Field(0.01, ge=0, le=1)
    grad_clip: float = Field(5.0, gt=0, le=1e6)
    sharpness: float = Field(
        8.0,
        gt=0,
        le=1000,
        description="How many nats apart two words are that are as far apart as words are on average.",
    )
    seed: int = Field(0, ge=0, lt=2**31)


@dataclass(frozen=True)
class WrittenPicture:
    """A picture and what stands in it.

    Attributes:
        image: The encoded picture.
        words: The words in it, in reading order.
    """

    image: bytes
    words: tuple[str, ...]


@dataclass(frozen=True)
class AlignmentProgress:
    """One optimiser step.

    Attributes:
        step: Steps done.
        loss: Negative log-likelihood of the words of a picture, plus how far image tokens are from any word.
    """

    step: int
    loss: float


class VisionAlignment:
    """The training of one model's vision tower and connector; its language model stays as it is.

    Attributes:
        settings: The settings.
    """

    def __init__(
        self, network: Any, inputs: PolicyInputs, pictures: Sequence[WrittenPicture], settings: AlignmentSettings
    ) -> None:
        """Sets the training up.

        Args:
            network: An Idefics3.
            inputs: Its processor.
            pictures: What is learned from; at least one. Those with more tokens than a picture has are left out.
            settings: The settings.
        """
        self.settings = settings
        self._network = network
        self._processor = inputs.processor
        self._slots = int(inputs.processor.image_seq_len)
        spelled = [(p.image, [i for word in p.words for i in _tokens(inputs, word)]) for p in pictures]
        kept = [(image, ids) for image, ids in spelled if len(ids) <= self._slots]
        if len(kept) == 0:
            raise ValueError("no picture with words that its image tokens could hold")
        (blank,) = _tokens(inputs, _BLANK)
        vocabulary = sorted({i for _, ids in kept for i in ids} - {blank})
        place = {token: number for number, token in enumerate([blank, *vocabulary])}
        self._targets = [[place[i] for i in ids] for _, ids in kept]
        # Half the memory; pixel values lie between -1 and 1.
        self._pixels = torch.cat([self._read([image for image, _ in kept[at : at + _CHUNK]]) for at in _starts(kept)])
        self._words = network.get_input_embeddings().weight.detach()[[blank, *vocabulary]].float()
        self._spread = _mean_distance(self._words[1:] if len(vocabulary) > 1 else self._words)

    def train(self, on_step: Callable[[AlignmentProgress], None]) -> None:
        """Trains to the last step.

        Args:
            on_step: Called after each step.
        """
        settings, model = self.settings, self._network.model
        parameters = [*model.vision_model.parameters(), *model.connector.parameters()]
        optimizer = torch.optim.AdamW(
            parameters, lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=settings.weight_decay
        )
        rng = np.random.default_rng(settings.seed)
        for step in range(settings.steps):
            for group in optimizer.param_groups:
                group["lr"] = rate_to_zero(settings, step)
            chosen = rng.integers(0, len(self._targets), settings.batch_size).tolist()
            distances = self._distances(chosen)
            scores = torch.log_softmax(-self.settings.sharpness * distances, dim=-1)
            said = placed_log_likelihood(scores, [self._targets[i] for i in chosen]).mean()
            loss = -said + 0.5 * distances.min(dim=-1).values.mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, settings.grad_clip)
            optimizer.step()
            on_step(AlignmentProgress(step + 1, float(loss.detach())))

    def share_read(self, limit: int = 1024) -> float:
        """Returns the share of pictures, of the first few, whose image tokens are nearest to exactly their words."""
        chosen = list(range(min(limit, len(self._targets))))
        right = 0
        with torch.no_grad():
            for at in range(0, len(chosen), _CHUNK):
                part = chosen[at : at + _CHUNK]
                nearest = self._distances(part).argmin(dim=-1).tolist()
                right += sum([w for w in row if w] == self._targets[i] for row, i in zip(nearest, part, strict=True))
        return right / len(chosen)

    def _distances(self, chosen: Sequence[int]) -> Tensor:
        """Returns squared distances, in units of the words' own: of shape (pictures, image tokens, words)."""
        pixels = self._pixels[list(chosen)].to(self._network.device, torch.float32)
        said = self._network.model.get_image_features(pixels).pooler_output
        said = said.reshape(len(chosen), self._slots, -1)
        return torch.cdist(said, self._words.to(said.device)).square() / self._spread

    def _read(self, images: Sequence[bytes]) -> Tensor:
        pictures = [decode_pictures(image) for image in images]
        return self._processor.image_processor(pictures, return_tensors="pt")["pixel_values"].half()


def placed_log_likelihood(scores: Tensor, targets: Sequence[Sequence[int]]) -> Tensor:
    """Returns log of the sum, over all ways to place a target's words in order, of their probability.

    Args:
        scores: Log-probabilities of words at each place, (N, places, words); word 0 is the blank.
        targets: N sequences of words other than 0, each at most as long as there are places.

    Returns:
        Shape (N,), nats.
    """
    longest = max(len(target) for target in targets)
    padded = torch.tensor([[*target, *[0] * (longest - len(target))] for target in targets], device=scores.device)
    lengths = torch.tensor([len(target) for target in targets], device=scores.device)
    # Column j: the first j words are placed.
    begun = torch.full((len(targets), longest + 1), _IMPOSSIBLE, device=scores.device)
    begun[:, 0] = 0.0
    for place in range(scores.shape[1]):
        stay = begun + scores[:, place, :1]
        if longest > 0:
            say = begun[:, :-1] + scores[:, place].gather(1, padded)
            begun = torch.cat([stay[:, :1], torch.logaddexp(stay[:, 1:], say)], dim=1)
        else:
            begun = stay
    return begun.gather(1, lengths[:, None])[:, 0]


def _tokens(inputs: PolicyInputs, word: str) -> list[int]:
    return list(inputs.tokenizer.encode(word, add_special_tokens=False))


def _starts(items: Sequence[Any]) -> range:
    return range(0, len(items), _CHUNK)


def _mean_distance(words: Tensor) -> float:
    squared = torch.cdist(words, words).square()
    return float(squared.sum() / max(1, len(words) * (len(words) - 1)))
