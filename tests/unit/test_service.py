from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from hq_backups.engine import control, service
from hq_backups.engine.control import CommandService, Monit
from hq_backups.engine.errors import ConfigurationError, PreflightFailed, ServiceError
from hq_backups.engine.journal import Journal, write_journal
from hq_backups.engine.postgres.tools import Tools
from hq_backups.engine.service import DebianCluster, find_debian_cluster, find_postgres_service, is_running
from tests.testbed.debian import DebianCluster as RealCluster
from tests.testbed.postgres import PostgresServer
from tests.testbed.process import alive, wait_until

NO_SYSTEMD = Path("/nonexistent")


def find(data_dir: Path, etc: Path, **more: object) -> CommandService:
    facts: dict[str, object] = {"version": 15, "os_user": "postgres", "systemd": NO_SYSTEMD} | more
    found = find_postgres_service(data_dir, etc=etc, **facts)  # type: ignore[arg-type]
    assert isinstance(found, CommandService)
    return found


@pytest.fixture(autouse=True)
def _no_monit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Monit, "find", classmethod(lambda cls, names: None))


class Etc:
    def __init__(self, root: Path) -> None:
        self.root = root

    def cluster(self, version: str, name: str, conf: str) -> Path:
        path = self.root / version / name / "postgresql.conf"
        path.parent.mkdir(parents=True)
        path.write_text(conf)
        return path


@pytest.fixture
def etc(tmp_path: Path) -> Etc:
    return Etc(tmp_path / "etc")


class TestDebianClusters:
    @pytest.mark.parametrize(
        "line",
        [
            "data_directory = '{}'", "data_directory='{}'  # another directory", "data_directory '{}'",
            "  DATA_DIRECTORY = {}", "#data_directory = '/x'\ndata_directory = '{}'",
            "data_directory = '/first'\ndata_directory = '{}'", "data_directory\t=\t'{}'",
        ],
    )  # fmt: skip
    def test_are_found_by_their_data_directory(self, etc: Etc, tmp_path: Path, line: str) -> None:
        etc.cluster("14", "other", "data_directory = '/elsewhere'\n")
        etc.cluster("14", "main", "port = 5432\n" + line.format(tmp_path / "data") + "\n")
        assert find_debian_cluster(tmp_path / "data", etc.root) == DebianCluster("14", "main")

    @pytest.mark.parametrize(
        "conf", ["", "#data_directory = 'X'", "xdata_directory = 'X'", "data_directory_x = 'X'"]
    )
    def test_are_not_found_by_anything_else(self, etc: Etc, tmp_path: Path, conf: str) -> None:
        etc.cluster("14", "main", conf.replace("X", str(tmp_path)))
        assert find_debian_cluster(tmp_path, etc.root) is None
        assert find_debian_cluster(tmp_path, tmp_path / "none") is None

    def test_quotes_within_quotes(self, etc: Etc, tmp_path: Path) -> None:
        etc.cluster("14", "main", f"data_directory = '{tmp_path}/it''s \\'here\\''")
        assert find_debian_cluster(tmp_path / "it's 'here'", etc.root) is not None

    def test_links_are_resolved_on_both_sides(self, etc: Etc, tmp_path: Path) -> None:
        (tmp_path / "real").mkdir()
        (tmp_path / "a").symlink_to("real")
        (tmp_path / "b").symlink_to("real")
        etc.cluster("14", "main", f"data_directory = '{tmp_path}/a/main'")
        assert find_debian_cluster(tmp_path / "b" / "main", etc.root) == DebianCluster("14", "main")

    def test_an_included_file_counts_last(self, etc: Etc, tmp_path: Path) -> None:
        conf = etc.cluster("14", "main", "data_directory = '/first'")
        (conf.parent / "conf.d").mkdir()
        (conf.parent / "conf.d" / "hq.conf").write_text(f"data_directory = '{tmp_path}'")
        assert find_debian_cluster(tmp_path, etc.root) == DebianCluster("14", "main")


