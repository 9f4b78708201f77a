"""Feeding a dump to psql: the lines that no server would take are changed on the way, everything else must pass."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from fcntl import F_SETPIPE_SZ, fcntl
from pathlib import Path
from typing import IO

from hq_backups.engine.child import DRAIN_SECONDS, Child
from hq_backups.engine.errors import (
    CorruptBackup,
    DiskFull,
    HQBackupsError,
    PreflightFailed,
    ProducerFailed,
    ServiceError,
)
from hq_backups.engine.postgres import dump
from hq_backups.engine.postgres.dump import CREATE_ROLE, HEAD_LIMIT, IDENTIFIER, Scanner, unquoted
from hq_backups.engine.postgres.psql import Server
from hq_backups.engine.postgres.replay import literal
from hq_backups.engine.postgres.rights import Narrower, borrow_sql
from hq_backups.engine.streams import PlainReader

EXIT_SECONDS = 3600.0
"""How long psql may work on after its input has ended."""
_OPTIONS = " -c client_min_messages=warning"
_NAME = rb"(" + IDENTIFIER + rb")"
_ALTER_ROLE = re.compile(rb"ALTER ROLE " + _NAME + rb" (?:WITH|SET) ")
_DROP = re.compile(rb"DROP (DATABASE|ROLE|TABLESPACE) (?:IF EXISTS )?" + _NAME + rb";\Z")
_TABLESPACE = re.compile(rb"(CREATE TABLESPACE " + _NAME + rb" .*?LOCATION )'(?:[^']|'')*'(.*;)\Z", re.DOTALL)
_TAG = re.compile(rb"^COPY (\d+)$", re.MULTILINE)
_ERROR = re.compile(r"psql:<stdin>:(\d+): (?:ERROR|FATAL|error):\s+(.*)")

_REFUSED = re.compile(
    r"permission denied|must be (?:owner|member|superuser|able to SET ROLE)|must have (?:privileges|\S+ option)"
    r"|[Oo]nly (?:roles|superusers?) |unsafe use of|\S+ option cannot be granted"
)
"""The server's words for a user who may not do something."""


@dataclass(frozen=True)
class Changes:
    """What is changed in a dump's head, which is all before its first database."""

    roles: frozenset[str]
    """Roles that are there: they are not created again."""
    keep: frozenset[str] = frozenset()
    """Roles whose attributes and passwords stay as they are, such as the one that loads."""
    tablespaces: Mapping[str, Path | None] = field(default_factory=dict)
    """A new place for each tablespace by name; None for one that is there already."""
    narrower: Narrower | None = None
    """Leaves out what the user who loads may not say, when that is no superuser."""

    def apply(self, head: bytes) -> bytes:
        """Return the head to load: as many lines as before, so that errors name the dump's own."""
        changed = b"".join(
            self._changed(piece) if is_statement else piece for piece, is_statement in dump.statements(head)
        )
        if self.narrower is None:
            return changed
        # The line before the first database is an empty one: errors after it name the dump's own lines, too.
        line = borrow_sql(self.narrower.rights.major).encode() + b"\n"
        return changed[:-1] + line if changed.endswith(b"\n\n") else changed + line

    def _changed(self, piece: bytes) -> bytes:
        said = piece.strip()
        nothing = b"\n" * piece.count(b"\n")
        if (found := CREATE_ROLE.match(said)) and unquoted(found[1]) in self.roles:
            return nothing
        if (found := _ALTER_ROLE.match(said)) and unquoted(found[1]) in self.keep:
            return nothing
        # `pg_dumpall --clean` drops first what a new cluster never had.
        if (found := _DROP.match(said)) and (found[1], found[2]) not in _REMADE:
            return nothing
        if (found := _TABLESPACE.match(said)) and unquoted(found[2]) in self.tablespaces:
            place = self.tablespaces[unquoted(found[2])]
            if place is None:
                return nothing
            lead = piece[: len(piece) - len(piece.lstrip())]
            return lead + found[1] + literal(str(place)).strip().encode() + found[3]
        return piece if self.narrower is None else self.narrower.changed(piece)


_REMADE = ((b"DATABASE", b"template1"), (b"DATABASE", b"postgres"))
"""What `pg_dumpall --clean` drops and then makes anew."""


