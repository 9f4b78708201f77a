"""Give tests the real services."""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

from tests.testbed.couch import CouchNode, FakeCouch, couch_class, couch_user
from tests.testbed.couch_data import unpack_fixture
from tests.testbed.debian import DebianCluster
from tests.testbed.elasticsearch import ElasticsearchNode
from tests.testbed.pgbouncer import PgBouncer
from tests.testbed.places import POSTGRES_VERSIONS, python_reachable, server_user
from tests.testbed.postgres import PostgresServer
from tests.testbed.process import short_directory
from tests.testbed.redis import RedisServer
from tests.testbed.s3 import MotoServer, S3Service, VersityGW
from tests.testbed.smtp import MailServer, SilentServer
from tests.testbed.sweep import sweep
from tests.testbed.system import SudoRules, tmpfs, tmpfs_unavailable
from tests.testbed.toxiproxy import Toxiproxy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from xdist.scheduler import LoadScopeScheduling

# A loaded machine makes any single example slow.
hypothesis.settings.register_profile("shared", deadline=None)
hypothesis.settings.load_profile("shared")

# A shell's background job, or nohup, leaves them ignored, and the commands rightly keep them so.
for _number, _handler in (
    (signal.SIGHUP, signal.SIG_DFL),
    (signal.SIGQUIT, signal.SIG_DFL),
    (signal.SIGINT, signal.default_int_handler),
):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)

REQUIRED = os.environ.get("HQ_BACKUPS_TESTS_REQUIRE_SERVICES") == "1"
MARKERS = {
    "pg14": ("postgres14",),
    "pg15": ("postgres15",),
    "pg18": ("postgres18",),
    "es6": ("elasticsearch6",),
    "es7": ("elasticsearch7",),
    "versitygw": ("s3",),
    "moto_server": ("s3",),
    "toxiproxy": ("toxiproxy",),
    "redis": ("redis",),
    "browser": ("chromium",),
    "debian_cluster": ("root", "debian", "postgres15"),
    "sudo_rules": ("root",),
    "small_disk": ("root",),
}


def require_service(name: str, available: bool, reason: str) -> None:
    """Skip the test for want of a service; fail it where nothing may be skipped."""
    if available:
        return
    if REQUIRED:
        pytest.fail(f"{name} is required here: {reason}", pytrace=False)
    pytest.skip(f"{name}: {reason}")


