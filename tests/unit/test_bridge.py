"""The engine runs here or as another user, and whatever becomes of it is told."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from hq_backups import bridge, identity, other_user
from hq_backups.child import EngineProcess
from hq_backups.engine.config import Config, Job, StoreConfig
from hq_backups.engine.errors import Exit, ProtocolMismatch, UsageError, WrongUser
from hq_backups.engine.events import Event

PRELUDE = """
import json, os, signal, sys, time
job = json.loads(sys.stdin.readline())
def say(kind, **data):
    body = {"v": 1, "at": "2026-11-22T00:00:02Z", "kind": kind, "run": job["run"], **data}
    os.write(1, json.dumps(body).encode() + b"\\n")
"""


class Heard(list[Event]):
    def __call__(self, event: Event) -> None:
        self.append(event)

    @property
    def kinds(self) -> list[str]:
        return [event.kind for event in self]

    def last(self, kind: str) -> dict[str, Any]:
        return dict(next(event for event in reversed(self) if event.kind == kind).data)


def job(verb: str = "backup", **store: Any) -> Job:
    settings = StoreConfig("postgres", "plain", Path("/nowhere/backups"), **store)
    config = Config("testing", "pg0", stores={"postgres": settings})
    request: dict[str, Any] = {"store": "postgres"}
    if verb in ("restore", "verify"):
        request = {"selection": {"store": "postgres", "name": "latest"}}
    return Job(verb, config, request, run="20261122T000002Z-pg0-postgres")


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that makes the child run a script in the engine's place."""

    def make(script: str) -> None:
        path = tmp_path / "entry.py"
        path.write_text(PRELUDE + textwrap.dedent(script))
        monkeypatch.setattr(bridge, "ENTRY", path)
        monkeypatch.setattr(other_user, "start", lambda argv, user: EngineProcess(argv))

    return make


def run(the_job: Job, **options: Any) -> tuple[Exit, Heard]:
    heard = Heard()
    return bridge.run(the_job, heard, user="somebody-else", **options), heard


def test_events_of_a_child_are_passed_on_and_its_result_is_the_exit_code(engine: Any) -> None:
    engine("""
        say("step", name="a", message=f"argv {len(sys.argv)}, {os.getcwd()}, {os.getsid(0) == os.getpid()}")
        say("result", ok=False, exit=7, store="postgres", seconds=1.0)
        sys.exit(7)
    """)
    code, heard = run(job())
    assert code is Exit.UPLOAD_FAILED
    assert heard.kinds == ["step", "result"]
    assert heard[0].data["message"] == "argv 1, /, True"


def test_the_jobs_secrets_come_on_standard_input_however_long_it_is(engine: Any) -> None:
    engine("""
        secret = job["config"]["stores"]["postgres"]["options"]["password"]
        say("step", name="a", message=str(len(secret)))
        words = open("/proc/self/cmdline").read() + open("/proc/self/environ").read()
        say("result", ok=True, exit=int(secret[:50] in words), store="postgres", seconds=1.0)
    """)
    code, heard = run(job(options={"password": "s3cr3t" * 60_000}))
    assert code is Exit.OK
    assert heard.last("step")["message"] == "360000"


@pytest.mark.parametrize(
    ("script", "code", "words"),
    [
        ("sys.stderr.write('Traceback: boom\\n'); sys.exit(1)", 1, "status 1"),
        ("sys.stderr.write('boom\\n'); sys.exit(5)", 5, "status 5"),
        ("sys.stderr.write('boom\\n'); sys.exit(77)", 1, "status 77"),
        ("say('step', name='a', message='b'); sys.stderr.write('boom\\n'); sys.exit(0)", 1, "status 0"),
        (
            "sys.stderr.write('boom\\n'); sys.stderr.flush(); os.kill(os.getpid(), signal.SIGKILL)",
            1,
            "SIGKILL",
        ),
    ],
)
def test_a_child_that_ends_without_a_result_is_a_failed_run_with_its_last_words(
    engine: Any, script: str, code: int, words: str
) -> None:
    engine(script)
    found, heard = run(job())
    assert found == code
    assert heard.kinds[-2:] == ["error", "result"]
    assert words in heard.last("error")["message"]
    assert "boom" in heard.last("error")["message"]
    assert heard.last("result")["ok"] is False
    assert heard.last("result")["exit"] == code


