"""What processes write is passed on and its end kept; the error that ended one is found in it."""

import os
import subprocess
import sys
import time

import pytest

from gflowvlm.actors.process_output import OutputTail, output_tail


def of_engine(*lines):
    head = "(EngineCore pid=6578) ERROR 11-30 12:07:47 [core.py:1510] "
    return "".join(f"{head}{line}\n" for line in lines).encode()


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (b"", None),
        (b"Loading: 100%\nkilled\n", None),
        (of_engine("EngineCore failed to start.", "Traceback (most recent call last):", "ValueError: no room"),
         "ValueError: no room"),
        (of_engine("ValueError: first") + b"Process EngineCore:\nTraceback:\n  raise e\nValueError: [last] of it\n",
         "ValueError: [last] of it"),
        (b"ImportError: \nSmolVLMProcessor requires the Torchvision library but it was not\nfound. Install it.\n\n",
         "ImportError: SmolVLMProcessor requires the Torchvision library but it was not found. Install it."),
        (b"  File x\nModuleNotFoundError: No module named 'n2w'\n", "ModuleNotFoundError: No module named 'n2w'"),
        (b"torch.cuda.OutOfMemoryError: CUDA out of memory.\n[rank0] leaks\n",
         "torch.cuda.OutOfMemoryError: CUDA out of memory. [rank0] leaks"),
    ],
)  # fmt: skip
def test_the_last_error_of_an_engines_output_is_one_line(output, said):
    tail = OutputTail()
    tail.add(output)
    assert tail.last_error() == said


def test_only_the_end_is_kept():
    tail = OutputTail()
    tail.add(b"ValueError: long ago\n" + b"x" * 2**17)
    assert tail.last_error() is None


def test_what_is_written_goes_where_it_would_have_gone(capfd):
    with output_tail() as tail:
        os.write(2, b"ValueError: ours\n")
        subprocess.run([sys.executable, "-c", "print('RuntimeError: a child process said so')"], check=True)
    os.write(1, b"afterwards\n")
    assert tail.last_error() == "RuntimeError: a child process said so"
    printed = ""
    for _ in range(50):
        out, err = capfd.readouterr()
        printed += out + err
        time.sleep(0.02)
    assert "ValueError: ours" in printed
    assert "a child process said so" in printed
    assert "afterwards" in printed
    assert not tail.last_error().endswith("afterwards")


def test_a_process_that_lives_on_can_go_on_writing(tmp_path):
    code = "import sys, time, pathlib\ntime.sleep(1)\nprint('x' * 10**6, flush=True)\npathlib.Path(sys.argv[1]).touch()"
    with output_tail():
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "written")])
    assert process.wait(timeout=30) == 0
    assert (tmp_path / "written").exists()


def test_the_last_line_is_what_was_written_since_it_was_cleared():
    tail = OutputTail(kept=20)
    tail.add(b"of another call\n")
    tail.clear()
    assert tail.last_line() == ""
    tail.add(b"x" * 30 + b"\nlast   of\tit\n\n")
    assert tail.last_line() == "last of it"