def pytest_configure(config: pytest.Config) -> None:
    """Clean up after killed sessions, and let fixtures end when this one is terminated."""
    sweep()
    signal.signal(signal.SIGTERM, lambda *_: pytest.exit("terminated", returncode=143))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test by the services that its fixtures start; those with sudo rules come first, being long."""
    for item in items:
        for fixture in getattr(item, "fixturenames", ()):
            for marker in MARKERS.get(fixture, ()):
                item.add_marker(marker)
    items.sort(key=lambda item: not writes_sudo_rules(str(item.path)))


@functools.cache
def writes_sudo_rules(path: str) -> bool:
    """Tell whether a file's tests do: sudo knows a program by its file, so a rule of one holds for every other."""
    text = Path(path).read_text()
    return any(word in text for word in ("hq_host", "SudoRules", "sudo_rules"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """Give a file's tests to one process, for what the file starts once; to one as well all with sudo rules."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            name = nodeid.partition("::")[0]
            return "sudo" if writes_sudo_rules(str(config.rootpath / name)) else name

    return ByFile(config, log)


@pytest.fixture(autouse=True)
def own_state(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no test read or leave alarm state on this machine."""
    monkeypatch.setenv(
        "HQ_BACKUPS_BACKUP_STATE_DIR", str(tmp_path_factory.getbasetemp() / f"state-{secrets.token_hex(4)}")
    )


@pytest.fixture(scope="session")
def services_dir() -> Iterator[Path]:
    """Make the directory of the services that live for the session."""
    with short_directory() as path:
        yield path


@pytest.fixture
def short_tmp() -> Iterator[Path]:
    """Make a short, traversable directory that the PostgreSQL servers' user owns."""
    with short_directory(server_user()) as path:
        yield path


@pytest.fixture(scope="session")
def pg_template(services_dir: Path) -> Callable[[int], Path]:
    """Return a function that initialises one cluster per version, to be copied."""
    made: dict[int, PostgresServer] = {}

    def template(version: int) -> Path:
        if version not in made:
            server = PostgresServer(version, services_dir / f"t{version}")
            server.make_cluster()
            made[version] = server
        return made[version].data_dir

    return template


@contextlib.contextmanager
def _session_server(version: int, services_dir: Path) -> Iterator[PostgresServer]:
    reason = PostgresServer.unavailable(version)
    require_service(f"PostgreSQL {version}", not reason, reason)
    with PostgresServer(version, services_dir / f"pg{version}") as server:
        yield server


@pytest.fixture(scope="session")
def pg14(services_dir: Path) -> Iterator[PostgresServer]:
    """Run a PostgreSQL 14 server for the session; a test may add databases, not stop it."""
    with _session_server(14, services_dir) as server:
        yield server


@pytest.fixture(scope="session")
def pg15(services_dir: Path) -> Iterator[PostgresServer]:
    """Run a PostgreSQL 15 server for the session; a test may add databases, not stop it."""
    with _session_server(15, services_dir) as server:
        yield server


@pytest.fixture(scope="session")
def pg18(services_dir: Path) -> Iterator[PostgresServer]:
    """Run a PostgreSQL 18 server for the session; a test may add databases, not stop it."""
    with _session_server(18, services_dir) as server:
        yield server


@pytest.fixture(
    params=[
        pytest.param(version, marks=getattr(pytest.mark, f"postgres{version}"), id=f"pg{version}")
        for version in POSTGRES_VERSIONS
    ]
)
def pg(request: pytest.FixtureRequest) -> PostgresServer:
    """Run the test on each version's session server."""
    server: PostgresServer = request.getfixturevalue(f"pg{request.param}")
    return server


@pytest.fixture
def fresh_pg(pg_template: Callable[[int], Path]) -> Iterator[Callable[..., PostgresServer]]:
    """Return a factory of running throw-away clusters: `fresh_pg(15, extra_conf={...})`.

    Copies of a version's template share its system identifier; `new_system=True`, or any
    initdb arguments, initialises another. `start=False` leaves the cluster made but stopped.
    """
    with contextlib.ExitStack() as stack:

        def make(
            version: int = 15, *, new_system: bool = False, start: bool = True, **options: Any
        ) -> PostgresServer:
            reason = PostgresServer.unavailable(version)
            require_service(f"PostgreSQL {version}", not reason, reason)
            if not new_system and not options.get("initdb_args"):
                options["template"] = pg_template(version)
            workdir = stack.enter_context(short_directory(server_user()))
            server = PostgresServer(version, workdir, **options)
            stack.callback(server.remove)
            if start:
                server.start()
            else:
                server.initdb()
            return server

        yield make


@pytest.fixture
def pgbouncer() -> Iterator[Callable[[PostgresServer], PgBouncer]]:
    """Return a factory of running poolers in front of a server."""
    reason = PgBouncer.unavailable()
    require_service("pgbouncer", not reason, reason)
    with contextlib.ExitStack() as stack:

        def make(server: PostgresServer) -> PgBouncer:
            workdir = stack.enter_context(short_directory(server.os_user))
            return stack.enter_context(PgBouncer(workdir, server))

        yield make


@pytest.fixture
def couch_node() -> Iterator[Callable[..., CouchNode]]:
    """Return a factory of CouchDB nodes: `couch_node("t0", node_name="couchdb@other")`.

    Its data directory is a copy of the real node's at "t0" or "t1", ``data_dir``, or empty. A real node runs
    where HQ_BACKUPS_TESTS_COUCHDB names a release; with ``options`` it is always the stand-in, told to fail.
    """
    with contextlib.ExitStack() as stack:

        def make(
            moment: str | None = None, *, start: bool = True, options: tuple[str, ...] = (), **described: Any
        ) -> CouchNode:
            described.setdefault("os_user", couch_user())
            kind = FakeCouch if options else couch_class()
            reason = kind.unavailable()
            require_service("CouchDB", not reason, reason)
            workdir = stack.enter_context(short_directory(described["os_user"]))
            service = kind(workdir, options=options, **described)
            stack.callback(service.stop)
            if moment is not None:
                unpack_fixture(moment, service.data_dir, service.os_user)
            if start:
                service.start()
            return service

        yield make


@contextlib.contextmanager
def _elasticsearch(version: int, services_dir: Path) -> Iterator[ElasticsearchNode]:
    reason = ElasticsearchNode.unavailable(version)
    require_service(f"Elasticsearch {version}", not reason, reason)
    with ElasticsearchNode(version, services_dir / f"es{version}") as node:
        yield node


@pytest.fixture(scope="session")
def es6(services_dir: Path) -> Iterator[ElasticsearchNode]:
    """Run an Elasticsearch 6.8 for the session; a test leaves it running."""
    with _elasticsearch(6, services_dir) as node:
        yield node


@pytest.fixture(scope="session")
def es7(services_dir: Path) -> Iterator[ElasticsearchNode]:
    """Run an Elasticsearch 7.17 for the session; a test leaves it running."""
    with _elasticsearch(7, services_dir) as node:
        yield node


@pytest.fixture(scope="session")
def versitygw(services_dir: Path) -> Iterator[VersityGW]:
    """Run a strict S3 server for the session."""
    reason = VersityGW.unavailable()
    require_service("versitygw", not reason, reason)
    with VersityGW(services_dir / "vgw") as service:
        yield service


@pytest.fixture(scope="session")
def moto_server(services_dir: Path) -> Iterator[MotoServer]:
    """Run a lenient S3 server for the session."""
    reason = MotoServer.unavailable()
    require_service("moto", not reason, reason)
    with MotoServer(services_dir / "moto") as service:
        yield service


@pytest.fixture(scope="session")
def s3(versitygw: VersityGW) -> S3Service:
    """Return the S3 service that tests use unless they name one."""
    return versitygw


@pytest.fixture
def bucket(s3: S3Service) -> Iterator[str]:
    """Make an empty bucket that keeps no versions."""
    name = s3.make_bucket()
    yield name
    s3.remove_bucket(name)


@pytest.fixture
def versioned_bucket(s3: S3Service) -> Iterator[str]:
    """Make an empty bucket that keeps versions."""
    name = s3.make_bucket(versioned=True)
    yield name
    s3.remove_bucket(name)


@pytest.fixture(scope="session")
def toxiproxy(services_dir: Path) -> Iterator[Toxiproxy]:
    """Run the breaker of connections for the session; proxies are made per test."""
    reason = Toxiproxy.unavailable()
    require_service("toxiproxy", not reason, reason)
    with Toxiproxy(services_dir / "toxiproxy") as service:
        yield service


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    """Run a broker for the test, which may stop it."""
    reason = RedisServer.unavailable()
    require_service("Redis", not reason, reason)
    with short_directory() as place, RedisServer(place) as service:
        yield service


@pytest.fixture
def debian_cluster() -> Iterator[DebianCluster]:
    """Run a cluster in Debian's layout."""
    reason = DebianCluster.unavailable()
    require_service("Debian cluster", not reason, reason)
    with short_directory() as root, DebianCluster(root) as cluster:
        yield cluster


@pytest.fixture
def sudo_rules() -> Iterator[SudoRules]:
    """Let cchq run this interpreter as anybody, as HQ's hosts do."""
    reason = SudoRules.unavailable()
    require_service("sudo", not reason, reason)
    reason = f"{sys.executable} lies where they cannot go"
    require_service("Python for other users", python_reachable(), reason)
    with SudoRules(sys.executable) as rules:
        yield rules


@pytest.fixture
def small_disk() -> Iterator[Callable[[str], Path]]:
    """Return a factory of filesystems of a size: `small_disk("8m")`."""
    reason = tmpfs_unavailable()
    require_service("tmpfs", not reason, reason)
    with contextlib.ExitStack() as stack:
        yield lambda size: stack.enter_context(tmpfs(size))


@pytest.fixture
def database(pg15: PostgresServer) -> Iterator[str]:
    """Make an empty database on the session's PostgreSQL 15."""
    name = pg15.create_database(f"db_{secrets.token_hex(2)}")
    yield name
    pg15.drop_database(name)


@pytest.fixture
def mail_server() -> Iterator[MailServer]:
    """Run a mail server that takes everything."""
    with MailServer() as server:
        yield server


@pytest.fixture
def silent_server() -> Iterator[SilentServer]:
    """Run a server that accepts connections and says nothing."""
    with SilentServer() as server:
        yield server
