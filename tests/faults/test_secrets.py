"""Secrets are in no output, event, file, command line or environment, and in no error."""

from __future__ import annotations

import base64
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.faults.engine_process import Engine, Outcome
from tests.faults.victim import VICTIMS, HostVictim
from tests.faults.victim_couch import CouchVictim
from tests.testbed.places import server_user
from tests.testbed.postgres import PostgresServer
from tests.testbed.process import short_directory, wait_until
from tests.testbed.s3 import VersityGW

pytestmark = [pytest.mark.faults, pytest.mark.postgres15]
MODES = ("plain", "dump", "tablespaces", "blobdb", "couch")
ONLY = {
    "test_no_secret_in_a_node_s_address_is_seen": ("couch",),
    # No other store's password is ever written into a file.
    "test_a_password_file_does_not_outlive_a_killed_run_for_long": ("plain", "dump", "tablespaces"),
}
# It has no secret of its own, and those of the bucket are looked for with every other store.
LONG = ("blobdb",)
WRONG_PASSWORD = {"postgres": 5, "couch": 0}
"""What a backup with a wrong password ends with: the files of CouchDB are good without its node's answers."""

ACCESS = "CANARYACCESSKEY"
SECRET = "canary+secret/S3=key"
# With what pgpass files, connection strings and JSON must escape.
PASSWORD = "canary:pass\\word"


def spellings(secret: str) -> list[bytes]:
    """Return a secret as the ways in which it could be hidden from a plain search."""
    raw = secret.encode()
    packed = base64.b64encode(raw).rstrip(b"=")
    escaped = raw.replace(b"\\", b"\\\\")
    return [
        raw,
        escaped,
        escaped.replace(b":", b"\\:"),
        quote(secret, safe="").encode(),
        packed,
        raw.hex().encode(),
    ]


CANARIES = [spelt for secret in (ACCESS, SECRET, PASSWORD) for spelt in spellings(secret)]


def found_in(data: bytes) -> list[bytes]:
    return [canary for canary in CANARIES if canary in data]


def is_a_node(pid: str) -> bool:
    """Tell whether a process is the stand-in for CouchDB, which is told its admin that way."""
    with suppress(OSError):
        return b"tests.testbed.fake_couch" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


class Watch:
    """Looks at the command lines and environments of all processes, again and again."""

    def __init__(self, but: set[int]) -> None:
        self.but = but
        self.leaks: set[str] = set()
        self.looks = 0
        self.programs: set[str] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        # Only what comes while we look: older processes cannot hold the canaries.
        old = {int(n) for n in os.listdir("/proc") if n.isdigit()} | self.but
        while not self._stop.is_set():
            for name in os.listdir("/proc"):
                if name.isdigit() and int(name) not in old:
                    self._look(name)
            self.looks += 1
            self._stop.wait(0.002)

    def _look(self, pid: str) -> None:
        for what in ("cmdline", "environ"):
            try:
                data = Path(f"/proc/{pid}/{what}").read_bytes()
            except OSError:
                continue
            if what == "cmdline":
                self.programs.add(os.path.basename(data.split(b"\0")[0].decode(errors="replace")))
            if found_in(data) and not is_a_node(pid):
                self.leaks.add(f"{what} of {pid}: {data!r}")


@pytest.fixture
def guarded_server(
    fresh_pg: Callable[..., PostgresServer], pg_template: Callable[[int], Path], mode: str
) -> Iterator[Any]:
    """Serve data for a canary as password, where there is any."""
    if VICTIMS[mode].store == "postgres":
        server = fresh_pg(15, start=False, auth="scram-sha-256")
        server.password = PASSWORD
        server._set_password()
        # The server's own environment must not be what we find.
        server.password = ""
        server.restart()
        server.password = PASSWORD
        yield server
        return
    with short_directory(server_user()) as workdir, VICTIMS[mode].serve(workdir, pg_template) as served:
        served.password = PASSWORD
        yield served


@pytest.fixture
def guarded(guarded_server: Any, mode: str) -> Iterator[HostVictim]:
    """Return a server that wants a password, and a bucket, both with canaries for keys."""
    with short_directory() as place:
        gateway = VersityGW(place / "gw")
        gateway.access_key, gateway.secret_key = ACCESS, SECRET
        with gateway:
            victim = VICTIMS[mode](guarded_server.workdir, guarded_server, compression="gzip")
            if isinstance(victim, CouchVictim):
                victim.least = 1
            victim.make_data(2)
            if victim.store in WRONG_PASSWORD:
                victim.options["password"] = PASSWORD
            victim.use_bucket(gateway, gateway.make_bucket(versioned=True))
            yield victim


def assert_silent(outcome: Outcome) -> Outcome:
    assert found_in(outcome.stdout.encode()) == []
    assert found_in(outcome.stderr.encode()) == []
    return outcome


def assert_no_file_tells(*places: Path) -> None:
    for place in places:
        for path in place.rglob("*"):
            # state.json is the stand-in's, by which it is started again.
            if path.is_file() and not path.name.endswith((".tar", ".tar.gz", "state.json")):
                assert found_in(path.read_bytes()) == [], path


@contextmanager
def watching(victim: HostVictim) -> Iterator[Watch]:
    assert victim.s3 is not None
    with Watch({os.getpid(), victim.s3.pid or 0}) as watch:
        yield watch
    assert watch.leaks == set()
    assert watch.looks > 3


