"""The bridge between users through real sudo: who is refused, what is not seen, and who survives whom."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

import hq_backups
from hq_backups import bridge
from hq_backups.child import EngineProcess
from hq_backups.engine.config import Config, Job, StoreConfig
from hq_backups.engine.errors import Exit
from hq_backups.engine.events import Event
from tests.integration.es_helpers import contents, fill
from tests.integration.hq_host import ENV, HqHost, command_lines, hq_host, killed
from tests.testbed.elasticsearch import ElasticsearchNode
from tests.testbed.process import alive, as_user, give, wait_until
from tests.testbed.s3 import S3Service
from tests.testbed.system import SudoRules

pytestmark = [pytest.mark.root, pytest.mark.debian, pytest.mark.postgres15, pytest.mark.s3]
CONFIRMED = ("--noinput", f"--confirm-env={ENV}")
ROOT = Path(hq_backups.__file__).parent.parent


@pytest.fixture(scope="module")
def host(s3: S3Service) -> Iterator[HqHost]:
    bucket = s3.make_bucket(versioned=True)
    with hq_host(s3, bucket) as host:
        host.fill(5)
        yield host
    s3.remove_bucket(bucket)


@pytest.fixture
def hq(host: HqHost) -> HqHost:
    """Return the module's host with no backups on disk; its rule and its server are there."""
    host.rules.install()
    host.clear()
    return host


class Frozen:
    """Stops another user's processes at a point where something is to happen, and lets them go on."""

    def __init__(self, hq: HqHost, *names: str) -> None:
        self.hq, self.names = hq, names
        self.pids: list[int] = []

    def __enter__(self) -> Frozen:
        return self

    def stop(self, what: str) -> None:
        """Wait for the processes and stop them."""

        def found() -> bool:
            # Only this host's: other servers may be at work on the machine.
            ours = (str(self.hq.root), self.hq.server.name)
            self.pids = [
                pid
                for pid, argv in command_lines()
                if all(name in argv for name in self.names) and any(mark in argv for mark in ours)
            ]
            return bool(self.pids)

        wait_until(found, what=what, interval=0.002)
        self.send(signal.SIGSTOP)

    def send(self, number: int) -> None:
        for pid in self.pids:
            if alive(pid):
                os.kill(pid, number)

    def __exit__(self, *_: object) -> None:
        self.send(signal.SIGCONT)


def no_engine(hq: HqHost) -> None:
    wait_until(lambda: not hq.engines(), what="the engine to end", timeout=60)


