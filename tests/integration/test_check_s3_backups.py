"""What a check says of real buckets: right ones, and each way in which one is not."""

from __future__ import annotations

import json
import os
import re
import socket
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from hq_backups.engine import check, crons, errors, names
from hq_backups.engine.config import Config, Job, S3Config, StoreConfig, to_plain
from hq_backups.engine.entry import run_job
from hq_backups.engine.errors import Exit
from hq_backups.engine.events import Event, format_utc
from hq_backups.engine.repository import s3
from hq_backups.engine.repository.s3 import S3Repository
from hq_backups.engine.repository.s3_client import Network
from hq_backups.engine.repository.s3_object import RUN_METADATA
from hq_backups.engine.requests import CheckRequest
from tests import factories
from tests.integration.hq_host import HqHost, hq_host
from tests.testbed.process import alive
from tests.testbed.s3 import S3Service, VersityGW, refused_endpoint
from tests.testbed.s3_use import noise
from tests.testbed.smtp import MailServer

pytestmark = [pytest.mark.s3]
ENV = "icds_new_prod"
HOUR, DAY = timedelta(hours=1), timedelta(days=1)


def last_monday(hour: int) -> datetime:
    """Return a Monday that is over, in UTC, at an hour."""
    now = datetime.now(UTC)
    monday = now - DAY * (now.isoweekday() - 1 + 7)
    return monday.replace(hour=hour, minute=0, second=0, microsecond=0)


@dataclass
class Said:
    """How a check ended and what it said."""

    code: Exit
    events: list[Event]
    status: str

    @property
    def findings(self) -> list[dict[str, Any]]:
        return [dict(e.data) for e in self.events if e.kind == "finding"]

    @property
    def codes(self) -> list[str]:
        return [f["code"] for f in self.findings]

    @property
    def lines(self) -> list[str]:
        return [f["line"] for f in self.findings]

    @property
    def warnings(self) -> list[str]:
        return [str(e.data["message"]) for e in self.events if e.kind == "warning"]


@dataclass
class Checked:
    """A bucket, the host whose backups it should have, and the time at which it is looked at."""

    s3: S3Service
    bucket: str
    directory: Path
    now: datetime
    versioned: bool
    host: str = "pg0"
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.client = self.s3.client()

    def put(
        self, type_: str, taken_at: datetime, size: int = 4096, *, key: str | None = None, **changes: Any
    ) -> str:
        """Leave what a run of ours leaves; return its key."""
        data = noise(size, int(taken_at.timestamp()))
        facts = {"env": ENV, "host": self.host, "type": type_, **changes}
        run = f"{taken_at:%Y%m%dT%H%M%SZ}-{facts['host']}-postgres"
        name = names.local_name("postgres", facts["env"], type_, taken_at, "plain", "gzip")
        if key is None:
            fixed = names.fixed_key("postgres", type_, facts["host"], "plain", "gzip")
            key = fixed if self.versioned else name
        stored = self.client.put_object(Bucket=self.bucket, Key=key, Body=data, Metadata={RUN_METADATA: run})
        place = {"kind": "s3", "bucket": self.bucket, "key": key, "version_id": stored.get("VersionId")}
        times = {"started_at": format_utc(taken_at), "finished_at": format_utc(taken_at + HOUR)}
        days = {"local_date": f"{taken_at:%Y-%m-%d}", "codec": "gzip", "run": run}
        made = factories.manifest(name, data, repository=place, **times, **days, **facts)
        self.raw(key + names.MANIFEST_KEY_SUFFIX, made.to_json())
        return key

    def raw(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=key, Body=data)

    def week(self, size: int = 4096) -> str:
        """Leave the runs of the last days, as they should be; return the newest one's key."""
        day, key = self.now.replace(hour=0), ""
        for number in range(8, -1, -1):
            at = day - number * DAY
            if at <= self.now - HOUR:
                key = self.put("weekly" if at.isoweekday() == 7 else "daily", at, size)
        return key

    def check(self, **request: Any) -> Said:
        s3 = S3Config(self.s3.access_key, self.s3.secret_key, self.s3.endpoint, versioning=self.versioned)
        s3 = replace(s3, **{k: v for k, v in self.settings.items() if k in S3Config.__dataclass_fields__})
        bucket = self.settings.get("bucket", self.bucket)
        store = StoreConfig("postgres", "plain", self.directory, s3=True, bucket=bucket)
        config = Config(ENV, self.host, timezone="UTC", s3=s3, stores={"postgres": store})
        asked = to_plain(CheckRequest("postgres", **{"host": self.host, **request}))
        events: list[Event] = []
        code = run_job(Job.from_json(Job("check", config, asked).to_json()), events.append)
        status = self.directory / check.STATUS_FILE
        return Said(code, events, status.read_text() if status.exists() else "")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> datetime:
    """Let it be five in the morning of a Monday; the service keeps its own time."""
    now = last_monday(5)
    monkeypatch.setattr(check, "utc_now", lambda: now)
    return now


