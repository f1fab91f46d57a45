import subprocess
import sys
from pathlib import Path

import pytest

from gflowvlm.run.folder_lock import folder_lock
from gflowvlm.shared.errors import UserError

ROOT = Path(__file__).parents[2]
HOLD = (
    "import sys, time; from pathlib import Path; from gflowvlm.run.folder_lock import folder_lock\n"
    "from gflowvlm.shared.errors import UserError\n"
    "with folder_lock(Path(sys.argv[1]), UserError('held')): print('held', flush=True); time.sleep(60)\n"
)


def test_a_folder_that_another_process_holds_is_refused_until_that_is_gone(tmp_path):
    folder = tmp_path / "new" / "folder"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="somebody is there"), folder_lock(folder, UserError("somebody is there")):
            pass
    finally:
        holder.kill()
        holder.communicate(timeout=30)
    with folder_lock(folder, UserError("somebody is there")):
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    lock = folder_lock(tmp_path / "file" / "folder", UserError("held"))
    with pytest.raises(UserError, match=r"file/folder: cannot be written"), lock:
        pass
