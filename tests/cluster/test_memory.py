import subprocess
import sys

from cluster.memory import memory_gib


def test_children_are_counted():
    alone = memory_gib()
    code = "import sys; block = bytearray(200 * 2**20); print('up', flush=True); sys.stdin.read()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stdout.readline() == b"up\n"
        assert 0.15 < memory_gib() - alone < 0.5
    finally:
        child.communicate(timeout=10)
