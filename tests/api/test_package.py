"""The package's face: light to import, complete to look at."""

import subprocess
import sys
from pathlib import Path

import pytest

import gflowvlm

ROOT = Path(__file__).parents[2]


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = ("torch", "ray", "vllm", "transformers", "pandas", "pyarrow", "numpy")
    code = f"import sys, gflowvlm; print([m for m in {heavy} if m in sys.modules], len(dir(gflowvlm)) > 9)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[] True", done.stderr


def test_every_name_is_there_and_is_listed() -> None:
    assert set(gflowvlm.__all__) <= set(dir(gflowvlm))
    for name in gflowvlm.__all__:
        assert getattr(gflowvlm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = gflowvlm.nothing
    with pytest.raises(ImportError):
        exec("from gflowvlm import nothing")