@pytest.fixture
def dated(s3: S3Service, bucket: str, tmp_path: Path, clock: datetime) -> Checked:
    return Checked(s3, bucket, tmp_path, clock, versioned=False)


@pytest.fixture
def fixed(s3: S3Service, versioned_bucket: str, tmp_path: Path, clock: datetime) -> Checked:
    return Checked(s3, versioned_bucket, tmp_path, clock, versioned=True)


@pytest.fixture(params=["dated", "fixed"])
def either(request: pytest.FixtureRequest) -> Checked:
    checked: Checked = request.getfixturevalue(request.param)
    return checked


class TestGood:
    def test_both_key_styles_in_todays_wording(self, either: Checked) -> None:
        either.week()
        done = either.check()
        assert done.code is Exit.OK, done
        daily, weekly = (f["key"] for f in done.findings)
        assert done.lines == [
            f"[OK] Last daily postgres backup is {daily}",
            f"[OK] Last weekly postgres backup is {weekly}",
        ]
        if either.versioned:
            assert (daily, weekly) == ("postgres_daily_pg0.tar.gz", "postgres_weekly_pg0.tar.gz")
        assert [f["age_seconds"] for f in done.findings] == [5 * 3600, 29 * 3600]
        assert done.findings[0]["size"] == 4096

    def test_an_old_cron_job_beside_ours_is_told(
        self, dated: Checked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(crons, "CRON_DIR", tmp_path)
        dated.week()
        assert "old-cron" not in dated.check().codes
        (tmp_path / "backup_postgres").write_text("0 0 * * * postgres x\n")
        said = dated.check()
        assert said.code is Exit.OK
        assert "old-cron" in said.codes
        assert str(tmp_path / "backup_postgres") in said.status

    def test_monday_before_the_daily_one(self, either: Checked, monkeypatch: pytest.MonkeyPatch) -> None:
        either.now = either.now.replace(hour=0, minute=30)
        either.week()
        for hour, expected in ((3, []), (4, ["late"])):
            now = either.now.replace(hour=hour)
            monkeypatch.setattr(check, "utc_now", lambda now=now: now)
            done = either.check()
            assert done.codes == ["newest", "newest", *expected], (hour, done)
            assert done.code is (Exit.BAD_BACKUP if expected else Exit.OK)

    def test_the_hour_is_the_hosts(self, dated: Checked, monkeypatch: pytest.MonkeyPatch) -> None:
        dated.week()
        # By nadir hour 1, Sunday's (at 0:00) came before its due time, Monday's is late at five.
        done = dated.check(nadir_hour=1)
        assert "late" in done.codes

    def test_a_host_whose_clock_was_ahead_is_not_fresh_for_years(self, dated: Checked) -> None:
        key = dated.put("daily", dated.now + 2000 * DAY)
        assert isinstance(dated.s3, VersityGW)
        at = (dated.now - 5 * DAY).timestamp()
        os.utime(dated.s3.data / dated.bucket / key, (at, at))
        done = dated.check()
        assert done.codes[0] == "stale"
        assert done.findings[0]["age_seconds"] == 5 * 86400


class TestOldScripts:
    def aged(self, checked: Checked, key: str, age: timedelta, data: bytes = b"x" * 4096) -> None:
        """Leave an object that was uploaded a while ago: the service tells its file's time."""
        checked.raw(key, data)
        assert isinstance(checked.s3, VersityGW)
        at = (checked.now - age).timestamp()
        os.utime(checked.s3.data / checked.bucket / key.lstrip("/"), (at, at))

    @pytest.mark.parametrize(
        ("daily", "weekly"),
        [
            ("postgres_daily_pg0.tar.gz", "postgres_weekly_pg0.tar.gz"),
            ("postgres_daily_pg0.example.org.gz", "postgres_weekly_pg0.example.org.gz"),
            (f"postgres_{ENV}_daily_2026_11_22.tar.gz", f"postgres_{ENV}_weekly_2026_11_22.tar.gz"),
            (f"postgres_{ENV}_daily_2026_11_22.gz", f"postgres_{ENV}_weekly_2026_11_22.gz"),
            ("/opt/data/backups/postgresql/postgres_daily_2017_06_10.tar.gz", "postgres_weekly"),
        ],
    )
    def test_count_by_the_time_of_their_upload(self, dated: Checked, daily: str, weekly: str) -> None:
        self.aged(dated, daily, 3 * HOUR)
        self.aged(dated, weekly, 28 * HOUR)
        done = dated.check()
        assert done.code is Exit.OK, done
        assert done.lines[1] == f"[OK] Last weekly postgres backup is {weekly}"
        self.aged(dated, daily, 5 * DAY)
        self.aged(dated, weekly, 9 * DAY)
        done = dated.check()
        assert done.code is Exit.BAD_BACKUP
        assert done.codes == ["stale", "stale"]
        shown = daily.lstrip("/") if daily.lstrip("/") in done.lines[0] else daily
        assert done.lines[0] == (
            f"[ALERT] No daily postgres backup in last two days: the last one is 5 days old ({shown})"
        )

    def test_that_failed_left_twenty_bytes(self, dated: Checked) -> None:
        self.aged(dated, "postgres_daily_pg0.gz", 3 * HOUR, b"x" * 20)
        done = dated.check()
        assert done.code is Exit.BAD_BACKUP
        assert "[ALERT] postgres_daily_pg0.gz is empty: it has 20 bytes" in done.lines

    def test_of_other_hosts_and_environments_do_not_count(self, dated: Checked) -> None:
        self.aged(dated, "postgres_daily_pg1.gz", 3 * HOUR)
        self.aged(dated, "postgres_other_daily_2026_11_22.gz", 3 * HOUR)
        self.aged(dated, "couchdb_daily_pg0.tar.gz", 3 * HOUR)
        dated.put("daily", dated.now - 5 * HOUR, env="other")
        done = dated.check()
        assert done.codes == ["missing", "missing"]
        assert done.lines[0].endswith("the newest is of pg1 (postgres_daily_pg1.gz)")
        done = dated.check(host=None)
        assert done.lines[0] == "[OK] Last daily postgres backup is postgres_daily_pg1.gz"


class TestDamage:
    def test_a_truncated_object(self, dated: Checked) -> None:
        key = dated.week()
        dated.raw(key, noise(4000))
        done = dated.check()
        assert done.code is Exit.BAD_BACKUP
        assert f"[ALERT] {key} has 4000 bytes, its manifest says 4096" in done.lines
        assert done.findings[0]["key"] != key
        assert done.codes == ["newest", "newest", "late", "size-differs"]

    def test_other_bytes_of_the_same_size(self, dated: Checked) -> None:
        key = dated.week()
        dated.client.put_object(Bucket=dated.bucket, Key=key, Body=noise(4096, 7), ChecksumAlgorithm="CRC32")
        done = dated.check()
        assert (done.code, done.codes[-1]) == (Exit.BAD_BACKUP, "checksum-differs"), done

    def test_another_runs_object(self, dated: Checked) -> None:
        key = dated.week()
        client = dated.client
        same = client.get_object(Bucket=dated.bucket, Key=key)["Body"].read()
        client.put_object(Bucket=dated.bucket, Key=key, Body=same, Metadata={RUN_METADATA: "another"})
        done = dated.check()
        assert (done.code, done.codes[-1]) == (Exit.BAD_BACKUP, "replaced"), done

    def test_a_removed_object(self, either: Checked) -> None:
        either.week()
        newest = either.check().findings[0]
        which = {"VersionId": newest["version_id"]} if newest["version_id"] else {}
        either.client.delete_object(Bucket=either.bucket, Key=newest["key"], **which)
        done = either.check()
        assert done.code is Exit.BAD_BACKUP
        assert f"[ALERT] {newest['key']} is not in the bucket any more, its manifest is" in done.lines
        assert done.codes == ["newest", "newest", "late", "gone"]

    @pytest.mark.parametrize("raw", [b"", b'{"schema": 1}'])
    def test_a_manifest_that_cannot_be_read(self, dated: Checked, raw: bytes) -> None:
        key = dated.week()
        dated.raw(key + names.MANIFEST_KEY_SUFFIX, raw)
        done = dated.check()
        assert (done.code, done.codes[-1]) == (Exit.BAD_BACKUP, "manifest-unusable"), done

    def test_a_manifest_of_a_newer_release_is_no_damage(self, dated: Checked) -> None:
        beside = dated.week() + names.MANIFEST_KEY_SUFFIX
        body = json.loads(dated.client.get_object(Bucket=dated.bucket, Key=beside)["Body"].read())
        dated.raw(beside, json.dumps({**body, "schema": 2}).encode())
        done = dated.check()
        assert done.code is Exit.OK, done
        assert done.codes == ["newest", "newest", "newer-manifest"]

    def test_a_shrunk_newest(self, either: Checked) -> None:
        either.week(size=9000)
        key = either.put("daily", either.now - 4 * HOUR, 3000)
        done = either.check()
        assert done.code is Exit.BAD_BACKUP
        assert done.lines[2] == (
            f"[ALERT] {key} is much smaller than the ones before: 2.9 KiB, 33 % of 8.8 KiB"
        )
        assert (done.findings[2]["size"], done.findings[2]["usual_size"]) == (3000, 9000)

    def test_a_bucket_without_versions(self, dated: Checked) -> None:
        dated.week()
        dated.settings["versioning"] = True
        done = dated.check()
        assert (done.code, done.codes) == (Exit.BAD_BACKUP, ["newest", "newest", "unversioned"])
        assert "its versioning was never switched on" in done.lines[2]

    def test_a_bucket_whose_versioning_was_suspended(self, fixed: Checked) -> None:
        fixed.week()
        fixed.client.put_bucket_versioning(
            Bucket=fixed.bucket, VersioningConfiguration={"Status": "Suspended"}
        )
        done = fixed.check()
        assert done.codes == ["newest", "newest", "unversioned"]

    def test_an_empty_bucket(self, either: Checked) -> None:
        done = either.check()
        assert (done.code, done.codes) == (Exit.BAD_BACKUP, ["missing", "missing"])

    def test_a_bucket_that_cannot_be_asked_for_versions(
        self, dated: Checked, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        reason = "whether it keeps versions cannot be asked (AccessDenied)"
        monkeypatch.setattr(S3Repository, "versioning", lambda self: (None, reason))
        dated.week()
        dated.settings["versioning"] = True
        done = dated.check()
        assert done.codes == ["newest", "newest", "versioning-unknown"], done
        assert done.lines[2] == f"[WARNING] bucket {dated.bucket} may not keep versions: {reason}"
        assert done.code is Exit.OK

    def test_a_backup_that_arrives_meanwhile_is_no_damage(
        self, dated: Checked, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        dated.week()
        listed = S3Repository.list_objects, S3Repository.list_manifests

        def after(real: Any) -> Any:
            def slow(self: S3Repository, prefixes: Any) -> Any:
                found = list(real(self, prefixes))
                dated.put("daily", dated.now - 2 * HOUR, key=f"postgres_{ENV}_daily_2026_11_21_pg0.tar.gz")
                return iter(found)

            return slow

        monkeypatch.setattr(S3Repository, "list_objects", after(listed[0]))
        monkeypatch.setattr(S3Repository, "list_manifests", after(listed[1]))
        done = dated.check()
        assert done.codes == ["newest", "newest"], done


@pytest.mark.parametrize(
    ("error", "code", "exits"),
    [
        (errors.Unreachable("x", endpoint="e"), "unreachable", Exit.ERROR),
        (errors.AccessDenied("x", what="w"), "denied", Exit.ERROR),
        (errors.BadCredentials("x", endpoint="e"), "credentials", Exit.ERROR),
        (errors.WrongRegion("x", bucket="b", region="r"), "region", Exit.ERROR),
        (errors.NoSuchBucket(bucket="b", endpoint="e"), "no-such-bucket", Exit.ERROR),
        (errors.ClockSkew("x", endpoint="e"), "clock", Exit.ERROR),
        (errors.RepositoryError("x"), "service", Exit.ERROR),
        (errors.ConfigurationError("x"), "configuration", Exit.USAGE),
    ],
)
def test_each_cause_has_its_code(
    dated: Checked, monkeypatch: pytest.MonkeyPatch, error: errors.HQBackupsError, code: str, exits: Exit
) -> None:
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(check, "gather", fail)
    done = dated.check()
    assert (done.codes, done.code) == ([code], exits)
    assert done.status.startswith(f"[ERROR] The postgres backups could not be checked: {error.message}")


class TestUnasked:
    def test_a_service_that_says_nothing(self, dated: Checked, monkeypatch: pytest.MonkeyPatch) -> None:
        quick = partial(S3Repository, network=Network(connect=1.0, read=0.5, attempts=1))
        monkeypatch.setattr(s3, "S3Repository", quick)
        with socket.create_server(("127.0.0.1", 0)) as silent:
            dated.settings["endpoint"] = f"http://127.0.0.1:{silent.getsockname()[1]}"
            done = dated.check()
        assert (done.codes, done.code) == (["unreachable"], Exit.ERROR)
        assert "no answer in time" in done.lines[0]

    @pytest.mark.parametrize(
        ("settings", "code", "word"),
        [
            ({"secret_key": "wrong"}, "credentials", "AMAZON_S3_ACCESS_KEY"),
            ({"access_key": "nobody"}, "credentials", "AMAZON_S3_ACCESS_KEY"),
            ({"bucket": "hqb-there-is-none"}, "no-such-bucket", "Make the bucket"),
            ({"endpoint": "http://hqb.invalid:7"}, "unreachable", "aws_endpoint"),
            ({"endpoint": None}, "unreachable", "aws_endpoint"),
            ({"bucket": None}, "configuration", "list_backups --config"),
        ],
        ids=["secret", "key", "bucket", "dns", "refused", "unset"],
    )
    def test_is_an_error_with_its_cause(
        self, dated: Checked, settings: dict[str, Any], code: str, word: str
    ) -> None:
        if settings.get("endpoint", "") is None:
            settings = {"endpoint": refused_endpoint()}
        dated.settings |= settings
        done = dated.check()
        assert done.codes == [code], done
        assert done.lines[0].startswith("[ERROR] The postgres backups could not be checked: ")
        assert word in done.findings[0]["hint"]
        assert done.code is (Exit.USAGE if code == "configuration" else Exit.ERROR)
        assert done.status.startswith(done.lines[0])
        assert dated.s3.secret_key not in done.status

    def test_tls_where_there_is_none(self, dated: Checked) -> None:
        dated.settings["endpoint"] = dated.s3.endpoint.replace("http://", "https://")
        done = dated.check()
        assert done.codes == ["unreachable"]
        assert "TLS" in done.lines[0]


class TestStatusFile:
    def test_says_what_was_found_and_when(self, dated: Checked, monkeypatch: pytest.MonkeyPatch) -> None:
        dated.week()
        done = dated.check()
        assert done.status.splitlines() == [*done.lines, f"Checked {format_utc(dated.now)} on pg0"]
        path = dated.directory / check.STATUS_FILE
        assert stat.S_IMODE(path.stat().st_mode) == 0o644
        assert [p.name for p in dated.directory.iterdir()] == [check.STATUS_FILE]
        before = path.stat().st_ino
        later = dated.now + 3 * DAY
        monkeypatch.setattr(check, "utc_now", lambda: later)
        done = dated.check()
        assert path.stat().st_ino != before
        assert done.status.startswith("[ALERT] No daily postgres backup in last two days: ")
        assert "\n  next: run_backup postgres --type daily" in done.status
        assert done.status.endswith(f"\nChecked {format_utc(later)} on pg0\n")

    def test_that_cannot_be_written_is_a_warning(self, dated: Checked) -> None:
        dated.week()
        dated.directory = dated.directory / "none"
        done = dated.check()
        assert (done.code, done.status) == (Exit.OK, "")
        assert "s3_backup_status.txt cannot be written: No such file or directory" in done.warnings[0]

    def test_is_written_when_the_check_itself_fails(
        self, dated: Checked, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(*args: object) -> None:
            raise ValueError("a fault")

        monkeypatch.setattr(check, "gather", broken)
        done = dated.check()
        assert done.code is Exit.ERROR
        assert "[ERROR] The postgres backups could not be checked: ValueError: a fault" in done.status

    def test_survives_a_run_that_clears_up(self, dated: Checked, monkeypatch: pytest.MonkeyPatch) -> None:
        dated.week()
        rename, removed = os.rename, []

        def swept(old: Path, new: Path) -> None:
            if not removed:
                removed.append(old)
                os.unlink(old)
            rename(old, new)

        monkeypatch.setattr(check.os, "rename", swept)
        assert dated.check().status.startswith("[OK]")
        assert removed


@pytest.fixture(scope="module")
def host(s3: S3Service) -> Iterator[HqHost]:
    bucket = s3.make_bucket(versioned=True)
    with hq_host(s3, bucket) as host:
        host.good("run_backup", "postgres", "--type=daily")
        yield host
    s3.remove_bucket(bucket)


@pytest.fixture
def hq(host: HqHost) -> HqHost:
    """Return the module's host, with one backup in its bucket, no status file and no alarms."""
    (host.backups / check.STATUS_FILE).unlink(missing_ok=True)
    (host.root / "state" / "alarms.json").unlink(missing_ok=True)
    host.rules.install()
    host.configure(
        check_s3_backups_email=None, aws_endpoint=host.s3.endpoint, couch_s3=None, backup_couch=None
    )
    return host


@pytest.mark.root
@pytest.mark.debian
@pytest.mark.postgres15
class TestOnAHostLikeHqs:
    def test_as_cron_runs_it(self, hq: HqHost) -> None:
        done = hq.run("check_s3_backups")
        assert done.code == 0, done
        first, second, last = done.out.splitlines()
        assert first == "[OK] Last daily postgres backup is postgres_daily_pg0.tar.gz"
        assert second.startswith("[OK] No weekly postgres backup is due yet: ")
        assert re.fullmatch(r"RESULT ok run=\d{8}T\d{6}Z-pg0-postgres exit=0", last)
        assert done.err == ""
        status = hq.backups / check.STATUS_FILE
        assert (status.owner(), stat.S_IMODE(status.stat().st_mode)) == ("postgres", 0o644)
        text = status.read_text()
        assert text.splitlines()[:2] == [first, second]
        assert re.fullmatch(r"Checked \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ on pg0", text.splitlines()[2])
        assert not any(secret in text + done.out for secret in hq.secrets)

    def test_for_programs(self, hq: HqHost) -> None:
        done = hq.run("check_s3_backups", "postgres", "--json", "--no-email")
        events = [json.loads(line) for line in done.out.splitlines()]
        found = [e for e in events if e["kind"] == "finding"]
        assert [(f["code"], f["severity"], f["type"]) for f in found] == [
            ("newest", "ok", "daily"),
            ("not-due", "ok", "weekly"),
        ]
        assert found[0]["key"] == "postgres_daily_pg0.tar.gz"
        assert found[0]["version_id"]
        assert found[0]["size"] > 1 << 20
        assert 0 <= found[0]["age_seconds"] < 3600
        assert done.err.splitlines()[-1].startswith("RESULT ok ")

    def test_with_hqs_database_down(self, hq: HqHost) -> None:
        hq.server.stop()
        try:
            done = hq.run("check_s3_backups")
        finally:
            hq.server.start()
        assert done.code == 0, done
        assert done.err == ""
        assert done.out.startswith("[OK] Last daily postgres backup is ")

    def test_with_a_bucket_that_is_not_to_be_reached(self, hq: HqHost) -> None:
        hq.configure(aws_endpoint=refused_endpoint())
        done = hq.run("check_s3_backups")
        assert done.code == 1, done
        first, hint, last = done.out.splitlines()
        assert first.startswith("[ERROR] The postgres backups could not be checked: ")
        assert "connection refused" in first
        assert hint.startswith("  next: Look at aws_endpoint")
        assert last.endswith(" exit=1")
        assert (hq.backups / check.STATUS_FILE).read_text().startswith(first)

    def test_without_the_right_to_become_postgres(self, hq: HqHost) -> None:
        hq.rules.remove()
        done = hq.run("check_s3_backups")
        assert done.code == 0, done
        assert done.out.startswith("[OK] Last daily postgres backup is ")
        assert "WARNING: the status file is not written: this must run as postgres" in done.err
        assert "NOPASSWD" in done.err
        assert not (hq.backups / check.STATUS_FILE).exists()

    def test_what_is_wrong_is_mailed_once_and_taken_back(self, hq: HqHost, mail_server: MailServer) -> None:
        hq.mail_port = mail_server.port
        hq.configure(check_s3_backups_email="a@example.com,b@example.com", aws_endpoint=refused_endpoint())
        for _ in range(2):
            done = hq.run("check_s3_backups")
            assert done.code == 1, done
        (mail,) = mail_server.mails
        assert mail.to == ("a@example.com", "b@example.com")
        assert mail.subject == "[monolith] postgres: the backups could not be checked"
        assert "connection refused" in mail.text
        assert "django-manage check_s3_backups postgres" in mail.text
        assert "last good:  postgres_monolith_daily_" in mail.text
        hq.configure(aws_endpoint=hq.s3.endpoint)
        done = hq.run("check_s3_backups")
        assert (done.code, done.err) == (0, ""), done
        assert mail_server.subjects[1:] == ["[monolith] over: postgres: the backups could not be checked"]
        assert not any(secret in m.message.as_string() for m in mail_server.mails for secret in hq.secrets)
        state = hq.root / "state" / "alarms.json"
        assert (state.owner(), stat.S_IMODE(state.stat().st_mode)) == ("cchq", 0o600)

    def test_a_dead_database_is_mailed_by_the_check(self, hq: HqHost, mail_server: MailServer) -> None:
        hq.mail_port = mail_server.port
        hq.configure(check_s3_backups_email="a@example.com")
        hq.server.stop()
        try:
            done = hq.run("check_s3_backups")
        finally:
            hq.server.start()
        assert (done.code, done.err) == (0, ""), done
        (mail,) = mail_server.mails
        assert mail.subject == "[monolith] the database with the history cannot be read"
        assert hq.run("check_s3_backups").code == 0
        assert mail_server.subjects[1:] == ["[monolith] over: the database with the history cannot be read"]

    def test_a_mail_that_cannot_be_sent_is_in_the_status_file_until_it_can(
        self, hq: HqHost, mail_server: MailServer
    ) -> None:
        mail_server.stop()
        hq.mail_port = mail_server.port
        hq.configure(check_s3_backups_email="a@example.com", aws_endpoint=refused_endpoint())
        done = hq.run("check_s3_backups")
        assert done.code == 1, done
        assert "ERROR: an alarm mail cannot be sent: 127.0.0.1:" in done.err
        lines = (hq.backups / check.STATUS_FILE).read_text().splitlines()
        assert re.fullmatch(r"\[ERROR\] Alarms: mails cannot be sent since .* UTC: 127\.0\.0\.1.*", lines[-2])
        assert lines[-1].startswith("Checked ")
        assert "--no-email" not in hq.run("check_s3_backups", "--no-email").err
        mail_server.start()
        assert hq.run("check_s3_backups").code == 1
        assert mail_server.subjects == ["[monolith] postgres: the backups could not be checked"]
        assert "Alarms:" not in (hq.backups / check.STATUS_FILE).read_text()
        hq.configure(aws_endpoint=hq.s3.endpoint)
        assert hq.run("check_s3_backups").code == 0

    def test_a_failed_run_is_mailed_at_once_with_the_database_down_and_keeps_its_exit_code(
        self, hq: HqHost, mail_server: MailServer
    ) -> None:
        hq.mail_port = mail_server.port
        hq.configure(check_s3_backups_email="a@example.com")
        hq.server.stop()
        try:
            done = hq.run("run_backup", "postgres", "--type=daily")
        finally:
            hq.server.start()
        assert done.code in (1, 5), done
        assert mail_server.subjects == ["[monolith] postgres: the daily backup failed"]
        assert "connection" in mail_server.mails[0].text.lower()
        good = hq.run("run_backup", "postgres", "--type=daily")
        assert good.code == 0, good
        assert mail_server.subjects[1:] == ["[monolith] over: postgres: the daily backup failed"]

    def test_the_test_mail_says_to_whom_through_what_and_what_came_back(
        self, hq: HqHost, mail_server: MailServer
    ) -> None:
        hq.mail_port = mail_server.port
        hq.configure(check_s3_backups_email=None)
        nobody = hq.run("check_s3_backups", "--send-test-email")
        assert (nobody.code, "alarms are mailed to nobody" in nobody.err) == (2, True), nobody
        hq.configure(check_s3_backups_email="a@example.com,b@example.com")
        done = hq.run("check_s3_backups", "--send-test-email")
        assert done.code == 0, done
        assert done.out.splitlines()[:4] == [
            "to: a@example.com, b@example.com",
            "from: hq@example.com",
            f"backend: django.core.mail.backends.smtp.EmailBackend, server 127.0.0.1:{mail_server.port}",
            f"127.0.0.1:{mail_server.port} took the mail",
        ]
        assert mail_server.subjects == ["[monolith] test of backup alarms"]
        mail_server.refuse = "550 5.7.1 relaying denied"
        refused = hq.run("check_s3_backups", "--send-test-email")
        assert (refused.code, "550 5.7.1 relaying denied" in refused.err) == (1, True), refused
        mail_server.stop()
        down = hq.run("check_s3_backups", "--send-test-email")
        assert (down.code, "refused" in down.err.lower()) == (1, True), down

    def test_a_cluster_that_does_not_answer_does_not_hide_the_other_stores(self, hq: HqHost) -> None:
        hq.configure(backup_es_s3=True, elasticsearch_url="http://127.0.0.1:1")
        try:
            done = hq.run("check_s3_backups")
        finally:
            hq.configure(backup_es_s3=False)
        assert done.code == 1, done
        assert done.out.startswith("[OK] Last daily postgres backup is ")
        assert "[ERROR] The elasticsearch backups could not be checked: " in done.out
        assert "connection refused" in done.out

    def test_what_cannot_be_checked_is_an_error(self, hq: HqHost) -> None:
        hq.configure(postgres_s3=False)
        try:
            for words in ((), ("postgres",)):
                done = hq.run("check_s3_backups", *words)
                assert done.code == 2, done
                assert "upload" in done.err
        finally:
            hq.configure(postgres_s3=True)

    def test_leaves_nothing_behind(self, hq: HqHost) -> None:
        hq.run("check_s3_backups")
        assert not [p for p in hq.backups.iterdir() if p.name.endswith(".tmp")]
        assert not [pid for pid in hq.engines() if alive(pid)]