class TestHowItIsControlled:
    def test_configured_commands_come_first(self, etc: Etc, tmp_path: Path) -> None:
        etc.cluster("15", "main", f"data_directory = '{tmp_path}'")
        found = find(tmp_path, etc.root, stop_command=("down", "it"), start_command=("up", "it"))
        assert (found.stop_commands, found.start_command, found.user) == (
            (("down", "it"),),
            ("up", "it"),
            None,
        )

    @pytest.mark.parametrize("one", [{"stop_command": ("x",)}, {"start_command": ("x",)}])
    def test_one_of_the_two_is_not_enough(self, etc: Etc, tmp_path: Path, one: dict[str, object]) -> None:
        with pytest.raises(ConfigurationError, match="must be set together"):
            find(tmp_path, etc.root, **one)

    def test_systemd_where_it_is_the_init(self, etc: Etc, tmp_path: Path) -> None:
        etc.cluster("14", "main", f"data_directory = '{tmp_path}'")
        found = find(tmp_path, etc.root, systemd=tmp_path)
        assert found.start_command == ("systemctl", "start", "postgresql@14-main")
        assert found.stop_commands[0] == ("systemctl", "stop", "postgresql@14-main")
        assert found.stop_commands[1][:4] == ("pg_ctlcluster", "--skip-systemctl-redirect", "14", "main")

    def test_debians_tool_without_systemd(self, etc: Etc, tmp_path: Path) -> None:
        etc.cluster("14", "main", f"data_directory = '{tmp_path}'")
        found = find(tmp_path, etc.root)
        assert found.start_command[:5] == (
            "pg_ctlcluster",
            "--skip-systemctl-redirect",
            "14",
            "main",
            "start",
        )
        assert found.describe() == "PostgreSQL cluster 14 main"

    def test_pg_ctl_otherwise(self, etc: Etc, tmp_path: Path) -> None:
        bin_dir = tmp_path / "bin"
        bin_dir.mkdir()
        (bin_dir / "pg_ctl").write_text("#!/bin/sh\necho 'pg_ctl (PostgreSQL) 99.1'\n")
        (bin_dir / "pg_ctl").chmod(0o755)
        found = find(tmp_path, etc.root, version=99, tools=Tools(bin_dir))
        assert found.start_command[0] == str(bin_dir / "pg_ctl")
        assert found.user == "postgres"
        assert found.start_command[found.start_command.index("-l") + 1] == str(tmp_path / service.LOG_NAME)

    @pytest.mark.parametrize("version", [98, None])
    def test_what_is_not_known_is_asked_for(self, etc: Etc, tmp_path: Path, version: int | None) -> None:
        with pytest.raises(PreflightFailed, match="not known how the server of") as caught:
            find(tmp_path, etc.root, version=version)
        assert "postgresql_stop_command" in caught.value.hint

    def test_between_two_renames_the_data_set_aside_tell_the_version(self, etc: Etc, tmp_path: Path) -> None:
        written = Journal("r1", "postgres", "a", tmp_path / "main", tmp_path / "new", 1, 2, phase="old_aside")
        write_journal(written)
        written.old.mkdir()
        (written.old / "PG_VERSION").write_text("99\n")
        bin_dir = tmp_path / "bin"
        bin_dir.mkdir()
        (bin_dir / "pg_ctl").write_text("#!/bin/sh\necho 'pg_ctl (PostgreSQL) 99.1'\n")
        (bin_dir / "pg_ctl").chmod(0o755)
        found = find(tmp_path / "main", etc.root, version=None, os_user="nobody", tools=Tools(bin_dir))
        assert found.start_command[0] == str(bin_dir / "pg_ctl")
        assert found.user == written.old.owner()


