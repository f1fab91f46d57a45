"""A policy of a run in this process: scores trajectories, answers prompts."""

from __future__ import annotations

import io
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from PIL import Image

from gflowvlm.actors.event_loop import EventLoopThread
from gflowvlm.actors.sampling import SampleRequest
from gflowvlm.actors.transformers_sampler import TransformersSampler
from gflowvlm.learner.model import load_adapted, reference_policy
from gflowvlm.learner.packing import steps_of
from gflowvlm.learner.scoring import LOG_ACT, LOG_COT, LOG_STOP, Scorer
from gflowvlm.learner.targets import Target, is_malformed, loss_inputs
from gflowvlm.run.models import resolve_model
from gflowvlm.shared.answer_formats import answer_format
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.device import on_this_machine, sampler_device
from gflowvlm.shared.errors import UserError, one_line
from gflowvlm.shared.policy_inputs import PolicyInputs
from gflowvlm.shared.trajectory import BASE_VERSION, Trajectory

HeadlessLoss = Literal["var_tb", "db", "subtb"]
"""Losses that learn nothing besides the policy."""


@dataclass(frozen=True)
class Response:
    """What a policy answered.

    Attributes:
        text: The whole answer; the end token is left out.
        thoughts: Its chain of thought; empty where there is none, or where it is malformed.
        fields: What else it says, by key.
        action: The action; None where the answer is malformed.
        token_ids: The tokens as they were sampled.
        log_probs: Log-probability of each token (nats), at temperature 1 whatever was sampled at.
        version: The policy version that answered.
    """

    text: str
    thoughts: str
    fields: dict[str, Any]
    action: str | None
    token_ids: list[int]
    log_probs: list[float]
    version: int

    @property
    def log_prob(self) -> float:
        """Log-probability of the whole answer, nats."""
        return sum(self.log_probs)


@dataclass(frozen=True)
class StepScore:
    """How likely a policy finds one response of a trajectory; log-probabilities in nats.

    With γ = ``policy.cot_weight``, log P_F = log P_Act + γ log P_CoT (GFlowVLM eq. 5).

    Attributes:
        log_pf: log P_F of the action that was taken.
        log_p_stop: log P_F of stopping at this state instead, after the same thoughts; None where the response
            is malformed and has no action.
        log_p_act: log P_Act, of the action's tokens; 0 where the response is malformed.
        log_p_cot: log P_CoT, of the tokens before the action; of all tokens where the response is malformed.
        token_log_probs: Log-probability of every response token.
    """

    log_pf: float
    log_p_stop: float | None
    log_p_act: float
    log_p_cot: float
    token_log_probs: list[float]


@dataclass(frozen=True)
class TrajectoryScore:
    """How likely a policy finds a trajectory.

    Attributes:
        trajectory_id: Which one.
        steps: One score a response, in order.
    """

    trajectory_id: str
    steps: list[StepScore]

    @property
    def log_pf(self) -> float:
        """Sum of log P_F over all responses, a chosen stop included; nats."""
        return sum(step.log_pf for step in self.steps)


