"""The place that a worker shows."""

import subprocess
import sys
import textwrap

from dpo_fast.curate.workers.heartbeat import Heartbeat


def test_a_heartbeat_is_never_read_half_written(tmp_path):
    with (tmp_path / "shared").open("w+b") as shared:
        shared.truncate(Heartbeat.SIZE)
        writer = """
            import sys
            from dpo_fast.curate.workers.heartbeat import Heartbeat, Place
            heartbeat, number = Heartbeat(int(sys.argv[1])), 0
            while True:
                number += 1
                heartbeat.set(Place(number, number, number))
        """
        command = [sys.executable, "-c", textwrap.dedent(writer), str(shared.fileno())]
        heartbeat = Heartbeat(shared.fileno())
        with subprocess.Popen(command, pass_fds=[shared.fileno()]) as process:
            while heartbeat.get()[0].row <= 0:
                assert process.poll() is None
            seen = {heartbeat.get() for _ in range(300_000)}
            process.kill()
        assert len(seen) > 100
        assert {place for place, _ in seen if len(set(place)) != 1} == set()
        # Seconds: the machine has run for longer than this process may rest.
        assert max(seconds for _, seconds in seen) < 60
        heartbeat.close()