def test_endless_last_words_are_cut(engine: Any) -> None:
    engine("sys.stderr.write('x' * 5_000_000 + 'the end'); sys.exit(1)")
    _, heard = run(job())
    message = heard.last("error")["message"]
    assert message.endswith("the end")
    assert len(message) < 5000


def test_output_that_is_no_event_stops_nothing_and_is_told_when_nothing_else_is(engine: Any) -> None:
    engine("os.write(1, b'Segmentation\\xff\\n[1]\\n'); say('result', ok=True, exit=0); sys.exit(0)")
    assert run(job())[0] is Exit.OK
    engine("os.write(1, b'some library prints\\n'); sys.exit(1)")
    code, heard = run(job())
    assert code is Exit.ERROR
    assert "some library prints" in heard.last("error")["message"]


def test_events_of_another_version_end_in_a_usage_error(engine: Any) -> None:
    engine("""
        os.write(1, b'{"v": 99, "at": "2026-11-22T00:00:02Z", "kind": "result", "run": null}\\n')
        say("result", ok=True, exit=0)
    """)
    code, heard = run(job())
    assert code is Exit.USAGE
    assert heard.last("error")["code"] == ProtocolMismatch.__name__
    assert heard.kinds.count("result") == 1


def test_a_reader_that_fails_does_not_stop_the_run(engine: Any, caplog: pytest.LogCaptureFixture) -> None:
    engine("say('step', name='a', message='b'); say('result', ok=True, exit=0)")

    def broken(event: Event) -> None:
        raise RuntimeError("reader")

    assert bridge.run(job(), broken, user="somebody-else") is Exit.OK
    assert "reader" in caplog.text


def signal_once_told(heard: Heard, kind: str, *signals: int) -> threading.Thread:
    """Send signals to this process, one for each event of ``kind`` that was heard."""

    def watch() -> None:
        for count, number in enumerate(signals, 1):
            deadline = time.monotonic() + 20
            while heard.kinds.count(kind) < count and time.monotonic() < deadline:
                time.sleep(0.01)
            os.kill(os.getpid(), number)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_becomes_a_cancel_line_and_the_child_has_the_last_word(engine: Any, number: int) -> None:
    engine("""
        say("step", name="a", message="b")
        line = sys.stdin.readline()
        say("error", code="Cancelled", message=line.strip(), hint="", exit=1)
        say("result", ok=False, exit=1)
    """)
    heard = Heard()
    thread = signal_once_told(heard, "step", number)
    assert bridge.run(job(), heard, user="somebody-else") is Exit.ERROR
    thread.join()
    assert heard.last("error")["message"] == '{"cancel": true}'
    assert "waiting" in heard.last("warning")["message"]
    assert heard.kinds[-1] == "result"


STUBBORN = """
say("step", name="a", message="b")
for line in iter(sys.stdin.readline, ""):
    say("step", name="cancel", message="heard")
    {then}
"""


def test_a_second_signal_kills_a_backup(engine: Any) -> None:
    engine(STUBBORN.format(then="pass"))
    heard = Heard()
    thread = signal_once_told(heard, "step", signal.SIGINT, signal.SIGINT)
    assert bridge.run(job(), heard, user="somebody-else") is Exit.ERROR
    thread.join()
    assert heard.last("error")["code"] == "Cancelled"


def test_a_second_signal_never_kills_a_restore(engine: Any) -> None:
    engine(STUBBORN.format(then="time.sleep(0.5); say('result', ok=False, exit=8); sys.exit(8)"))
    heard = Heard()
    thread = signal_once_told(heard, "step", signal.SIGINT, signal.SIGINT)
    assert bridge.run(job("restore"), heard, user="somebody-else") is Exit.RESTORE_ROLLED_BACK
    thread.join()
    assert "not killed halfway" in heard.last("warning")["message"]


