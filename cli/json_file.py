"""Results as JSON files, for the `--json` options."""

import json
from pathlib import Path
from typing import Any

from gflowvlm.shared.errors import UserError


def write_json_file(content: Any, path: Path) -> None:
    """Writes a result that other programs read.

    Raises:
        UserError: The file cannot be written.
    """
    text = json.dumps(content, indent=2, allow_nan=False)
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"--json {path}: cannot be written ({error.strerror}); name a file in a folder that exists"
        ) from None
