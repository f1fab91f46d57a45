import subprocess
import sys
import time

from gflowvlm.cluster.monitoring.memory import MemoryMeter, memory_gib


def test_children_are_counted():
    alone = memory_gib()
    code = "import sys; block = bytearray(200 * 2**20); print('up', flush=True); sys.stdin.read()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stdout.readline() == b"up\n"
        assert 0.15 < memory_gib() - alone < 0.5
    finally:
        child.communicate(timeout=10)


def test_a_meter_takes_a_hundredth_of_a_processor_and_remembers_the_largest():
    values = iter([3.0, 1.0, 2.0])

    def measure():
        until = time.thread_time() + 0.002
        while time.thread_time() < until:
            pass
        return next(values)

    meter = MemoryMeter(measure)
    assert [meter.gib() for _ in range(5)] == [3.0] * 5
    time.sleep(0.25)
    assert (meter.gib(), meter.peak_gib) == (1.0, 3.0)