class TestRefusals:
    def rule_in(self, text: str) -> str:
        """Return the sudoers line of a hint."""
        return next(line.strip() for line in text.splitlines() if "NOPASSWD" in line)

    def test_the_line_that_is_told_is_all_that_is_missing(self, hq: HqHost) -> None:
        hq.rules.remove()
        refused = hq.run("run_backup", "postgres")
        assert refused.code == 5, refused
        assert "this must run as postgres, and cchq cannot become postgres" in refused.err
        line = self.rule_in(refused.err)
        assert line == f"cchq ALL=(postgres) NOPASSWD: {hq.python} -I {bridge.ENTRY}"
        checked = subprocess.run(
            ["visudo", "-cf", "-"], input=line + "\n", text=True, capture_output=True, check=False
        )
        assert checked.returncode == 0, checked.stderr
        hq.rules.path.write_text(line + "\n")
        hq.rules.path.chmod(0o440)
        hq.good("run_backup", "postgres", "--no-upload")
        # It is for postgres alone: a restore still asks for root's.
        refused = hq.run("restore_backup", "postgres", "latest", *CONFIRMED)
        assert refused.code == 5
        assert self.rule_in(refused.err) == f"cchq ALL=(root) NOPASSWD: {hq.python} -I {bridge.ENTRY}"

    def test_the_command_that_needs_no_rule_is_told(self, hq: HqHost) -> None:
        hq.rules.remove()
        refused = hq.run("verify_backup", "latest", "--store=postgres")
        assert f"sudo -u postgres {hq.python} manage.py verify_backup latest --store=postgres" in refused.err

    def test_a_rule_for_another_python_does_not_serve(self, hq: HqHost) -> None:
        hq.rules.remove()
        with SudoRules("/usr/bin/python3"):
            refused = hq.run("run_backup", "postgres")
        assert refused.code == 5, refused
        assert str(hq.python) in self.rule_in(refused.err)
        assert list(hq.backups.iterdir()) == []

    def test_a_python_that_the_other_user_cannot_reach(self, hq: HqHost, tmp_path: Path) -> None:
        home = hq.root / "home/cchq/closed"
        home.mkdir(mode=0o700)
        venv.create(home / "env", symlinks=True)
        (packages,) = (home / "env/lib").glob("python3*/site-packages")
        (here,) = (Path(sys.prefix) / "lib").glob("python3*/site-packages")
        (packages / "ours.pth").write_text(f"{here}\n{ROOT}\n")
        for path in (home, *home.rglob("*")):
            os.lchown(path, home.parent.stat().st_uid, home.parent.stat().st_gid)
        hq.configure(virtualenv_home=str(home / "env"))
        # Both names lead to one interpreter, and sudo takes a rule for either by the file, not by the name.
        hq.rules.remove()
        try:
            with SudoRules(home / "env/bin/python"):
                for user in ("cchq", "root"):
                    refused = hq.run("run_backup", "postgres", user=user)
                    assert refused.code == 5, refused
                    assert f"postgres cannot run {home}/env/bin/python" in refused.err
                    assert "virtualenv_home" in refused.err
                    assert "NOPASSWD" not in refused.err
        finally:
            hq.configure(virtualenv_home=str(hq.current / "python_env"))
            shutil.rmtree(home)

    @pytest.mark.parametrize("damage", ["a file of all", "a directory of a group", "another user's file"])
    def test_root_runs_nothing_that_others_could_have_changed(self, hq: HqHost, damage: str) -> None:
        package = hq.root / "site" / "hq_backups"
        shutil.rmtree(package.parent, ignore_errors=True)
        shutil.copytree(ROOT / "hq_backups", package, ignore=shutil.ignore_patterns("__pycache__"))
        named = package / "engine" / "events.py"
        if damage == "a file of all":
            named.chmod(0o666)
        elif damage == "a directory of a group":
            named = package / "engine" / "stores"
            named.chmod(0o775)
        else:
            give(named, "couchdb")
        words = ("restore_backup", "postgres", "latest", *CONFIRMED)
        refused = hq.run(*words, PYTHONPATH=str(package.parent))
        assert refused.code == 5, refused
        assert "not run as root" in refused.err
        assert ("couchdb" if "another" in damage else str(named)) in refused.err
        assert hq.engines() == []