class Policy:
    """One policy of a run: its base model, with an adapter unless it is version 0.

    Made by `gflowvlm.Run.policy`. The model is loaded when it is first needed, once to score and once to
    respond; `close`, or a ``with`` block, frees it. It computes on a GPU where the run's samplers did
    (``sampler.gpus_per_replica``) and this machine has one, else on the CPU.

    Attributes:
        config: The run's configuration, without GPUs where this machine has none.
        version: Policy version; 0 is the base model.
        adapter: Folder of its adapter in PEFT format; None for the base model.

    Example:
        >>> run = gflowvlm.Run(path)
        >>> with run.policy("best") as policy:
        ...     score = policy.score(run.trajectories().newest(1))[0]
        >>> score.log_pf < 0
        True
    """

    def __init__(self, config: RunConfig, version: int, adapter: Path | None) -> None:
        self.config = on_this_machine(config, torch.cuda.is_available())
        self.version = version
        self.adapter = adapter
        self._model = resolve_model(config.policy.model)
        self._sampling: tuple[EventLoopThread, TransformersSampler] | None = None
        self._end_sampling: weakref.finalize[..., Policy] | None = None

    def score(self, trajectories: Iterable[Trajectory]) -> list[TrajectoryScore]:
        """Returns how likely this policy finds trajectories, whoever made them.

        Args:
            trajectories: `gflowvlm.Trajectory` objects, or what `gflowvlm.Run.trajectories` returns. All are in
                memory at once.

        Raises:
            UserError: The model or its adapter cannot be loaded.

        Example:
            >>> run = gflowvlm.Run(path)
            >>> newest = run.trajectories(expert=False).newest(2)
            >>> [len(score.steps) == len(t.steps) for score, t in zip(run.policy().score(newest), newest)]
            [True, True]
        """
        wanted = list(trajectories)
        scores, tokens = self._scored(wanted)
        weight = self.config.policy.cot_weight
        found = []
        place = 0
        for trajectory in wanted:
            steps = []
            for step in trajectory.steps:
                act, cot, stop = (float(scores[place, column]) for column in (LOG_ACT, LOG_COT, LOG_STOP))
                thoughts = weight * cot
                log_p_stop = None if is_malformed(step) else stop + thoughts
                steps.append(StepScore(act + thoughts, log_p_stop, act, cot, tokens[place]))
                place += 1
            found.append(TrajectoryScore(trajectory.trajectory_id, steps))
        return found

    def loss_inputs(self, trajectories: Iterable[Trajectory], loss: HeadlessLoss = "var_tb") -> dict[str, torch.Tensor]:
        """Returns what a loss of `gflowvlm.losses` takes, of these trajectories under this policy.

        log P_ref of the chains of thought, the reward exponent, its floor and the treatment of cut-off trajectories
        are those of the run's configuration, as in its learner.

        Args:
            trajectories: As in `score`.
            loss: The loss they are for; state-wise ones treat malformed responses differently.

        Returns:
            Keyword arguments of the loss, float64 tensors without gradients.

        Raises:
            UserError: The loss learns more than the policy, or does not exist.

        Example:
            >>> run = gflowvlm.Run(path)
            >>> tensors = run.policy().loss_inputs(run.trajectories())
            >>> bool(gflowvlm.losses.var_tb(**tensors).loss >= 0)
            True
        """
        if loss not in ("var_tb", "db", "subtb"):
            raise UserError(
                f"loss {loss!r}: its inputs are not of the policy alone; use var_tb, db or subtb, "
                "or add log_z or log_flow to theirs"
            )
        wanted = list(trajectories)
        scores, _ = self._scored(wanted)
        target = Target.of(self.config, loss)
        reference = None
        if target.reference_weight > 0:
            reference = scores[:, LOG_COT] if self.adapter is None else self._reference_log_cot(wanted)
        return loss_inputs(wanted, scores, reference, target).arguments()

    def respond(
        self,
        prompt: str,
        image: bytes | Image.Image | Path | str,
        *,
        temperature: float | None = None,
        seed: int | None = None,
        max_tokens: int | None = None,
    ) -> Response:
        """Returns the policy's answer to a prompt and a picture, sampled by transformers in this process.

        Args:
            prompt: The task's prompt, as `Step.prompt` has it: before any chat template.
            image: The picture: encoded (PNG), as a PIL image, or a file.
            temperature: Sampling temperature; 0 is greedy, None the run's.
            seed: Makes the answer repeatable; None draws freely.
            max_tokens: Longest answer; None for the run's ``policy.max_response_tokens``.

        Raises:
            UserError: The model cannot be loaded, the picture cannot be read, or the prompt is too long.
            TimeoutError: There was no answer within ``sampler.start_timeout_s + sampler.request_timeout_s``.

        Example:
            >>> run = gflowvlm.Run(path)
            >>> seen = run.trajectories().newest(1)[0]
            >>> answer = run.policy().respond(seen.steps[0].prompt, seen.images[0], temperature=0)
            >>> len(answer.log_probs) == len(answer.token_ids)
            True
        """
        sampler = self.config.sampler
        if temperature is not None and not 0 <= temperature <= 2:
            raise UserError(f"temperature {temperature!r}: must be from 0 (greedy) to 2")
        if max_tokens is not None and not 1 <= max_tokens < sampler.max_model_len:
            raise UserError(f"max_tokens {max_tokens!r}: must be from 1 to below sampler.max_model_len")
        request = SampleRequest(
            prompt=prompt,
            image=_encoded(image),
            max_tokens=self.config.policy.max_response_tokens if max_tokens is None else max_tokens,
            temperature=sampler.temperature if temperature is None else temperature,
            version=self.version,
            seed=seed,
        )
        loop, engine = self._sampler()
        answer = loop.run(engine.sample(request), sampler.start_timeout_s + sampler.request_timeout_s)
        parsed = answer_format(self.config.task.answer_format).parse(answer.text)
        return Response(
            text=answer.text,
            thoughts=parsed.thoughts,
            fields=parsed.fields,
            action=parsed.action,
            token_ids=answer.token_ids,
            log_probs=answer.log_probs,
            version=answer.version,
        )

    def close(self) -> None:
        """Frees the loaded model; it is loaded again when it is needed."""
        self.__dict__.pop("_scorer", None)
        self.__dict__.pop("_adapted", None)
        if self._end_sampling is not None:
            self._end_sampling()
        self._sampling = self._end_sampling = None

    def __enter__(self) -> Policy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        which = "base model" if self.version == BASE_VERSION else f"adapter version {self.version}"
        return f"<policy {self.config.policy.model}, {which}>"

    @property
    def _device(self) -> torch.device:
        return torch.device(sampler_device(self.config, torch.cuda.is_available()))

    @cached_property
    def _adapted(self) -> Any:
        return load_adapted(self._model, self.config.policy.dtype, self.adapter, self._device)

    @cached_property
    def _scorer(self) -> Scorer:
        inputs = PolicyInputs.load(self._model, prompts=self.config.policy)
        return Scorer(self._adapted, inputs, self._device, self.config.learner.token_budget)

    def _scored(self, trajectories: Sequence[Trajectory]) -> tuple[torch.Tensor, list[list[float]]]:
        """Returns `StepScores.stacked` of all steps, (S, 4) float64, and their tokens' log-probabilities."""
        steps = steps_of(trajectories)
        scores = torch.zeros(len(steps), 4, dtype=torch.float64)
        tokens: list[list[float]] = [[] for _ in steps]
        with torch.no_grad():
            for batch in self._scorer.pack(steps):
                result = self._scorer.score_steps(batch)
                scores[batch.index] = result.stacked().cpu().double()
                for place, row in zip(batch.index, result.token_log_probs.tolist(), strict=True):
                    tokens[place] = row[: len(steps[place].response_ids)]
        return scores, tokens

    def _reference_log_cot(self, trajectories: Sequence[Trajectory]) -> torch.Tensor:
        with reference_policy(self._adapted):
            return self._scored(trajectories)[0][:, LOG_COT]

    def _sampler(self) -> tuple[EventLoopThread, TransformersSampler]:
        if self._sampling is None:
            sampler = TransformersSampler(self.config, self._model)
            loop = EventLoopThread("policy")
            try:
                if self.adapter is not None:
                    loop.run(sampler.load(self.version, self.adapter), self.config.sampler.start_timeout_s)
            except BaseException:
                sampler.shutdown()
                loop.close()
                raise
            self._sampling = loop, sampler
            # Also when nobody closes it: the sampler's task must not be left behind at the end of the process.
            limit_s = self.config.sampler.request_timeout_s
            self._end_sampling = weakref.finalize(self, _shut_down, loop, sampler, limit_s)
        return self._sampling


def _shut_down(loop: EventLoopThread, sampler: TransformersSampler, timeout_s: float) -> None:
    async def stop() -> None:
        sampler.shutdown()

    loop.run(stop(), timeout_s)
    loop.close()


def _encoded(image: bytes | Image.Image | Path | str) -> bytes:
    """Returns a picture's encoded bytes.

    Raises:
        UserError: It cannot be read.
    """
    try:
        if isinstance(image, (str, Path)):
            image = Path(image).expanduser().read_bytes()
        if isinstance(image, bytes):
            with Image.open(io.BytesIO(image)) as opened:
                opened.load()
            return image
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
    except (OSError, ValueError) as error:
        raise UserError(f"image: cannot be read ({one_line(error)})") from None
    return buffer.getvalue()
