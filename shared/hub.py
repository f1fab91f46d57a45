"""Whether a model can be had from the hub, before libraries try for minutes, file after file."""

from functools import lru_cache
from pathlib import Path

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.utils import httpx  # type: ignore[attr-defined] # exported lazily, whichever version it is

from gflowvlm.shared.errors import UserError, one_line

ANSWER_TIMEOUT_S = 15.0


@lru_cache
def require_at_hub(model: str) -> None:
    """Returns for a directory, and for a hub's model that is in the local cache or that the hub says it has.

    Args:
        model: An absolute path, or a hub name, ``owner/name``.

    Raises:
        UserError: The hub does not have it, cannot be reached, or does not answer in time.
    """
    if Path(model).is_absolute():
        return
    try:
        if not isinstance(try_to_load_from_cache(model, "config.json"), str):
            HfApi().model_info(model, timeout=ANSWER_TIMEOUT_S)
    except (httpx.HTTPError, OSError, ValueError) as error:
        raise UserError(
            f"model {model!r}: is no folder here, and cannot be had from the hub ({one_line(error)}); give a model "
            "directory, a shipped model, or the name of a model that the hub has"
        ) from None