def test_signals_are_handled_as_before_when_the_run_is_over(engine: Any) -> None:
    engine("say('result', ok=True, exit=0)")
    before = [signal.getsignal(number) for number in bridge.SIGNALS]
    run(job())
    assert [signal.getsignal(number) for number in bridge.SIGNALS] == before


def test_the_interpreter_of_the_sudo_rule_is_used_unresolved_when_it_is_there(tmp_path: Path) -> None:
    python = tmp_path / "bin" / "python"
    assert other_user.interpreter(python) == Path(sys.executable)
    python.parent.mkdir()
    python.symlink_to(sys.executable)
    assert other_user.interpreter(python) == python


def test_an_engine_that_raises_in_this_process_is_a_failed_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Exit:
        raise ValueError("unforeseen")

    monkeypatch.setattr("hq_backups.engine.entry.run_job", broken)
    heard = Heard()
    assert bridge.run(job(), heard, user=identity.me()) is Exit.ERROR
    assert heard.last("error")["message"] == "unforeseen"
    assert heard.kinds[-1] == "result"


def test_an_unknown_store_is_a_usage_error_before_anything_is_started() -> None:
    heard = Heard()
    the_job = Job("backup", Config("testing", "pg0"), {"store": "postgres"}, run="r")
    assert bridge.run(the_job, heard) is Exit.USAGE
    assert heard.last("error")["hint"]


