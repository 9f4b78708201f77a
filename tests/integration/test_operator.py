"""What a stranger sees at 3 a.m. on a terminal of 80 columns, and what a program reads."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from hq_backups import standalone
from hq_backups.engine.events import Event
from tests.integration.hq_host import ENV, HqHost, Screen, hq_host
from tests.testbed.s3 import S3Service

pytestmark = [pytest.mark.root, pytest.mark.debian, pytest.mark.postgres15, pytest.mark.s3]
CONFIRMED = ("--noinput", f"--confirm-env={ENV}")
RESULT = re.compile(r"RESULT (ok|failed) run=(-|\d{8}T\d{6}Z-\S+) exit=(\d)")


@pytest.fixture(scope="module")
def host(s3: S3Service) -> Iterator[HqHost]:
    bucket = s3.make_bucket(versioned=True)
    with hq_host(s3, bucket) as host:
        host.fill(5)
        yield host
    s3.remove_bucket(bucket)


@pytest.fixture
def hq(host: HqHost) -> HqHost:
    host.clear()
    return host


def ended(screen: Screen, code: int) -> list[str]:
    """Wait for the end, check what holds for every verb, and return the lines as they were drawn."""
    assert screen.wait() == code, screen.text
    lines = [line for line in screen.drawn if line]
    last = RESULT.fullmatch(lines[-1].replace("⏎", ""))
    assert last, lines
    assert (last[1], last[3]) == ("failed" if code else "ok", str(code))
    assert sum("RESULT" in line for line in lines) == 1
    assert "Traceback" not in screen.text
    for line in broken(screen):
        raise AssertionError(f"a line is broken in the middle of words: {line}")
    return lines


def broken(screen: Screen) -> Iterator[str]:
    """Yield lines that the terminal had to break, but for commands, which are copied, and for paths alone."""
    for line in screen.text.split("\n"):
        shown = line.rpartition("\r")[2]
        is_command = (
            "commcare-cloud " in shown or "next: " in shown or "NOPASSWD" in shown or "sudo -u" in shown
        )
        if len(shown) > screen.columns and " " in shown.strip() and not is_command:
            yield shown


def hint_of(text: str) -> str:
    """Return the one next step of an error."""
    assert text.count("ERROR: ") == 1, text
    assert text.count("  next: ") == 1, text
    return text.split("  next: ")[1].split("\nRESULT")[0]


@pytest.mark.parametrize("name", standalone.commands())
@pytest.mark.parametrize("program", ["manage.py", "hq-backups"])
def test_each_help_has_examples_and_fits(name: str, program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    monkeypatch.setenv("COLUMNS", "80")
    module = importlib.import_module(f"hq_backups.management.commands.{name}")
    text = module.Command().create_parser(program, name).format_help()
    assert [line for line in text.splitlines() if len(line) > 79] == []
    examples = text.partition("\nexamples:\n")[2].splitlines()
    assert len(examples) >= 2
    assert all(line.startswith(f"  {program} {name}") for line in examples)
    for eaten in ("--server", "--release", "--tee", "--tmux", "--quiet"):
        options = re.findall(r"(?<!\S)--[a-z-]+", text)
        assert not [option for option in options if eaten.startswith(option)], eaten


def test_every_example_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    for name in standalone.commands():
        command = importlib.import_module(f"hq_backups.management.commands.{name}").Command()
        parser = command.create_parser("hq-backups", name)
        for line in command.examples.splitlines():
            parser.parse_args(re.split(r"\s{2,}", line.strip())[0].split()[1:])


def test_help_at_a_terminal(hq: HqHost) -> None:
    with hq.screen("restore_backup", "--help") as screen:
        assert screen.wait() == 0
    assert not any("⏎" in line for line in screen.drawn)
    assert "manage.py restore_backup postgres --undo" in screen.text
    usage = standalone.usage()
    assert max(map(len, usage.splitlines())) < 80


class TestBackup:
    def test_is_told_step_by_step(self, hq: HqHost) -> None:
        with hq.screen("run_backup", "postgres", "--type=daily") as screen:
            lines = ended(screen, 0)
        (artifact,) = hq.backups.glob("postgres_*.tar.gz")
        assert lines[0].startswith("backup postgres (run ")
        assert f"made {artifact.name}, " in "\n".join(lines)
        assert f"uploaded {artifact.name}" in lines
        # One line says how far it got, and only one.
        finished = [line for line in lines if re.match(r"  backup: \d", line)]
        assert len(finished) == 1, finished
        assert "(100 %)" in finished[0]
        # What ran before was shown in a line that is gone.
        assert "\x1b[2K" in screen.raw.decode()

    def test_without_a_terminal_there_are_no_escapes(self, hq: HqHost) -> None:
        done = hq.good("run_backup", "postgres")
        assert "\x1b" not in done.out + done.err
        assert RESULT.fullmatch(done.out.splitlines()[-1])

    def test_dry_run_touches_nothing(self, hq: HqHost) -> None:
        with hq.screen("run_backup", "postgres", "--dry-run") as screen:
            lines = ended(screen, 0)
        assert any("would write" in line for line in lines)
        assert list(hq.backups.glob("postgres_*")) == []
        assert hq.catalog() == []

    def test_a_server_that_is_down(self, hq: HqHost) -> None:
        hq.server.stop()
        with hq.screen("run_backup", "postgres") as screen:
            ended(screen, 5)
        assert "no PostgreSQL server answers at" in screen.text
        assert "pg_lsclusters" in hint_of(screen.text)

    def test_a_history_that_is_down_is_a_warning(self, hq: HqHost) -> None:
        local = hq.current / "localsettings.py"
        text = local.read_text()
        local.write_text(text.replace(f'"PORT": {hq.server.port}', '"PORT": 1'))
        try:
            with hq.screen("run_backup", "postgres") as screen:
                ended(screen, 0)
            assert screen.text.count("WARNING: the history cannot be written") == 1
            plain = hq.good("list_backups")
            assert "postgres_monolith_manual" in plain.out
            assert plain.err == ""
            synced = hq.run("list_backups", "--sync")
            assert synced.code == 1
            assert "next: Mend the database" in synced.err
        finally:
            local.write_text(text)
        (artifact,) = hq.backups.glob("postgres_*.tar.gz")
        hq.server.psql("TRUNCATE hq_backups_artifact, hq_backups_backuprun", "commcarehq")
        hq.good("list_backups", "--sync")
        listed = "SELECT name || ' ' || size || ' ' || (gone_at IS NULL) FROM hq_backups_artifact"
        assert hq.server.psql(listed, "commcarehq") == f"{artifact.name} {artifact.stat().st_size} true"


class TestJson:
    def events(self, text: str) -> list[Event]:
        return [Event.from_json(line) for line in text.splitlines()]

    def test_verbs_write_one_event_a_line_and_nothing_else(self, hq: HqHost) -> None:
        done = hq.good("run_backup", "postgres", "--json")
        events = self.events(done.out)
        assert [e.kind for e in events][0 :: len(events) - 1] == ["started", "result"]
        assert {"step", "progress", "artifact"} <= {e.kind for e in events}
        assert RESULT.fullmatch(done.err.splitlines()[-1])
        assert len({e.run for e in events}) == 1
        assert all(json.loads(line)["at"].endswith("Z") for line in done.out.splitlines())

        restored = hq.good("restore_backup", "postgres", "latest", "--json", *CONFIRMED)
        kinds = [e.kind for e in self.events(restored.out)]
        assert kinds.count("plan") == kinds.count("result") == kinds.count("started") == 1
        assert kinds.index("plan") < kinds.index("step")
        assert "Next:" in restored.err

    def test_a_failure_is_json_too(self, hq: HqHost) -> None:
        failed = hq.run("verify_backup", "latest", "--store=postgres", "--json")
        assert failed.code == 3
        events = self.events(failed.out)
        assert [e.data["exit"] for e in events if e.kind in ("error", "result")] == [3, 3]

    def test_lists_are_one_list(self, hq: HqHost) -> None:
        assert json.loads(hq.good("list_backups", "--json").out) == []
        hq.stock()
        (entry,) = json.loads(hq.good("list_backups", "--json").out)
        taken = datetime.strptime(entry["taken_at"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
        assert abs((datetime.now(UTC) - taken).total_seconds()) < 1800
        rows = json.loads(hq.good("list_backups", "--config", "--json").out)
        assert {"deploy_env", "postgresql_backup_dir"} <= {row["name"] for row in rows}


class TestList:
    def test_empty(self, hq: HqHost) -> None:
        with hq.screen("list_backups") as screen:
            assert screen.wait() == 0
        assert [line for line in screen.drawn if line] == ["no backups"]

    def test_says_where_each_lies(self, hq: HqHost) -> None:
        hq.stock()
        with hq.screen("list_backups") as screen:
            assert screen.wait() == 0
        (artifact,) = hq.backups.glob("postgres_*.tar.gz")
        lines = [line for line in screen.drawn if line]
        assert artifact.name in lines[-2] + lines[-1]
        assert re.search(r"\d MiB  local  ", lines[-1])

    def test_config_tells_value_and_source_but_no_secret(self, hq: HqHost) -> None:
        shown = hq.good("list_backups", "--config").out
        assert f"postgresql_data_dir: {hq.data}  (settings.HQ_BACKUPS)" in shown
        assert "deploy_env: monolith  (settings.SERVER_ENVIRONMENT)" in shown
        assert not any(secret in shown for secret in hq.secrets)


class TestRestore:
    def test_the_plan_is_read_and_refused(self, hq: HqHost) -> None:
        hq.stock()
        before, inode = hq.contents(), hq.data.stat().st_ino
        with hq.screen("restore_backup", "postgres", "latest") as screen:
            screen.expect("to go on: ")
            plan = screen.text
            screen.type("production")
            ended(screen, 4)
        for label in ("backup", "taken", "unpacked", "read from", "data directory", "old data kept", "as user",
                      "service", "stopped by", "started by"):  # fmt: skip
            assert re.search(rf"^  {label}  ", plan, re.MULTILINE) or f"\n  {label}\n" in plan, label
        assert f"  service         PostgreSQL cluster 15 {hq.server.name}\n" in plan
        assert "commcare-cloud monolith downtime start" in plan
        assert "nothing was changed" in screen.text
        assert (hq.contents(), hq.data.stat().st_ino) == (before, inode)

    def test_it_is_told_shortly_and_the_next_steps_once(self, hq: HqHost) -> None:
        hq.stock()
        with hq.screen("restore_backup", "postgres", "latest") as screen:
            screen.expect("to go on: ")
            screen.type(ENV)
            lines = ended(screen, 0)
        text = "\n".join(lines)
        name = f"PostgreSQL cluster 15 {hq.server.name}"
        steps = [line for line in lines if line.startswith("- ")]
        assert f"- stopping {name}" in steps
        assert f"- starting {name} on the restored data" in steps
        (old,) = hq.data.parent.glob(f"{hq.data.name}.before-*")
        assert "setting the old data aside as" in text
        assert not any("pg_ctlcluster" in step for step in steps)
        for once in (
            "Plan",
            "Next:",
            "downtime start",
            "downtime end",
            "check_services",
            "list_backups --sync",
        ):
            assert text.count(once) == 1, once
        assert (
            text.index("Plan")
            < text.index("downtime start")
            < text.index("- unpacking")
            < text.index("Next:")
        )
        assert re.search(r"^  downtime: [\d.]+ s$", text, re.MULTILINE)
        assert str(old) in screen.text
        # Sizes and times can be true: nothing is done by more than all, nothing takes days.
        assert all(int(part) <= 100 for part in re.findall(r"\((\d+) %\)", screen.text))
        assert not re.search(r"\d:\d\d:\d\d left", screen.text)

    def test_without_questions_the_plan_still_comes_first_from_one_job(self, hq: HqHost) -> None:
        hq.stock()
        with hq.screen("restore_backup", "postgres", "latest", *CONFIRMED) as screen:
            lines = ended(screen, 0)
        text = "\n".join(lines)
        assert text.count("Plan") == text.count("Next:") == 1
        assert text.index("Plan") < text.index("- unpacking") < text.index("- stopping")
        runs = "SELECT count(*) FROM hq_backups_backuprun WHERE verb = 'restore'"
        assert int(hq.server.psql(runs, "commcarehq")) >= 1
        with hq.screen("restore_backup", "postgres", "--undo", *CONFIRMED) as screen:
            undone = "\n".join(ended(screen, 0))
        assert undone.count("Plan") == 1
        assert undone.index("Plan") < undone.index("- stopping") < undone.index("- putting the old data back")
        assert "Delete the old data" not in undone

    @pytest.mark.parametrize(
        ("words", "code", "next_"),
        [
            (("latest",), 3, "list_backups postgres"),
            (("--undo",), 5, ".before-"),
            (("postgres_monolith_daily_2026_01_01.tar.gz", "--dry-run"), 3, "list_backups postgres"),
            ((), 2, "list_backups"),
        ],
    )
    def test_what_cannot_be_done_says_what_to_type(
        self, hq: HqHost, words: tuple[str, ...], code: int, next_: str
    ) -> None:
        with hq.screen("restore_backup", "postgres", *words) as screen:
            ended(screen, code)
        assert next_ in hint_of(screen.text)

    def test_a_bucket_that_is_away_is_named(self, hq: HqHost) -> None:
        hq.configure(postgres_snapshot_bucket="no-such-bucket-here")
        try:
            with hq.screen("restore_backup", "postgres", "latest", "--source=s3") as screen:
                ended(screen, 1)
            assert "bucket no-such-bucket-here does not exist" in " ".join(screen.text.split())
        finally:
            hq.configure(postgres_snapshot_bucket=hq.bucket)

    def test_a_restore_that_fails_puts_the_old_data_back_and_says_so(self, hq: HqHost) -> None:
        """The configuration in /etc no longer fits: the restored data do not start."""
        hq.stock()
        hq.server.psql("UPDATE kept SET x = 'newer'")
        before = hq.contents()
        # Started by the old configuration, the old data serve; the new start finds one that is broken once.
        hook = hq.server.config_dir / "conf.d" / "broken.conf"
        breaker = hq.root / "start"
        breaker.write_text(
            "#!/bin/sh\n"
            f"if [ ! -e {hq.root}/once ]; then touch {hq.root}/once; echo 'the disk is on fire' >&2; exit 1; fi\n"
            f"exec pg_ctlcluster --skip-systemctl-redirect 15 {hq.server.name} start\n"
        )
        breaker.chmod(0o755)
        stop = ["pg_ctlcluster", "--skip-systemctl-redirect", "15", hq.server.name, "stop", "-m", "fast"]
        hq.configure(postgresql_start_command=[str(breaker)], postgresql_stop_command=stop)
        try:
            with hq.screen("restore_backup", "postgres", "latest", *CONFIRMED) as screen:
                ended(screen, 8)
        finally:
            hq.configure(postgresql_start_command=None, postgresql_stop_command=None)
            hook.unlink(missing_ok=True)
        assert "the disk is on fire" in screen.text
        assert "The old data are serving" in " ".join(screen.text.split())
        assert "Next:" not in screen.text
        assert hq.contents() == before
        assert hq.server.running


def test_verify_deep_counts_what_was_backed_up(hq: HqHost) -> None:
    hq.stock()
    with hq.screen("verify_backup", "latest", "--store=postgres", "--deep") as screen:
        lines = ended(screen, 0)
    assert any(line.startswith("  ok     contents: ") and line.endswith(" rows, each read") for line in lines)
    (artifact,) = hq.backups.glob("postgres_*.tar.gz")
    damaged = bytearray(artifact.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    artifact.write_bytes(damaged)
    with hq.screen("verify_backup", artifact.name) as screen:
        ended(screen, 3)
    assert "is damaged" in screen.text
    assert "list_backups" in hint_of(screen.text)


def test_a_pipe_that_is_closed_does_not_stop_a_backup(hq: HqHost) -> None:
    """``run_backup … | head -n1`` makes a whole backup."""
    done = subprocess.run(
        ["bash", "-c", f"cd {hq.current}; setpriv --reuid cchq --regid cchq --init-groups "
         f"{hq.python} manage.py run_backup postgres | head -n1; exit ${{PIPESTATUS[0]}}"],
        env=hq.environment("cchq"),
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert "Traceback" not in done.stderr
    (artifact,) = hq.backups.glob("postgres_*.tar.gz")
    assert Path(artifact.with_name(f".{artifact.name}.json")).exists()