def test_no_secret_is_seen_while_all_goes_well(guarded: HostVictim) -> None:
    beside = guarded.home / "beside"
    jobs = [
        guarded.backup(),
        guarded.verify(source="s3"),
        guarded.verify(deep=True),
        guarded.upload(),
        guarded.prune(),
        guarded.restore(target_dir=beside),
    ]
    with watching(guarded) as watch:
        for job in jobs:
            assert_silent(guarded.run(job)).expect(0)
    assert guarded.programs <= watch.programs
    assert guarded.stray_temporaries() == []
    assert_no_file_tells(guarded.backups, guarded.tmp, guarded.home)
    assert guarded.s3 is not None
    client = guarded.s3.client()
    for key in guarded.objects():
        if key.endswith(".json"):
            body = client.get_object(Bucket=guarded.bucket, Key=key)["Body"].read()
            assert found_in(body) == []


@pytest.mark.slow
def test_no_secret_is_seen_in_a_restore(guarded: HostVictim) -> None:
    guarded.run(guarded.backup()).expect(0)
    with watching(guarded):
        assert_silent(guarded.run(guarded.restore(source="s3"))).expect(0)
        assert_silent(guarded.run(guarded.undo())).expect(0)
    assert guarded.is_serving()
    assert_no_file_tells(guarded.backups, guarded.tmp, guarded.home)


def test_no_secret_is_seen_when_things_fail(guarded: HostVictim) -> None:
    guarded.run(guarded.backup()).expect(0)
    wrong: dict[str, Any] = {"s3": {"secret_key": SECRET + SECRET}}
    unknown: dict[str, Any] = {"s3": {"access_key": ACCESS + "X"}}
    nowhere: dict[str, Any] = {"s3": {"endpoint": "http://127.0.0.1:9"}}
    cases: list[tuple[Any, dict[str, Any], int]] = [
        (guarded.backup(changes=wrong), {}, 7),
        (guarded.backup(changes=unknown), {}, 7),
        (guarded.backup(changes=nowhere), {"patience": 1}, 7),
        (guarded.backup(changes={"store": {"bucket": "no-such-bucket-here"}}), {}, 7),
    ]
    if guarded.store in WRONG_PASSWORD:
        guarded.options["password"] = PASSWORD + PASSWORD
        cases += [(guarded.backup(), {}, WRONG_PASSWORD[guarded.store])]
        guarded.options["password"] = PASSWORD
    with watching(guarded):
        for job, plan, status in cases:
            assert_silent(guarded.run(job, plan)).expect(status)
    assert_no_file_tells(guarded.backups, guarded.tmp)
    assert guarded.stray_temporaries() == []


@pytest.mark.parametrize("password", [pytest.param(PASSWORD, marks=pytest.mark.slow), SECRET])
def test_no_secret_in_a_node_s_address_is_seen(guarded: HostVictim, password: str) -> None:
    server = guarded.server
    server.password = password
    server.stop()
    server.start()
    cases = [
        (f"127.0.0.1:{server.port}", ""),
        ("127.0.0.1:9", "connection refused"),
        ("127.0.0.1:port", "no address of the kind"),
        ("[127.0.0.1", "no address of the kind"),
    ]
    # Also as somebody writes it who does not know that some of it must be escaped.
    for written in (quote(password, safe=""), password):
        for place, warned in cases:
            url = f"http://{server.username}:{written}@{place}"
            guarded.options.update(url=url, username=None, password=None)
            with watching(guarded):
                outcome = assert_silent(guarded.run(guarded.backup(upload=False))).expect(0)
            assert warned in outcome.warnings
            assert bool(outcome.warnings) is bool(warned), outcome.warnings
    assert_no_file_tells(guarded.backups, guarded.tmp)


class Line:
    """A job that is sent as it stands."""

    verb = "backup"

    def __init__(self, text: str) -> None:
        self.text = text

    def to_json(self) -> str:
        return self.text


def test_a_job_that_cannot_be_read_is_not_repeated(guarded: HostVictim) -> None:
    text = guarded.backup().to_json()
    lines = [
        text[:-40],
        text.replace('"env":"prod"', '"env":["prod"]'),
        text.replace('"protocol":1', '"protocol":2'),
        text.replace('"bucket":', '"buckets":'),
    ]
    for line in lines:
        assert line != text
        with Engine(Line(line), guarded.user, guarded.tmp) as engine:  # type: ignore[arg-type]
            assert assert_silent(engine.wait()).status == 2


def test_a_fault_of_ours_prints_no_secret(guarded: HostVictim) -> None:
    job = guarded.backup(changes={"timezone": "Nowhere/Atall"})
    assert_silent(guarded.run(job))


def test_a_password_file_does_not_outlive_a_killed_run_for_long(guarded: HostVictim) -> None:
    modes: set[int] = set()

    def password_is_in_use() -> bool:
        for path in guarded.tmp.glob("hqb-pgpass-*"):
            with suppress(FileNotFoundError):
                modes.add(path.stat().st_mode & 0o777)
        return bool(modes) and any(guarded.backups.glob(".*.partial"))

    with guarded.engine(guarded.backup()) as engine:
        wait_until(password_is_in_use, what="the backup's beginning")
        engine.kill()
        engine.wait()
    assert modes == {0o600}
    guarded.settled()
    guarded.run(guarded.backup()).expect(0)
    assert guarded.stray_temporaries() == []
