"""Make a stand-in of a CouchDB release directory, in the shape that CouchDB's build makes.

A node is started by its bin/couchdb as a real one is: ``-couch_ini`` files on the command line, COUCHDB_ARGS_FILE in
the environment, Erlang's mapper of ports at ERL_EPMD_PORT. What serves then is tests.testbed.fake_couch.
"""

from __future__ import annotations

import configparser
import contextlib
import os
import re
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from tests.testbed.process import LOOPBACK

VERSION = "3.5.0"
ERTS = "erts-14.2.5"
CHECKOUT = Path(__file__).parents[2]
_PROGRAM = """#!{python} -B
import sys

sys.path.insert(0, {checkout!r})
from tests.testbed import couch_release

sys.exit(couch_release.{name}(sys.argv[1:], {options!r}))
"""


def make_release(directory: Path, *options: str, version: str = VERSION) -> Path:
    """Make one whose nodes get ``options`` of the stand-in; ``--die WORDS`` ends a node at once, with these words."""
    for part in ("bin", "etc", "releases", f"{ERTS}/bin"):
        (directory / part).mkdir(parents=True)
    (directory / "releases" / "start_erl.data").write_text(f"{ERTS.removeprefix('erts-')} {version}\n")
    (directory / "etc" / "default.ini").write_text(
        "[couchdb]\ndatabase_dir = ./data\n[chttpd]\nport = 5984\n"
    )
    # Read by a node that is started without -couch_ini: none of ours may be.
    (directory / "etc" / "local.ini").write_text(
        "[chttpd]\nbind_address = 0.0.0.0\n[admins]\nreal = secret\n"
    )
    (directory / "etc" / "vm.args").write_text("-name couchdb@127.0.0.1\n-setcookie monster\n")
    given = (*options, "--version", version)
    for program, name in ((directory / "bin/couchdb", "couchdb"), (directory / ERTS / "bin/epmd", "epmd")):
        program.write_text(
            _PROGRAM.format(python=sys.executable, checkout=str(CHECKOUT), name=name, options=given)
        )
        program.chmod(0o755)
    for path in (directory, *directory.rglob("*")):
        path.chmod(
            0o755 if path.is_dir() or (os.access(path, os.X_OK) and path.stat().st_mode & 0o100) else 0o644
        )
    return directory


def epmd(arguments: Sequence[str], options: Sequence[str]) -> int:
    """Map ports: hold the connection of every node that registers."""
    given = dict(zip(arguments[::2], arguments[1::2], strict=True))
    held = []
    with socket.create_server((given["-address"], int(given["-port"]))) as server:
        while True:
            held.append(server.accept())


def couchdb(arguments: Sequence[str], options: Sequence[str]) -> int:
    """Start a node as its ini files and vm.args say."""
    if "--die" in options:
        print(options[options.index("--die") + 1], file=sys.stderr, flush=True)
        return 1
    files = list(arguments[arguments.index("-couch_ini") + 1 :])
    ini = configparser.ConfigParser(strict=False, interpolation=None)
    ini.read(files)
    flags = Path(os.environ["COUCHDB_ARGS_FILE"]).read_text()
    name = re.findall(r"^-name (\S+)", flags, re.MULTILINE)[0]
    apart = (
        "-start_epmd false",
        "-kernel inet_dist_use_interface {127,0,0,1}",
        "-kernel dist_auto_connect never",
    )
    if lacking := [flag for flag in apart if flag not in flags.splitlines()]:
        # A real node would serve nevertheless, and be where others find it.
        print(f"this node could be met by others: {', '.join(lacking)}", file=sys.stderr)
        return 1
    if (address := ini.get("chttpd", "bind_address", fallback="every address")) != LOOPBACK:
        print(f"this node would listen on {address}", file=sys.stderr)
        return 1
    if ini.get("replicator", "max_jobs", fallback="500") != "0":
        print("this node would replicate", file=sys.stderr)
        return 1
    cookie = Path(os.environ["HOME"], ".erlang.cookie")
    if cookie.stat().st_mode & 0o077:
        print(f"Cookie file {cookie} must be accessible by owner only", file=sys.stderr)
        return 1
    port = int(os.environ["ERL_EPMD_PORT"])
    try:
        registered = socket.create_connection((LOOPBACK, port), timeout=5)
    except OSError as error:
        print(f"Protocol 'inet_tcp': register/listen error: {error}", file=sys.stderr)
        return 1
    with contextlib.closing(registered), socket.create_server((LOOPBACK, 0)) as distribution:
        threading.Thread(target=distribution.accept, daemon=True).start()
        ((user, password),) = ini["admins"].items()
        os.environ["FAKE_COUCH_ADMIN"] = f"{user}:{password}"
        # A node writes the hash of the password, and what else it makes up, into the last of its files.
        with Path(files[-1]).open("a") as last:
            last.write("; -pbkdf2-made-up\n")
        words = [
            "--data-dir",
            ini["couchdb"]["database_dir"],
            "--port",
            ini["chttpd"]["port"],
            "--name",
            name,
        ]
        from tests.testbed import fake_couch  # epmd need not wait for it

        return fake_couch.main([*words, *options])