class TestIsRunning:
    def test_nothing_there(self, tmp_path: Path) -> None:
        assert not is_running(tmp_path)
        assert not is_running(tmp_path / "missing")

    @pytest.mark.parametrize("content", ["{pid}\n", "1\n", "", "nonsense", "-1\n"])
    def test_a_stale_pid_file_whose_pid_is_another_programs(self, tmp_path: Path, content: str) -> None:
        with subprocess.Popen(["sleep", "300"], cwd=tmp_path) as other:
            (tmp_path / "postmaster.pid").write_text(content.format(pid=other.pid))
            assert not is_running(tmp_path)
            other.kill()

    @pytest.fixture
    def postgres(self, tmp_path: Path) -> Iterator[Callable[[Path], subprocess.Popen[bytes]]]:
        """Start a program called postgres somewhere."""
        binary = tmp_path / "postgres"
        shutil.copy("/bin/sleep", binary)
        started: list[subprocess.Popen[bytes]] = []

        def start(cwd: Path) -> subprocess.Popen[bytes]:
            started.append(subprocess.Popen([binary, "300"], cwd=cwd))
            comm = Path(f"/proc/{started[-1].pid}/comm")
            wait_until(lambda: comm.read_text() == "postgres\n", what="the program's own name")
            return started[-1]

        yield start
        for process in started:
            process.kill()
            process.wait()

    def test_a_postmaster_without_a_pid_file(
        self, tmp_path: Path, postgres: Callable[[Path], subprocess.Popen[bytes]]
    ) -> None:
        data, other = tmp_path / "data", tmp_path / "other"
        data.mkdir()
        other.mkdir()
        postgres(other)
        assert not is_running(data)
        running = postgres(data)
        assert is_running(data)
        (tmp_path / "link").symlink_to(data)
        assert is_running(tmp_path / "link")
        running.kill()
        running.wait()
        assert not is_running(data)

    def test_a_zombie_is_not_running(
        self, tmp_path: Path, postgres: Callable[[Path], subprocess.Popen[bytes]]
    ) -> None:
        running = postgres(tmp_path)
        (tmp_path / "postmaster.pid").write_text(f"{running.pid}\n")
        running.kill()
        os.waitid(os.P_PID, running.pid, os.WEXITED | os.WNOWAIT)
        assert not is_running(tmp_path)

    def test_one_whose_directory_was_deleted_still_runs(
        self, tmp_path: Path, postgres: Callable[[Path], subprocess.Popen[bytes]]
    ) -> None:
        data = tmp_path / "data"
        data.mkdir()
        postgres(data)
        data.rmdir()
        assert is_running(data)
        assert not is_running(tmp_path / "other")

    @pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
    def test_the_pid_file_is_believed_where_proc_tells_nothing(
        self,
        tmp_path: Path,
        postgres: Callable[[Path], subprocess.Popen[bytes]],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        data = tmp_path / "data"
        data.mkdir()
        running = postgres(tmp_path)
        real = os.stat

        def hidden(path: object, **more: object) -> os.stat_result:
            if str(path).endswith("/cwd"):
                raise PermissionError
            return real(path, **more)  # type: ignore[call-overload,no-any-return]

        monkeypatch.setattr(os, "stat", hidden)
        assert not is_running(data)
        (data / "postmaster.pid").write_text(f"{running.pid}\n{data}\n")
        assert is_running(data)
        (data / "postmaster.pid").write_text(f"{os.getpid()}\n")
        assert not is_running(data)


class TestCommands:
    @pytest.fixture
    def made(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CommandService:
        """A server that is a file."""
        monkeypatch.setattr(control, "_FAILED_STOP_SECONDS", 0.1)
        up = tmp_path / "up"
        up.touch()
        return CommandService(
            "it",
            (("rm", str(up)),),
            ("touch", str(up)),
            running=up.exists,
            stop_seconds=0.3,
            start_seconds=0.3,
        )

    def test_stop_and_start(self, made: CommandService) -> None:
        made.stop()
        assert not made.is_running()
        made.stop()
        made.start()
        assert made.is_running()
        made.start()

    def test_a_stop_that_does_not_stop_is_an_error(self, made: CommandService) -> None:
        stuck = replace(made, stop_commands=(("true",), ("sh", "-c", "echo no >&2; exit 1")))
        with pytest.raises(ServiceError, match=r"it still runs after `true ` and `sh -c .*`: no"):
            stuck.stop()

    def test_the_next_command_is_tried(self, made: CommandService) -> None:
        replace(made, stop_commands=(("false",), ("/no/such/program",), *made.stop_commands)).stop()
        assert not made.is_running()

    def test_a_stop_that_fails_but_stopped_is_fine(self, made: CommandService) -> None:
        script = f"{' '.join(made.stop_commands[0])}; exit 1"
        replace(made, stop_commands=(("sh", "-c", script),)).stop()

    @pytest.mark.parametrize(
        ("script", "said"), [("echo bad config >&2; exit 1", "bad config"), ("true", "silence")]
    )
    def test_a_start_that_does_not_start_is_an_error(
        self, made: CommandService, tmp_path: Path, script: str, said: str
    ) -> None:
        made.stop()
        log = tmp_path / "log"
        log.write_text("\n".join(f"line {n}" for n in range(100)))
        with pytest.raises(ServiceError, match=rf"it did not start by `sh -c .*`: {said}\n.*log:\nline 90\n"):
            replace(made, start_command=("sh", "-c", script), log=log).start()

    def test_facts_are_plain(self, made: CommandService) -> None:
        assert made.facts()["start"] == list(made.start_command)


FAKE_MONIT = r"""#!{python}
import json, sys
state = {state!r}
names = json.load(open(state))
*_, verb = words = [w for w in sys.argv[1:] if w in ("summary", "monitor", "unmonitor")]
if names is None:
    print("Monit: the monit daemon is not running", file=sys.stderr)
    sys.exit(verb == "summary")
if verb == "summary":
    print("Monit 5.33.0 uptime: 0m\n Service Name                     Status                      Type")
    for name, status in names.items():
        print(" %-32s %-27s %-13s" % (name, status, "Process"))
else:
    name = sys.argv[-1]
    if name not in names:
        print('There is no service named "%s"' % name, file=sys.stderr)
        sys.exit(1)
    names[name] = "Not monitored" if verb == "unmonitor" else "OK"
    json.dump(names, open(state, "w"))
"""


class TestMonit:
    @pytest.fixture
    def monit(self, tmp_path: Path) -> Callable[[str], CommandService]:
        def make(state: str) -> CommandService:
            (tmp_path / "state").write_text(state)
            program = tmp_path / "monit"
            program.write_text(FAKE_MONIT.format(python=sys.executable, state=str(tmp_path / "state")))
            program.chmod(0o755)
            monit = Monit(str(program), re.compile(service.MONIT_NAMES))
            return CommandService("it", (), ("up",), running=lambda: True, monit=monit)

        return make

    def test_looks_away_and_back(self, monit: Callable[[str], CommandService]) -> None:
        it = monit(
            '{"vm": "OK", "postgresql": "OK", "postgresql-exporter": "OK", "postgresql_14": "Running"}'
        )
        assert it.watched() == ("postgresql", "postgresql_14")
        it.hold(it.watched())
        assert it.watched() == ()
        it.release(("postgresql", "postgresql_14"))
        assert it.watched() == ("postgresql", "postgresql_14")

    @pytest.mark.parametrize(
        "status", ["Not monitored", "Initializing - unmonito...", "OK - Unmonitor pending"]
    )
    def test_what_the_operator_unmonitored_is_left_alone(
        self, monit: Callable[[str], CommandService], status: str
    ) -> None:
        assert monit(f'{{"postgresql": "{status}"}}').watched() == ()

    def test_a_daemon_that_is_down_watches_nothing(self, monit: Callable[[str], CommandService]) -> None:
        assert monit("null").watched() == ()

    def test_a_refusal_is_an_error(self, monit: Callable[[str], CommandService]) -> None:
        it = monit('{"postgresql": "OK"}')
        with pytest.raises(ServiceError, match="monit does not unmonitor nosuch: There is no service"):
            it.hold(["nosuch"])
        with pytest.raises(ServiceError, match="nosuch"):
            it.release(["nosuch", "postgresql"])
        assert it.watched() == ("postgresql",)

    def test_without_monit_there_is_nothing_to_do(self) -> None:
        it = CommandService("it", (), ("up",), running=lambda: True)
        assert it.watched() == ()
        it.hold(["x"])
        it.release(["x"])


class TestRealServers:
    def found(self, server: PostgresServer, etc: Path) -> CommandService:
        tools = Tools(server.bin_dir)
        return find(server.data_dir, etc, version=15, os_user=str(server.os_user), tools=tools)

    def round(self, found: CommandService, server: PostgresServer) -> None:
        assert is_running(server.data_dir)
        found.stop()
        assert not found.is_running()
        assert not server.running
        found.start()
        assert server.psql("SELECT 1") == "1"
        server.kill()
        assert not found.is_running()

    def test_pg_ctl(self, fresh_pg: Callable[..., PostgresServer], tmp_path: Path) -> None:
        server = fresh_pg(15)
        found = self.found(server, tmp_path)
        began = time.monotonic()
        self.round(found, server)
        assert time.monotonic() - began < 60  # a start under captured output would never return
        (server.data_dir / "postgresql.conf").write_text("nonsense = on\n")
        with pytest.raises(ServiceError, match="nonsense"):
            found.start()

    def test_debians_cluster(self, debian_cluster: RealCluster) -> None:
        found = find(debian_cluster.data_dir, service.ETC)
        assert debian_cluster.name in found.name
        self.round(found, debian_cluster)

    def test_a_server_that_does_not_answer_is_running(self, fresh_pg: Callable[..., PostgresServer]) -> None:
        server = fresh_pg(15)
        assert server.pid is not None
        os.kill(server.pid, signal.SIGSTOP)
        assert is_running(server.data_dir)
        os.kill(server.pid, signal.SIGCONT)

    def test_orphans_of_a_killed_postmaster_are_running(
        self, fresh_pg: Callable[..., PostgresServer]
    ) -> None:
        server = fresh_pg(15)
        pid = server.pid
        assert pid is not None
        orphan = int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
        os.kill(orphan, signal.SIGSTOP)
        try:
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: not alive(pid), what="the postmaster to end")
            assert is_running(server.data_dir)
        finally:
            os.kill(orphan, signal.SIGCONT)
        wait_until(lambda: not is_running(server.data_dir), what="the orphan to end")