class Loader(Child):
    """psql, fed through its standard input; its COPY tags are collected, everything else that it says passed over."""

    def __init__(self, psql: Path, server: Server, env: Mapping[str, str]) -> None:
        """Start it; it stops at the first error."""
        argv = [str(psql), "-X", "-w", "-v", "ON_ERROR_STOP=1", "-f", "-", "-d"]
        argv.append(server.conninfo("postgres"))
        super().__init__(argv, stdin=subprocess.PIPE, env=env, user=server.os_user, cwd="/")
        assert self.popen.stdin is not None  # noqa: S101  it was asked for
        self._input: IO[bytes] = self.popen.stdin
        with contextlib.suppress(OSError):
            fcntl(self._input.fileno(), F_SETPIPE_SZ, 1 << 20)
        self._copied: list[int] = []
        self._listener = threading.Thread(target=self._listen, name="hqb-tags", daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self.popen.stdout is not None  # noqa: S101  it was asked for
        rest = b""
        with contextlib.suppress(OSError, ValueError):
            while data := os.read(self.popen.stdout.fileno(), 1 << 16):
                whole, _, rest = (rest + data).rpartition(b"\n")
                self._copied += map(int, _TAG.findall(whole))

    def write(self, data: bytes) -> None:
        """Feed all of ``data``; raises ProducerFailed when psql has stopped."""
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._input.fileno(), view) :]
        except BrokenPipeError:
            raise self.failure() from None

    def finish(self) -> list[int]:
        """End the input, wait for the exit, return the rows of each COPY; raises ProducerFailed."""
        self._input.close()
        if not self.wait(EXIT_SECONDS):
            self.kill()
            raise self.failure("it did not exit")
        self._listener.join(DRAIN_SECONDS)
        if self.reap() != 0:
            raise self.failure()
        return self._copied


def load(plain: PlainReader, psql: Path, server: Server, changes: Changes, place: Path | str) -> Scanner:
    """Load a dump into a server; raises CorruptBackup, or what keeps this server from taking it.

    Returns what was seen of it. ``place`` is named when the disk is full.
    """
    scanner = Scanner()
    head: bytes | None = b""
    try:
        with server.environment() as env, Loader(psql, server, _for_load(env)) as loader:
            while chunk := plain.chunk():
                scanner.feed(chunk)
                if head is None:
                    loader.write(chunk)
                    continue
                head += chunk
                if scanner.head_end is not None:
                    loader.write(changes.apply(head[: scanner.head_end]) + head[scanner.head_end :])
                    head = None
                elif len(head) > HEAD_LIMIT:
                    raise CorruptBackup("no database begins in it", name=plain.name)
            scanner.require_whole(plain.name)
            if head is not None:
                raise CorruptBackup("no database is in it", name=plain.name)
            tags = loader.finish()
    except ProducerFailed as error:
        raise _explained(error, plain.name, place, server) from error
    _compare(tags, scanner, plain.name)
    return scanner


def _for_load(env: Mapping[str, str]) -> dict[str, str]:
    return {**env, "PGOPTIONS": env.get("PGOPTIONS", "") + _OPTIONS}


def _compare(tags: list[int], scanner: Scanner, name: str) -> None:
    """Compare the rows that the server took with those that were fed, COPY by COPY."""
    fed = [each.rows for each in scanner.copies]
    if tags == fed:
        return
    for each, took in zip(scanner.copies, tags, strict=False):
        if each.rows != took:
            raise CorruptBackup(
                f"{each.table} in {each.database!r} has {each.rows} rows, the server took {took}", name=name
            )
    raise CorruptBackup(f"it has {len(fed)} tables with rows, the server took {len(tags)}", name=name)


def _explained(error: ProducerFailed, name: str, place: Path | str, server: Server) -> HQBackupsError:
    """Say why a load failed in the server's words, with the line of the dump."""
    said = str(error.facts["stderr"])
    if "No space left on device" in said:
        return DiskFull(path=place)
    found = _ERROR.search(said)
    if found is None:
        return CorruptBackup(f"it could not be loaded: {error.message}", name=name)
    line, words = found[1], found[2]
    if "extension" in words and (
        "not available" in words or "could not open extension control file" in words
    ):
        return PreflightFailed(
            f"the dump needs what this host's PostgreSQL does not have: {words} (line {line})",
            hint="Install that extension's package for this version, then repeat the command.",
        )
    if _REFUSED.match(words):
        return ServiceError(
            f"user {server.user} may not run all of {name} on the server at {server.where}: line {line}: {words}",
            hint=f"See the statement: gunzip -c {name} | sed -n {line}p. Load as a superuser, as the user who owned "
            "it where it was dumped, or change it there and dump again. The server holds a part of the dump now: "
            "add --recreate.",
        )
    return CorruptBackup(f"it could not be loaded: line {line}: {words}", name=name)
