"""AdamW on adapter and head: warm-up and cosine, clipping, and what happens to gradients that are not finite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gflowvlm.learner.schedule import warmed_cosine
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.learner_settings import LearnerSettings

MAX_SKIPPED_IN_A_ROW = 5
"""So many non-finite gradients one after the other end the run."""

_NORMS = ("grad_norm", "head_grad_norm")


def learning_rate(settings: LearnerSettings, step: int) -> float:
    """Returns the learning rate of an update: linear warm-up, then a cosine down to the final rate.

    Args:
        settings: Rates and durations.
        step: Number of the update, from 0. The last is ``settings.steps - 1``; later ones use its rate.
    """
    return warmed_cosine(
        step,
        peak=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        end=settings.steps - 1,
        final=settings.final_learning_rate,
    )


@dataclass
class Counters:
    """How far the optimisation is.

    Attributes:
        step: Batches taken, those without an update included.
        without_signal: Batches among them that taught nothing; the schedule follows the others.
        skipped: Updates left out because the gradient was not finite.
        skipped_in_a_row: Those since the last update.
    """

    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    without_signal: int = 0


class Optimization:
    """The optimiser with its schedule.

    The head's learning rate follows the adapter's schedule from a peak of its own. Its gradients are clipped
    on their own, so that neither part shortens the other's step, and its weights do not decay: they carry a
    level that has nothing to do with zero.

    Args:
        adapter: The adapter's parameters by name, in a fixed order.
        settings: The learner's settings.
        head: The head's parameters by name, in a fixed order; empty for losses without one.
    """

    def __init__(
        self,
        adapter: Sequence[tuple[str, nn.Parameter]],
        settings: LearnerSettings,
        head: Sequence[tuple[str, nn.Parameter]] = (),
    ) -> None:
        self.counters = Counters()
        self.names = [name for name, _ in (*adapter, *head)]
        self.parameters = [parameter for _, parameter in (*adapter, *head)]
        self._settings = settings
        groups = [{"params": [p for _, p in adapter], "weight_decay": settings.weight_decay}]
        self._peaks = [settings.learning_rate]
        if len(head) > 0:
            groups.append({"params": [p for _, p in head], "weight_decay": 0.0})
            self._peaks.append(settings.head_learning_rate)
        self._adamw = torch.optim.AdamW(
            groups, lr=settings.learning_rate, betas=(settings.adam_beta1, settings.adam_beta2)
        )

    def zero_grad(self) -> None:
        """Drops the gradients."""
        self._adamw.zero_grad(set_to_none=True)

    def move(self, device: torch.device) -> None:
        """Moves the optimiser's moments to a device, where its parameters have been moved."""
        for entries in self._adamw.state.values():
            for name, value in entries.items():
                # Counts of steps are on the CPU wherever the parameters are.
                entries[name] = value if value.dim() == 0 else value.to(device)

    def update(self, has_signal: bool) -> dict[str, float]:
        """Clips the gradients and makes one update.

        A gradient that is not finite is skipped and counted. Without a signal there is no update either: momentum
        and weight decay alone would move the adapter.

        Args:
            has_signal: Whether the loss asks any response to become more or less likely.

        Returns:
            ``grad_norm`` before clipping, of the adapter; ``lr``, ``updated`` (1 or 0), ``skipped_updates`` so
            far; with a head, ``head_grad_norm`` before clipping.

        Raises:
            UserError: Too many non-finite gradients in a row.
        """
        counters = self.counters
        lr = learning_rate(self._settings, counters.step - counters.without_signal)
        norms = {}
        for group, peak, name in zip(self._adamw.param_groups, self._peaks, _NORMS, strict=False):
            group["lr"] = lr * (peak / self._settings.learning_rate)
            norms[name] = float(nn.utils.clip_grad_norm_(group["params"], self._settings.grad_clip))
        finite = all(math.isfinite(norm) for norm in norms.values())
        if finite and has_signal:
            self._adamw.step()
        counters.skipped += not finite
        counters.skipped_in_a_row = 0 if finite else counters.skipped_in_a_row + 1
        if counters.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise UserError(
                f"learner step {counters.step + 1}: the gradient was not finite {MAX_SKIPPED_IN_A_ROW} times in a row; "
                "resume from a checkpoint with a smaller learner.learning_rate, or with policy.dtype=float32"
            )
        return {
            **norms,
            "lr": lr,
            "updated": float(finite and has_signal),
            "skipped_updates": float(counters.skipped),
        }

    def end_step(self, had_signal: bool) -> dict[str, float]:
        """Counts a batch as taken; the schedule goes on if it had a signal in any of its updates.

        Returns:
            ``steps_without_signal``, so far.
        """
        self.counters.step += 1
        self.counters.without_signal += not had_signal
        return {"steps_without_signal": float(self.counters.without_signal)}

    def tensors(self) -> dict[str, Tensor]:
        """Returns the optimiser's state as named tensors; empty before the first update."""
        state = self._adamw.state
        return {
            f"{name}/{key}": value.detach().cpu().contiguous()
            for name, parameter in zip(self.names, self.parameters, strict=True)
            for key, value in state.get(parameter, {}).items()
        }

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restores what `tensors` returned.

        Raises:
            ValueError: They belong to another adapter or head.
        """
        expected = dict(zip(self.names, self.parameters, strict=True))
        state: dict[int, dict[str, Tensor]] = {}
        for full_name, value in tensors.items():
            name, _, key = full_name.rpartition("/")
            if name not in expected or (value.dim() > 0 and value.shape != expected[name].shape):
                raise ValueError(f"{full_name} {list(value.shape)} does not belong to this adapter and head")
            state.setdefault(self.names.index(name), {})[key] = value
        if len({frozenset(entries) for entries in state.values()}) > 1 or len(state) not in (0, len(expected)):
            raise ValueError("the state of some parameters is missing")
        groups = self._adamw.state_dict()["param_groups"]
        self._adamw.load_state_dict({"state": state, "param_groups": groups})