def test_secrets_are_in_no_command_line_and_no_environment(hq: HqHost) -> None:
    lines: set[str] = set()
    surroundings: set[str] = set()
    ended = threading.Event()

    def watch() -> None:
        while not ended.is_set():
            for pid, argv in command_lines():
                lines.add(argv)
                if "entry.py" in argv or "pg_basebackup" in argv:
                    try:
                        surroundings.add(Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace"))
                    except OSError:
                        continue

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        said = repr(hq.good("run_backup", "postgres")) + repr(hq.good("list_backups", "--json"))
        said += repr(hq.good("restore_backup", "postgres", "latest", "--source=s3", *CONFIRMED))
    finally:
        ended.set()
        watcher.join()
    for part in ("sudo -n -u postgres --", "sudo -n -u root --", "pg_basebackup", "entry.py"):
        assert any(part in line for line in lines), (
            f"{part} was not seen: the watch is too slow to prove anything"
        )
    for secret in hq.secrets:
        assert not any(secret in text for text in lines | surroundings)
        assert secret not in said
    for path in [*hq.backups.iterdir(), *hq.data.parent.glob(".*.json")]:
        if path.suffix == ".json":
            assert not any(secret in path.read_text() for secret in hq.secrets), path


@pytest.mark.parametrize("user", ["cchq", "root"])
def test_a_hostile_package_is_not_loaded_as_another_user(hq: HqHost, user: str) -> None:
    evil, home = hq.root / "evil", hq.root / "evil/home"
    shutil.rmtree(evil, ignore_errors=True)
    evil.mkdir()
    evil.chmod(0o777)
    spy = f"import os\nopen('{evil}/ran-' + str(os.geteuid()) + '-' + str(os.getpid()), 'w').close()\n"
    for name in ("sitecustomize.py", "usercustomize.py"):
        (evil / name).write_text(spy)
    for name in ("isal.py", "boto3.py", "botocore.py"):
        (evil / name).write_text(spy + "raise ImportError('hostile')\n")
    home.mkdir()
    argv = [str(hq.python), str(hq.current / "manage.py"), "run_backup", "postgres"]
    done = subprocess.run(
        argv,
        cwd=evil,
        env={**hq.environment(user), "PYTHONPATH": f"{evil}:{ROOT}", "PYTHONSTARTUP": str(evil / "isal.py")},
        capture_output=True,
        text=True,
        check=False,
        **as_user(user),
    )
    ran = {path.name.split("-")[1] for path in evil.glob("ran-*")}
    us = str(0 if user == "root" else hq.current.stat().st_uid)
    assert us in ran, "the trap does not work"
    assert ran == {us}
    assert done.returncode == 0, done.stdout + done.stderr


class TestWhoSurvivesWhom:
    def test_a_backup_goes_on_when_its_command_is_killed(self, hq: HqHost) -> None:
        with Frozen(hq, "pg_basebackup", "-D -") as copying:
            process = hq.start("run_backup", "postgres", "--type=daily")
            copying.stop("the base backup")
            killed(process.pid)
            process.communicate()
        no_engine(hq)
        (artifact,) = hq.backups.glob("postgres_monolith_daily_*.tar.gz")
        assert artifact.with_name(f".{artifact.name}.json").exists()
        (listed,) = (e for e in hq.catalog() if e["name"] == artifact.name and len(e["locations"]) == 2)
        hq.good("verify_backup", listed["name"])

    def test_a_backup_goes_on_when_all_of_hqs_processes_are_killed(self, hq: HqHost) -> None:
        """``cchq downtime start`` may end in ``pkill -u cchq -9``."""
        with Frozen(hq, "pg_basebackup", "-D -") as copying:
            process = hq.start("run_backup", "postgres", "--no-upload")
            copying.stop("the base backup")
            uid = hq.current.stat().st_uid
            for pid, _ in command_lines():
                try:
                    mine = Path(f"/proc/{pid}").stat().st_uid == uid and os.getsid(pid) == process.pid
                except (FileNotFoundError, ProcessLookupError):
                    continue
                if mine:
                    killed(pid)
            process.communicate()
        no_engine(hq)
        (artifact,) = hq.backups.glob("postgres_*.tar.gz")
        hq.good("verify_backup", artifact.name)

    @pytest.mark.parametrize("point", ["unpacking", "starting"])
    def test_a_restore_goes_on_when_its_command_is_killed(self, hq: HqHost, point: str) -> None:
        contents = hq.stock()
        hq.server.psql("UPDATE kept SET x = 'newer'")
        # The engine's child that unpacks runs as postgres; the cluster is started by Debian's tool.
        names = ("pg_verifybackup",) if point == "unpacking" else ("pg_ctlcluster", hq.server.name, "start")
        with Frozen(hq, *names) as frozen:
            process = hq.start("restore_backup", "postgres", "latest", "--source=local", *CONFIRMED)
            frozen.stop(point)
            killed(process.pid)
            process.communicate()
        no_engine(hq)
        assert hq.server.running
        assert hq.contents() == contents
        assert (
            json.loads((hq.data.parent / f".{hq.data.name}.hq_backups-restore.json").read_text())["phase"]
            == "done"
        )
        assert not list(hq.data.parent.glob(".*staging*"))

    def test_ctrl_c_cancels_a_backup_and_leaves_nothing(self, hq: HqHost) -> None:
        with hq.screen("run_backup", "postgres") as screen, Frozen(hq, "pg_basebackup", "-D -") as copying:
            copying.stop("the base backup")
            screen.press(b"\x03")
            screen.expect("stopping: waiting for the run to clean up")
            copying.send(signal.SIGCONT)
            assert screen.wait(30) == 1, screen.text
            drawn = [line for line in screen.drawn if line]
        assert any(line.startswith("ERROR: cancelled by") for line in drawn), drawn
        assert drawn[-1].startswith("RESULT failed ")
        assert drawn[-1].endswith("exit=1")
        assert "Traceback" not in screen.text
        no_engine(hq)
        assert [path.name for path in hq.backups.iterdir() if "postgres_" in path.name] == []
        assert not list(hq.backups.glob(".*.partial"))
        slots = "SELECT count(*) FROM pg_replication_slots"
        wait_until(lambda: hq.server.psql(slots) == "0", what="the slot to be dropped")
        client = hq.s3.client()
        assert "Uploads" not in client.list_multipart_uploads(Bucket=hq.bucket)
        status = "SELECT status FROM hq_backups_backuprun ORDER BY id DESC LIMIT 1"
        assert hq.server.psql(status, "commcarehq") == "failed"

    def test_a_restore_goes_on_when_the_connection_is_lost(self, hq: HqHost) -> None:
        contents = hq.stock()
        hq.server.psql("UPDATE kept SET x = 'newer'")
        with (
            hq.screen("restore_backup", "postgres", "latest", "--source=local") as screen,
            Frozen(hq, "pg_verifybackup") as unpacking,
        ):
            screen.expect("to go on: ")
            screen.type(ENV)
            unpacking.stop("the unpacking")
            screen.hang_up()
            unpacking.send(signal.SIGCONT)
            assert screen.process.wait(60) == 0, screen.text
        assert hq.contents() == contents
        assert hq.server.running
        runs = "SELECT status FROM hq_backups_backuprun WHERE verb = 'restore' ORDER BY id DESC LIMIT 1"
        assert hq.server.psql(runs, "commcarehq") == "ok"

    def test_ctrl_c_before_the_swap_changes_nothing(self, hq: HqHost) -> None:
        hq.stock()
        hq.server.psql("UPDATE kept SET x = 'newer'")
        contents = hq.contents()
        with (
            hq.screen("restore_backup", "postgres", "latest", "--source=local") as screen,
            Frozen(hq, "pg_verifybackup") as unpacking,
        ):
            screen.expect("to go on: ")
            screen.type(ENV)
            unpacking.stop("the unpacking")
            screen.press(b"\x03")
            screen.expect("stopping: waiting")
            unpacking.send(signal.SIGCONT)
            assert screen.wait(60) == 1, screen.text
        assert "RESULT failed" in screen.text
        assert "Traceback" not in screen.text
        assert hq.contents() == contents
        no_engine(hq)
        assert [p.name for p in hq.data.parent.iterdir() if "staging" in p.name] == []

    def test_ctrl_c_at_the_question_is_a_no(self, hq: HqHost) -> None:
        hq.stock()
        with hq.screen("restore_backup", "postgres", "latest", "--source=local") as screen:
            screen.expect("to go on: ")
            screen.press(b"\x03")
            assert screen.wait() == 4, screen.text
        assert "nothing was changed" in screen.text


def test_a_signal_that_another_thread_was_given_is_not_lost() -> None:
    """The kernel chooses the thread, and a wait of the main one is then not interrupted."""
    engine = EngineProcess(["sleep", "60"])
    before = signal.signal(signal.SIGINT, engine.interrupt)
    rest = threading.Event()
    other = threading.Thread(target=rest.wait)
    other.start()
    alarm = threading.Timer(0.3, lambda: signal.pthread_kill(other.ident or 0, signal.SIGINT))
    rescue = threading.Timer(10, engine.try_kill)
    alarm.start()
    rescue.start()
    try:
        assert next(iter(engine), None) == signal.SIGINT
    finally:
        rescue.cancel()
        engine.try_kill()
        engine.ended()
        signal.signal(signal.SIGINT, before)
        rest.set()


@pytest.mark.elasticsearch6
class TestElasticsearch:
    """Its records belong to one user, the command is run by another; the cluster asks neither who they are."""

    SECRET = "pw-of-elasticsearch-4711"

    @pytest.fixture
    def records(self, hq: HqHost, es6: ElasticsearchNode) -> Iterator[Path]:
        es6.wipe()
        fill(es6, documents=3)
        records = hq.root / "opt/data/backups/elasticsearch"
        records.mkdir(mode=0o700)
        give(records, "couchdb")
        changes = {
            "es_local_repo": True,
            "es_repository_location": f"sudo-{secrets.token_hex(4)}",
            "elasticsearch_url": es6.url,
            "elasticsearch_username": "hq",
            "elasticsearch_password": self.SECRET,
            "elasticsearch_data_dir": str(es6.data),
        }
        hq.configure(**changes)
        yield records
        hq.configure(**dict.fromkeys(changes))
        shutil.rmtree(records)
        es6.wipe()

    def test_cchq_does_everything_through_the_user_who_has_the_records(
        self, hq: HqHost, es6: ElasticsearchNode, records: Path
    ) -> None:
        before = contents(es6)
        lines: set[str] = set()
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(0.01):
                lines.update(argv for _, argv in command_lines())

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            said = [hq.good("run_backup", "elasticsearch", "--type=daily")]
            es6.bulk("forms", {"late": {"name": "late"}})
            later = contents(es6)
            words = ("restore_backup", "elasticsearch", "latest", "--indices=forms")
            said.append(hq.good(*words, *CONFIRMED))
            assert contents(es6) == before
            said.append(hq.good("restore_backup", "elasticsearch", "--undo", *CONFIRMED))
            assert contents(es6) == later
        finally:
            ended.set()
            watcher.join()
        assert any("sudo -n -u couchdb --" in line for line in lines)
        assert not any(self.SECRET in line for line in lines)
        assert self.SECRET not in repr(said)
        owners = {path.owner() for path in [records, *records.iterdir()]}
        assert owners == {"couchdb"}
        assert not [p for p in records.iterdir() if self.SECRET.encode() in p.read_bytes()]

    def test_without_a_rule_the_line_that_is_missing_is_told(self, hq: HqHost, records: Path) -> None:
        hq.rules.remove()
        refused = hq.run("run_backup", "elasticsearch")
        assert refused.code == 5, refused
        assert f"cchq ALL=(couchdb) NOPASSWD: {hq.python} -I {bridge.ENTRY}" in refused.err
        assert list(records.iterdir()) == []

    @pytest.mark.slow
    def test_a_snapshot_goes_on_and_is_recorded_when_its_command_is_killed(
        self, hq: HqHost, es6: ElasticsearchNode, records: Path
    ) -> None:
        repository = {
            "location": hq.settings["es_repository_location"],
            "max_snapshot_bytes_per_sec": "4kb",
        }
        es6.request("PUT", f"/_snapshot/{ENV}_es_snapshot", {"type": "fs", "settings": repository})
        process = hq.start("run_backup", "elasticsearch")
        wait_until(lambda: es6.request("GET", "/_snapshot/_status")["snapshots"], what="the snapshot")
        killed(process.pid)
        process.communicate()
        no_engine(hq)
        (entry,) = hq.catalog("elasticsearch")
        assert entry["managed"]
        hq.good("verify_backup", entry["name"])


class TestStrangers:
    """An engine that is not what the command expects, run for real as another user."""

    @pytest.fixture
    def copy(self, host: HqHost, monkeypatch: pytest.MonkeyPatch) -> Path:
        package = host.root / "other" / "hq_backups"
        shutil.rmtree(package.parent, ignore_errors=True)
        shutil.copytree(ROOT / "hq_backups", package, ignore=shutil.ignore_patterns("__pycache__"))
        monkeypatch.setattr(bridge, "ENTRY", package / "engine" / "entry.py")
        return package

    def run(self, host: HqHost) -> tuple[Exit, list[Event]]:
        store = StoreConfig(
            "postgres", "plain", host.backups, data_dir=host.data, options={"port": host.server.port}
        )
        job = Job(
            "catalog",
            Config(ENV, "pg0", stores={"postgres": store}),
            {"stores": ["postgres"], "source": "local"},
        )
        events: list[Event] = []
        return bridge.run(job, events.append, python=host.python), events

    def test_the_copy_works_as_it_is(self, host: HqHost, copy: Path) -> None:
        code, events = self.run(host)
        assert (code, events[-1].data["ok"]) == (0, True)

    @pytest.mark.parametrize(("module", "line"), [("config", "PROTOCOL = "), ("events", "VERSION = ")])
    def test_another_protocol_is_a_usage_error(
        self, host: HqHost, copy: Path, module: str, line: str
    ) -> None:
        path = copy / "engine" / f"{module}.py"
        text = path.read_text()
        assert f"\n{line}1\n" in text
        path.write_text(text.replace(f"\n{line}1\n", f"\n{line}2\n"))
        code, events = self.run(host)
        assert code == 2
        (error,) = (event.data for event in events if event.kind == "error")
        assert "protocol" in error["message"]
        assert "deploy hq_backups again" in error["hint"]
        assert events[-1].data == {**events[-1].data, "ok": False, "exit": 2}

    @pytest.mark.parametrize(
        ("crash", "said"),
        [
            ("import sys; sys.exit('no space for the stack')", "no space for the stack"),
            ("raise RuntimeError('half of it is missing')", "RuntimeError: half of it is missing"),
            ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ],
    )
    def test_an_engine_that_crashes_is_a_failed_run_with_its_last_words(
        self, host: HqHost, copy: Path, crash: str, said: str
    ) -> None:
        (copy / "engine" / "entry.py").write_text(crash + "\n")
        code, events = self.run(host)
        assert code == 1
        (error,) = (event.data for event in events if event.kind == "error")
        assert said in error["message"]
        assert "told no result" in error["message"]
        assert events[-1].kind == "result"
