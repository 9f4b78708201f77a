from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from hq_backups.engine import child, process
from hq_backups.engine.errors import ProducerFailed, WrongUser
from tests.testbed.process import alive, wait_until

SECRET = "hunter2-s3cr3t"
IS_ROOT = os.geteuid() == 0


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-I", "-c", textwrap.dedent(code), *arguments]


def drain(producer: process.Producer) -> bytes:
    data, buffer = bytearray(), bytearray(4096)
    while n := producer.readinto(buffer):
        data += buffer[:n]
    return bytes(data)


class TestRun:
    def test_gives_back_what_the_program_said(self) -> None:
        done = process.run(python("import sys; print('out'); print('err', file=sys.stderr)"))
        assert done == process.Completed(0, "out\n", "err")

    def test_feeds_the_input_whatever_its_size(self) -> None:
        text = "é" * 300_000
        assert process.run(["cat"], input=text).stdout == text

    def test_the_child_reads_nothing_when_it_is_given_nothing(self) -> None:
        assert process.run(["cat"]).stdout == ""

    def test_a_failure_carries_the_status_and_the_tail(self) -> None:
        with pytest.raises(ProducerFailed, match=r"^sh ended with status 3: no such thing$") as caught:
            process.run(["sh", "-c", "echo no such thing >&2; exit 3"])
        assert caught.value.facts["status"] == 3

    def test_a_failure_may_be_asked_for_as_a_status(self) -> None:
        assert process.run(["false"], check=False).status == 1

    def test_a_signal_is_named(self) -> None:
        with pytest.raises(ProducerFailed, match="status -9: killed by SIGKILL"):
            process.run(["sh", "-c", "kill -9 $$"])

    def test_neither_arguments_nor_environment_are_in_errors(self) -> None:
        argv = ["/bin/sh", "-c", "exit 4", SECRET]
        with pytest.raises(ProducerFailed) as caught:
            process.run(argv, env={"PGPASSWORD": SECRET})
        with pytest.raises(ProducerFailed) as missing:
            process.run(["/no/such/program", SECRET], env={"PGPASSWORD": SECRET})
        for error in (caught.value, missing.value):
            assert SECRET not in f"{error} {error!r} {error.facts} {error.hint} {error.__cause__}"
        assert str(missing.value) == (
            "program ended with status 127: it could not be started: No such file or directory"
        )

    def test_the_environment_is_clean(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LEAKED", SECRET)
        monkeypatch.setenv("PATH", "/tmp/hostile")
        shown = dict(
            line.split("=", 1) for line in process.run(["env"], env={"MORE": "1"}).stdout.splitlines()
        )
        assert shown.keys() == {"PATH", "LC_ALL", "HOME", "MORE"}
        assert shown["PATH"] == child.PATH
        assert shown["LC_ALL"] == "C"

    def test_a_flood_of_errors_keeps_only_its_end(self) -> None:
        done = process.run(python("import sys; sys.stderr.write('x' * 5_000_000 + 'the end')"))
        assert done.stderr_tail.endswith("the end")
        assert len(done.stderr_tail) == child.TAIL_BYTES

    def test_a_flood_of_output_is_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(process, "OUTPUT_LIMIT", 1000)
        with pytest.raises(ProducerFailed, match="more than 1000 bytes"):
            process.run(["head", "-c", "1001", "/dev/zero"])
        assert len(process.run(["head", "-c", "1000", "/dev/zero"]).stdout) == 1000

    def test_a_time_limit_ends_the_whole_group(self, tmp_path: Path) -> None:
        pids = tmp_path / "pids"
        with pytest.raises(ProducerFailed, match=r"longer than 1 seconds"):
            process.run(["sh", "-c", f"sleep 300 & echo $! $$ > {pids}; wait"], timeout=1)
        for pid in map(int, pids.read_text().split()):
            wait_until(lambda pid=pid: not alive(pid), what="the child to end")

    def test_an_interrupt_ends_the_child(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pid_file = tmp_path / "pid"

        def interrupted(self: child.Child, timeout: float | None) -> bool:
            wait_until(lambda: pid_file.exists() and pid_file.read_text(), what="the child")
            monkeypatch.undo()
            raise KeyboardInterrupt

        monkeypatch.setattr(child.Child, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            process.run(["sh", "-c", f"echo $$ > {pid_file}; exec sleep 300"])
        assert not alive(int(pid_file.read_text()))

    def test_the_terminals_signals_do_not_reach_it(self) -> None:
        sid = process.run(python("import os; print(os.getsid(0) == os.getpid())")).stdout
        assert sid == "True\n"

    def test_a_daemon_left_behind_does_not_hold_us(self, tmp_path: Path) -> None:
        pid_file = tmp_path / "pid"
        argv = ["sh", "-c", f"sleep 300 & echo $! > {pid_file}; echo started; echo warned >&2"]
        try:
            done = process.run(argv, leaves_daemon=True, timeout=20)
            assert done == process.Completed(0, "started\n", "warned")
            assert alive(int(pid_file.read_text()))
        finally:
            os.kill(int(pid_file.read_text()), signal.SIGKILL)

    def test_a_background_child_that_holds_the_pipe_is_ended(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(process, "DRAIN_SECONDS", 0.2)
        monkeypatch.setattr(child, "DRAIN_SECONDS", 0.2)
        pid_file = tmp_path / "pid"
        done = process.run(["sh", "-c", f"sleep 300 & echo $! > {pid_file}; echo said"])
        assert done.stdout == "said\n"
        wait_until(lambda: not alive(int(pid_file.read_text())), what="the background child to end")

    @pytest.mark.skipif(not IS_ROOT, reason="only root can become somebody else")
    def test_root_becomes_the_user_with_its_home_and_groups(self) -> None:
        shown = process.run(["sh", "-c", "id -un; id -G; echo $HOME; pwd"], user="nobody").stdout.split("\n")
        assert shown[0] == "nobody"
        assert "0" not in shown[1].split()
        assert shown[2:4] == [os.path.expanduser("~nobody"), "/"]

    @pytest.mark.skipif(not IS_ROOT, reason="only root looks users up")
    def test_an_unknown_user_is_named(self) -> None:
        with pytest.raises(WrongUser, match="no user nosuchuser on this host"):
            process.run(["true"], user="nosuchuser")


class TestProducer:
    def test_streams_everything(self) -> None:
        with process.Producer(["head", "-c", "3000000", "/dev/zero"]) as producer:
            assert drain(producer) == bytes(3_000_000)
            assert producer.readinto(bytearray(1)) == 0
            assert producer.read(1) == b""

    def test_failing_after_the_last_byte_is_no_end_of_file(self) -> None:
        with process.Producer(python("import sys; print('all of it'); sys.exit(1)")) as producer:
            buffer = bytearray(100)
            assert producer.readinto(buffer) == 10
            for _ in range(2):  # and it stays failed
                with pytest.raises(ProducerFailed, match="status 1"):
                    producer.readinto(buffer)
            with pytest.raises(ProducerFailed, match="status 1"):
                producer.read(1)

    @pytest.mark.parametrize("written", [0, 1, 1000, 65536, 200_000])
    def test_killed_at_any_byte_is_no_end_of_file(self, written: int) -> None:
        code = "import os, sys; os.write(1, bytes(int(sys.argv[1]))); os.kill(os.getpid(), 9)"
        with process.Producer(python(code, str(written))) as producer:
            got, buffer = 0, bytearray(1 << 16)
            while got < written:
                got += producer.readinto(buffer)
            with pytest.raises(ProducerFailed, match="killed by SIGKILL"):
                producer.readinto(buffer)

    def test_closing_the_output_early_and_failing_later_is_no_end_of_file(self) -> None:
        code = "import os, sys; os.write(1, b'x'); os.close(1); sys.stdin.read(); os._exit(3)"
        with process.Producer(python(code), feed=True) as producer:
            assert producer.read(10) == b"x"
            # It fails only when its input ends, which is after we have seen the end of its output.
            threading.Timer(0.2, producer.stdin.close).start()
            with pytest.raises(ProducerFailed, match="status 3"):
                producer.read(10)

    def test_closing_the_output_and_never_exiting_is_a_failure(self) -> None:
        code = "import os, time; os.close(1); time.sleep(300)"
        with process.Producer(python(code), exit_timeout=0.3) as producer:
            with pytest.raises(ProducerFailed, match="closed its output but did not exit within"):
                producer.read(10)
            assert not alive(producer.pid)

    def test_a_flood_of_errors_does_not_stop_the_stream(self) -> None:
        code = "import sys; sys.stderr.write('e' * 3_000_000 + 'last words'); print('data'); sys.exit(1)"
        with process.Producer(python(code)) as producer:
            assert producer.read(10) == b"data\n"
            with pytest.raises(ProducerFailed, match=r"last words$") as caught:
                producer.read(10)
            assert len(str(caught.value)) < child.MESSAGE_CHARS + 100
            assert len(producer.stderr_tail) == child.TAIL_BYTES

    def test_an_exit_status_that_is_lost_is_a_failure(self) -> None:
        code = f"""
            import signal, sys
            sys.path.insert(0, {str(Path(__file__).parents[2])!r})
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)
            from hq_backups.engine import process
            with process.Producer(["sh", "-c", "echo x; exit 1"]) as producer:
                try:
                    while producer.read(100):
                        pass
                except process.__dict__.get("ProducerFailed", Exception) as error:
                    print(error)
                else:
                    print("believed")
        """
        done = subprocess.run(python(code), capture_output=True, text=True, check=True)
        assert "exit status is lost" in done.stdout

    def test_kill_ends_the_group_and_may_be_repeated(self, tmp_path: Path) -> None:
        pid_file = tmp_path / "pid"
        with process.Producer(["sh", "-c", f"sleep 300 & echo $! > {pid_file}; echo up; wait"]) as producer:
            assert producer.read(10) == b"up\n"
            producer.kill()
            producer.kill()
            with pytest.raises(ProducerFailed, match="SIGKILL"):
                producer.read(10)
            producer.kill()
        wait_until(lambda: not alive(int(pid_file.read_text())), what="the grandchild to end")

    def test_leaving_the_block_reaps(self) -> None:
        with pytest.raises(RuntimeError), process.Producer(["sleep", "300"]) as producer:
            raise RuntimeError
        assert producer.status == -signal.SIGKILL
        with pytest.raises(ChildProcessError):
            os.waitpid(producer.pid, 0)

    def test_the_child_ends_by_its_pipe_when_we_are_killed(self, tmp_path: Path) -> None:
        pid_file = tmp_path / "pid"
        code = f"""
            import os, signal, sys
            sys.path.insert(0, {str(Path(__file__).parents[2])!r})
            from hq_backups.engine import process
            producer = process.Producer(["cat", "/dev/zero"])
            producer.read(10)
            open({str(pid_file)!r}, "w").write(str(producer.pid))
            os.kill(os.getpid(), signal.SIGKILL)
        """
        done = subprocess.run(python(code), check=False, capture_output=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
        wait_until(lambda: not alive(int(pid_file.read_text())), what="the orphan to end")


class TestConsumer:
    def test_takes_a_stream(self) -> None:
        with process.Consumer(["wc", "-c"]) as consumer:
            for _ in range(5):
                consumer.write(bytes(100_000))
            assert consumer.finish().stdout.strip() == "500000"

    def test_a_failure_after_the_last_byte_is_told(self) -> None:
        with process.Consumer(["sh", "-c", "cat >/dev/null; echo bad row >&2; exit 3"]) as consumer:
            consumer.write(b"x")
            with pytest.raises(ProducerFailed, match="status 3: bad row"):
                consumer.finish()

    @pytest.mark.parametrize(("code", "said"), [("exit 2", "status 2"), ("exit 0", "stopped reading")])
    def test_one_that_stops_reading_is_a_failure(self, code: str, said: str) -> None:
        with process.Consumer(["sh", "-c", code]) as consumer, pytest.raises(ProducerFailed, match=said):
            consumer.write(bytes(10 << 20))
