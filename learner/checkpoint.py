"""What a learner leaves on disk: adapters in PEFT format and checkpoints. Safetensors and JSON, no pickle.

A checkpoint is a folder::

    adapter/adapter_config.json, adapter/adapter_model.safetensors     the adapter (PEFT format)
    head.safetensors                                                   the head, where the loss has one
    optimizer.safetensors                                              AdamW's moments
    state.json                                                         counters, the head's kind, a hash of each file

The learning rate follows from the step counter and the learner draws no random numbers once its adapter
exists, so there is nothing else to restore.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import safetensors.torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from torch import Tensor

from gflowvlm.learner.heads import StateHead
from gflowvlm.learner.optimization import Counters, Optimization
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.files import sync

FORMAT = 1
_ADAPTER = "adapter/adapter_model.safetensors"
_ADAPTER_CONFIG = "adapter/adapter_config.json"
_HEAD = "head.safetensors"
_OPTIMIZER = "optimizer.safetensors"
_STATE = "state.json"


def save_adapter(policy: Any, directory: Path) -> None:
    """Writes the adapter in PEFT format, all of it or nothing.

    Raises:
        UserError: It cannot be written (disk full, no permission).
    """
    with atomic_directory(directory) as partial:
        _write_adapter(policy, partial)


def save_checkpoint(policy: Any, head: StateHead | None, optimization: Optimization, directory: Path) -> None:
    """Writes a checkpoint, all of it or nothing; replaces one of the same name.

    Args:
        policy: The PEFT model.
        head: The loss's head, or None.
        optimization: The optimiser of both.
        directory: Where to write.

    Raises:
        UserError: It cannot be written (disk full, no permission).
    """
    with atomic_directory(directory) as partial:
        (partial / "adapter").mkdir()
        _write_adapter(policy, partial / "adapter")
        _write_bytes(partial / _OPTIMIZER, safetensors.torch.save(optimization.tensors()))
        if head is not None:
            _write_bytes(partial / _HEAD, safetensors.torch.save(_head_tensors(head)))
        kind = None if head is None else head.kind.value
        hashes = {name: _sha256(partial / name) for name in _files(kind)}
        state = {"format": FORMAT, **asdict(optimization.counters), "head": kind, "sha256": hashes}
        _write_bytes(partial / _STATE, json.dumps(state, indent=2).encode())


def load_checkpoint(policy: Any, head: StateHead | None, optimization: Optimization, directory: Path) -> None:
    """Restores what `save_checkpoint` wrote.

    Raises:
        UserError: The checkpoint is missing, corrupted, of another adapter or of a loss with another head; the
            message names the file. Nothing is restored then.
    """
    state = check_checkpoint(directory)
    _check_head(directory, state["head"], head)
    adapter = _read_tensors(directory / _ADAPTER)
    current = get_peft_model_state_dict(policy, save_embedding_layers=False)
    if _shapes(adapter) != _shapes(current):
        raise UserError(
            f"{directory / _ADAPTER}: belongs to another model or other policy.lora_* settings than the run's"
        )
    head_tensors = {} if head is None else _read_tensors(directory / _HEAD)
    if head is not None and _shapes(head_tensors) != _shapes(_head_tensors(head)):
        raise UserError(f"{directory / _HEAD}: belongs to another model than the run's")
    moments = _read_tensors(directory / _OPTIMIZER)
    try:
        optimization.load_tensors(moments)
    except ValueError as error:
        raise _corrupted(directory / _OPTIMIZER, str(error)) from None
    set_peft_model_state_dict(policy, adapter)
    if head is not None:
        head.load_state_dict(head_tensors)
    optimization.counters = Counters(**{field.name: state[field.name] for field in fields(Counters)})


def check_checkpoint(directory: Path) -> dict[str, Any]:
    """Returns the state in a checkpoint after comparing every file with what was written.

    Raises:
        UserError: The checkpoint is missing or corrupted; the message names the file.
    """
    state = _read_state(directory / _STATE)
    for name, expected in state["sha256"].items():
        path = directory / name
        try:
            found = _sha256(path)
        except OSError as error:
            raise _corrupted(path, error.strerror or str(error)) from None
        if found != expected:
            raise _corrupted(path, "its content is not what was written")
    return state


@contextmanager
def atomic_directory(directory: Path) -> Iterator[Path]:
    """Yields an empty folder that takes the name `directory` once everything in it is on disk.

    On an error nothing is left under the final name but what stood there before.

    Raises:
        UserError: Writing failed (disk full, no permission).
    """
    partial: Path | None = None
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=".partial", dir=directory.parent))
        partial.chmod(0o755)
        yield partial
        for path in (*partial.rglob("*"), partial):
            sync(path)
        if directory.exists():
            # A folder cannot be renamed onto a full one: the old one steps aside first.
            aside = partial.with_suffix(".old")
            directory.rename(aside)
            partial.rename(directory)
            shutil.rmtree(aside, ignore_errors=True)
        else:
            partial.rename(directory)
        sync(directory.parent)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"{directory}: cannot be written ({reason}); free some space or check its permissions, then resume"
        ) from None
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def _write_adapter(policy: Any, directory: Path) -> None:
    tensors = get_peft_model_state_dict(policy, save_embedding_layers=False)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    _write_bytes(directory / "adapter_model.safetensors", safetensors.torch.save(tensors, {"format": "pt"}))
    config = copy.deepcopy(policy.peft_config["default"])
    config.inference_mode = True
    config.save_pretrained(directory)


def _check_head(directory: Path, found: str | None, head: StateHead | None) -> None:
    expected = None if head is None else head.kind.value
    if found != expected:
        raise UserError(
            f"{directory}: made with an objective.loss that learns {found or 'no head'}, the run's learns "
            f"{expected or 'no head'}; resume with the loss it was made with, or start a new run"
        )


def _head_tensors(head: StateHead) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()}


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _files(head: str | None) -> set[str]:
    return {_ADAPTER, _ADAPTER_CONFIG, _OPTIMIZER} | (set() if head is None else {_HEAD})


def _write_bytes(path: Path, content: bytes) -> None:
    # Through a plain file: a full disk is then an OSError here, never a fault in a memory map.
    with path.open("wb") as file:
        file.write(content)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: no readable checkpoint ({error.strerror}); resume from another one") from None
    except ValueError:
        raise _corrupted(path, "not valid JSON") from None
    counters = ("step", "skipped", "skipped_in_a_row")
    whole = (
        isinstance(state, dict)
        and all(isinstance(state.get(name), int) and state[name] >= 0 for name in counters)
        and isinstance(state.get("sha256"), dict)
        and set(state["sha256"]) == _files(state.get("head"))
    )
    if whole and state.get("format") != FORMAT:
        raise UserError(f"{path}: checkpoint format {state.get('format')}, this release reads {FORMAT}")
    if not whole:
        raise _corrupted(path, "entries are missing")
    # Checkpoints without a head may lack that entry, those of earlier releases the other.
    return {"head": None, "without_signal": 0, **state}


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return dict(safetensors.torch.load_file(path))
    except (OSError, SafetensorError) as error:
        raise _corrupted(path, " ".join(str(error).split())) from None


def _corrupted(path: Path, reason: str) -> UserError:
    return UserError(f"{path}: corrupted checkpoint ({reason}); remove its folder to resume from the one before")
