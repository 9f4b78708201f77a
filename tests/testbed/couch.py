"""Run CouchDB nodes: a real one from a release directory, else the stand-in."""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hq_backups.engine.couch.node import Node
from tests.testbed import couch_ctl
from tests.testbed.couch_data import FIXTURE_NODE
from tests.testbed.places import IS_ROOT, reachable_by_others, user_exists
from tests.testbed.process import LOOPBACK, ChildService, give, listening

RELEASE = "HQ_BACKUPS_TESTS_COUCHDB"
"""Environment variable: the directory of a CouchDB release, with bin/couchdb in it."""
CHECKOUT = Path(__file__).parents[2]


def couch_user() -> str | None:
    """Return whom nodes run as: never root, for its own files must be told from ours."""
    return "couchdb" if IS_ROOT and user_exists("couchdb") else None


class CouchNode(ChildService):
    """What both have in common: a node with a data directory, an admin and a name."""

    name = "couchdb"
    username = "admin"
    password = "couch-test-secret"

    def __init__(
        self,
        workdir: Path,
        data_dir: Path | None = None,
        *,
        node_name: str = FIXTURE_NODE,
        os_user: str | None = None,
        options: Sequence[str] = (),
    ) -> None:
        """Describe a node; its data directory is in the work directory unless given."""
        super().__init__(workdir)
        self.data_dir = data_dir or workdir / "data"
        self.node_name = node_name
        self.os_user = os_user
        self.options = list(options)

    @property
    def url(self) -> str:
        """Return the node's address."""
        return f"http://{LOOPBACK}:{self.port}"

    def node(self, timeout: float = 20) -> Node:
        """Return a client that is its admin."""
        return Node(self.url, self.username, self.password, timeout)

    def ready(self) -> bool:
        """Tell whether it answers."""
        return listening(self.port) and self.node().is_up()

    @property
    def serving(self) -> int | None:
        """Return the process that serves now, whoever started it."""
        return self.pid or couch_ctl.read_pid(self._state())

    def commands(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the commands that stop and start this node from anywhere, as a restore needs them."""
        state = self.workdir / "state.json"
        private = os.open(state, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(private, "w") as file:
            json.dump(self._state() | {"argv": [str(word) for word in self.argv()]}, file)
        program = (sys.executable, str(Path(couch_ctl.__file__)))
        return (*program, "stop", str(state)), (*program, "start", str(state))

    def _state(self) -> dict[str, Any]:
        return {
            "pid_file": str(self.workdir / "pid"),
            "data_dir": str(self.data_dir),
            "workdir": str(self.workdir),
            "log": str(self.log),
            "port": self.port,
            "os_user": self.os_user,
            "environment": dict(self.environment()),
        }

    def stop(self, timeout: float = 20.0) -> None:
        """End the node, also one that the commands started."""
        super().stop(timeout)
        couch_ctl.stop(self._state())

    def start(self) -> None:
        """Make what belongs to the node's user before it starts."""
        self.workdir.mkdir(parents=True, exist_ok=True)
        give(self.workdir, self.os_user)
        if not self.data_dir.exists():
            self.data_dir.mkdir(parents=True)
            give(self.data_dir, self.os_user)
        super().start()
        (self.workdir / "pid").write_text(str(self.pid))


class FakeCouch(CouchNode):
    """The stand-in; ``options`` make it fail on purpose (tests.testbed.fake_couch --help)."""

    name = "fake_couch"

    @staticmethod
    def unavailable() -> str:
        """Say why it cannot be started here; empty when it can."""
        return ""

    def argv(self) -> Sequence[str | Path]:
        """Return the command; the admin is no argument."""
        words = ["--data-dir", self.data_dir, "--port", str(self.port), "--name", self.node_name]
        return [sys.executable, "-m", "tests.testbed.fake_couch", *words, *self.options]

    def environment(self) -> Mapping[str, str]:
        """Return an environment with the admin and our code."""
        more = {"FAKE_COUCH_ADMIN": f"{self.username}:{self.password}", "PYTHONPATH": str(CHECKOUT)}
        return {**super().environment(), **more, "PYTHONDONTWRITEBYTECODE": "1"}

    def start(self) -> None:
        """Start; ready when it says so, for it may have been told not to answer."""
        self._began = self.log.stat().st_size if self.log.exists() else 0
        super().start()

    def ready(self) -> bool:
        """Tell whether it said that it is."""
        return b"ready" in self.log.read_bytes()[self._began :]


class Epmd(ChildService):
    """Erlang's mapper of ports, one for each node: the shared one would stay behind after the tests."""

    name = "epmd"

    def __init__(self, workdir: Path, program: Path, os_user: str | None) -> None:
        """Name the program, which comes with the release."""
        super().__init__(workdir)
        self.program = program
        self.os_user = os_user

    def argv(self) -> Sequence[str | Path]:
        """Return the command."""
        return [self.program, "-address", LOOPBACK, "-port", str(self.port)]

    def ready(self) -> bool:
        """Tell whether it listens."""
        return listening(self.port)


class RealCouch(CouchNode):
    """A node of a release directory, single, with a cookie of its own: it can join nobody."""

    def __init__(self, workdir: Path, *args: Any, **described: Any) -> None:
        """Describe a node; its id and cookie stay over restarts."""
        super().__init__(workdir, *args, **described)
        self._uuid, self._cookie = secrets.token_hex(16), secrets.token_hex(16)
        self._epmd: Epmd | None = None

    def start(self) -> None:
        """Start its mapper of ports first."""
        if self._epmd is None:
            programs = sorted(Path(os.environ[RELEASE]).glob("erts-*/bin/epmd"))
            self._epmd = Epmd(self.workdir, programs[-1], self.os_user)
            self._epmd.start()
        super().start()

    def stop(self, timeout: float = 20.0) -> None:
        """End both."""
        super().stop(timeout)
        if self._epmd is not None:
            self._epmd.stop()
            self._epmd = None

    @staticmethod
    def unavailable() -> str:
        """Say why it cannot be started here; empty when it can."""
        named = os.environ.get(RELEASE)
        if not named:
            return f"{RELEASE} names no release directory"
        program = Path(named) / "bin" / "couchdb"
        if not program.exists():
            return f"{program} is not there"
        if IS_ROOT and not reachable_by_others(program):
            return f"other users cannot run {program}"
        return ""

    def argv(self) -> Sequence[str | Path]:
        """Return the command, its settings written first (docs.couchdb.org, config/intro)."""
        release = Path(os.environ[RELEASE])
        settings = self.workdir / "local.ini"
        settings.write_text(
            f"[couchdb]\ndatabase_dir = {self.data_dir}\nview_index_dir = {self.data_dir}\n"
            f"uuid = {self._uuid}\n"
            f"[chttpd]\nport = {self.port}\nbind_address = {LOOPBACK}\n"
            f"[httpd]\nenable = false\n"
            f"[log]\nlevel = warning\nwriter = stderr\n"
            f"[admins]\n{self.username} = {self.password}\n"
        )
        settings.chmod(0o600)
        give(settings, self.os_user)
        arguments = self.workdir / "vm.args"
        arguments.write_text(
            f"-name {self.node_name}\n-setcookie {self._cookie}\n"
            "-kernel error_logger silent\n-sasl sasl_error_logger false\n+Bd -noinput\n"
            "-kernel inet_dist_use_interface {127,0,0,1}\n"
        )
        give(arguments, self.os_user)
        return [release / "bin" / "couchdb"]

    def environment(self) -> Mapping[str, str]:
        """Return an environment with the two files instead of the release's own."""
        release = Path(os.environ[RELEASE])
        ini = f"{release}/etc/default.ini {self.workdir}/local.ini"
        return {
            **super().environment(),
            "COUCHDB_INI_FILES": ini,
            "COUCHDB_ARGS_FILE": str(self.workdir / "vm.args"),
            "ERL_EPMD_ADDRESS": LOOPBACK,
            "ERL_EPMD_PORT": str(self._epmd.port if self._epmd else 4369),
        }


def couch_class() -> type[FakeCouch | RealCouch]:
    """Return the kind of node that tests run on."""
    return RealCouch if os.environ.get(RELEASE) else FakeCouch