class TestWho:
    def test_the_named_user_is_first(self, tmp_path: Path) -> None:
        assert identity.user_for(job(os_user="named", data_dir=tmp_path)) == "named"

    def test_then_the_owner_of_the_data(self, tmp_path: Path) -> None:
        assert identity.user_for(job(data_dir=tmp_path)) == identity.me()

    def test_an_owner_of_lost_data_is_found_above_it_unless_that_is_root(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        owners = {
            "/opt/data/pg": "postgres",
            "/opt/data": "root",
            "/opt": "root",
            "/": "root",
            "/backups": "keeper",
        }
        monkeypatch.setattr(identity, "_owner", lambda path: owners.get(str(path)))
        lost = StoreConfig("postgres", "plain", Path("/backups"), data_dir=Path("/opt/data/pg/14/main"))
        assert identity.store_user(lost) == "postgres"
        couch = StoreConfig("couch", "tar", Path("/backups"), data_dir=Path("/opt/data/couchdb2"))
        assert identity.store_user(couch) == "keeper"

    def test_with_nothing_on_disk_it_is_the_usual_name_or_me(self, monkeypatch: pytest.MonkeyPatch) -> None:
        lost = StoreConfig("couch", "tar", Path("/gone/b"), data_dir=Path("/gone/d"))
        monkeypatch.setattr(identity, "_owner", lambda path: "root" if path == Path("/") else None)
        monkeypatch.setattr(identity, "exists", lambda user: user == "couchdb")
        assert identity.store_user(lost) == "couchdb"
        monkeypatch.setattr(identity, "exists", lambda user: False)
        assert identity.store_user(lost) == identity.me()

    def test_a_restore_is_roots_unless_one_user_owns_all(self, tmp_path: Path) -> None:
        assert identity.user_for(job("restore", os_user="postgres", data_dir=tmp_path / "main")) == "root"
        assert identity.user_for(job("undo", os_user="postgres", data_dir=tmp_path / "main")) == "root"
        assert identity.user_for(job("restore", data_dir=tmp_path / "main")) == identity.me()

    def test_unpacking_beside_is_the_stores_users(self) -> None:
        the_job = job("restore", os_user="postgres")
        request = {**the_job.request, "target_dir": "/mnt/x"}
        assert identity.user_for(Job("restore", the_job.config, request)) == "postgres"

    def test_a_bucket_is_listed_by_anybody(self) -> None:
        config = job(os_user="postgres").config
        assert (
            identity.user_for(Job("catalog", config, {"stores": ["postgres"], "source": "s3"}))
            == identity.me()
        )
        assert identity.user_for(Job("catalog", config, {"stores": ["postgres"]})) == "postgres"

    def test_one_job_is_one_users(self) -> None:
        stores = {n: StoreConfig(n, "x", Path("/b"), os_user=n) for n in ("postgres", "couch")}
        with pytest.raises(UsageError):
            identity.user_for(Job("catalog", Config("e", "h", stores=stores), {}))


class TestTrust:
    @pytest.fixture
    def program(self, tmp_path: Path) -> Path:
        tmp_path.chmod(0o755)
        package = tmp_path / "pkg" / "hq_backups"
        package.mkdir(parents=True)
        (package / "entry.py").write_text("")
        return package

    def refusal(self, package: Path, python: Path | None = None) -> str:
        python = python or package / "entry.py"
        try:
            identity.refuse_writable(identity.program_files(package, python))
        except WrongUser as error:
            return error.message
        return ""

    def test_files_of_one_owner_are_run(self, program: Path) -> None:
        assert self.refusal(program) == ""

    @pytest.mark.parametrize("mode", [0o666, 0o664, 0o646])
    def test_a_file_that_others_can_write_is_not(self, program: Path, mode: int) -> None:
        (program / "entry.py").chmod(mode)
        assert str(program / "entry.py") in self.refusal(program)

    @pytest.mark.parametrize("mode", [0o777, 0o775])
    def test_nor_one_below_a_directory_that_they_can_write(self, program: Path, mode: int) -> None:
        program.parent.chmod(mode)
        assert str(program.parent) in self.refusal(program)

    def test_a_sticky_directory_is_no_danger(self, program: Path) -> None:
        program.parent.chmod(0o1777)
        assert self.refusal(program) == ""

    def test_links_are_followed_all_the_way(self, program: Path, tmp_path: Path) -> None:
        real = tmp_path / "elsewhere"
        real.mkdir()
        (real / "python3").write_text("")
        (program.parent / "python").symlink_to("../elsewhere/python")
        (real / "python").symlink_to("python3")
        assert self.refusal(program, program.parent / "python") == ""
        real.chmod(0o757)
        assert str(real) in self.refusal(program, program.parent / "python")

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
    def test_files_of_two_users_are_not(self, program: Path) -> None:
        (program / "entry.py").chmod(stat.S_IRUSR)
        os.chown(program, 1234, -1)
        assert self.refusal(program) == ""
        os.chown(program / "entry.py", 1235, -1)
        assert "several users" in self.refusal(program)


def test_sudo_that_refuses_is_answered_with_the_exact_rule(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine("sys.stderr.write('sudo: a password is required\\n'); sys.exit(1)")
    code, heard = run(job())
    assert code is Exit.PREFLIGHT
    error = heard.last("error")
    assert error["code"] == "WrongUser"
    assert f"ALL=(somebody-else) NOPASSWD: {sys.executable} -I " in error["hint"]
    assert "sudo -u somebody-else" in error["hint"]


def test_sudo_that_complains_in_the_middle_of_a_run_is_no_refusal(engine: Any) -> None:
    engine("say('step', name='a', message='b'); sys.stderr.write('sudo: hm\\n'); sys.exit(1)")
    assert run(job())[0] is Exit.ERROR


def test_the_rule_is_quoted_as_sudoers_wants_it() -> None:
    refused = other_user.refused(["/opt/py,3/bin/python", "-I", "/a b/entry.py"], "root", "no")
    assert r"/opt/py\,3/bin/python -I /a\ b/entry.py" in refused.hint
    if Path("/usr/sbin/visudo").exists():
        rule = next(line for line in refused.hint.splitlines() if "NOPASSWD" in line)
        done = subprocess.run(
            ["/usr/sbin/visudo", "-c", "-f", "-"], input=rule + "\n", text=True, capture_output=True
        )
        assert done.returncode == 0, done.stderr


def test_a_user_whom_the_host_does_not_know_is_refused() -> None:
    heard = Heard()
    assert bridge.run(job(os_user="nobody-of-that-name"), heard) is Exit.PREFLIGHT
    assert "nobody-of-that-name" in heard.last("error")["message"]


def test_sudo_that_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(other_user.os, "geteuid", lambda: 4242)
    monkeypatch.setattr(other_user.shutil, "which", lambda *_, **__: None)
    with pytest.raises(WrongUser, match="sudo is not installed"):
        other_user.start([sys.executable, "-I", "/x"], "root")
