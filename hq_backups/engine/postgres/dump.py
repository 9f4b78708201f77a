"""Reading the SQL of pg_dumpall as it passes: which databases it holds, how many rows each COPY has, whether it ended.

A scanner, not a parser: it knows what SQL quotes with (so that text inside a function body or a comment is never
taken for a command), psql's commands at the start of a line, and the data of COPY, which it only searches for its
end and counts the lines of. Backslashes inside E'' strings need no care: pg_dump doubles quotes and backslashes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from hq_backups.engine.errors import CorruptBackup

COMPLETE = b"-- PostgreSQL database cluster dump complete"
HEAD_LIMIT = 16 << 20
"""More than this of roles and tablespaces before the first database is nothing that pg_dumpall wrote."""
_LINE_LIMIT = 1 << 20
"""Bytes of one command of psql, or of a COPY's table and columns."""
_TOKEN_LIMIT = 80
"""Bytes of the longest token that the end of a buffer can cut: a dollar quote with its tag."""
_PIECE = 64 << 10
"""Bytes that are looked at together: copies of more than twice as many are mapped anew each time, which takes longer
than all the rest."""
_SAMPLE, _LONG_ROW = 4096, 24
"""Of so many bytes it is seen whether rows are so long that searching for their ends is quicker than counting."""

IDENTIFIER = rb"(?:\"(?:[^\"]|\"\")+\"|[A-Za-z_\x80-\xff][A-Za-z0-9_$\x80-\xff]*)"
CREATE_ROLE = re.compile(rb"CREATE ROLE (" + IDENTIFIER + rb");\Z")
_TAG = rb"\$(?:[A-Za-z_\x80-\xff][A-Za-z0-9_\x80-\xff]*)?\$"
_TOKEN = re.compile(
    rb"['\"]|--|/\*|" + _TAG + rb"|^\\|^COPY |^CREATE DATABASE |^SET transaction_timeout ", re.MULTILINE
)
_TOO_NEW = re.compile(
    rb"CREATE DATABASE " + IDENTIFIER + rb" WITH TEMPLATE = template0(?: ENCODING = '[^']*')?"
    rb"(?P<provider> LOCALE_PROVIDER = libc)\b|(?P<timeout>SET transaction_timeout = 0;)\Z"
)
"""What a newer pg_dumpall writes of an older server, and that one refuses: locale providers came with version 15,
transaction_timeout with 17."""
_SINCE = {"provider": 15, "timeout": 17}
_COPY = re.compile(
    rb"COPY (?P<table>" + IDENTIFIER + rb"(?:\." + IDENTIFIER + rb")?)"
    rb" ?(?:\((?:[^\"()]|\"(?:[^\"]|\"\")*\")*\))? ?FROM stdin;\n"
)
_CONNECT = re.compile(rb"\\connect (?P<name>" + IDENTIFIER + rb"|[^\s\"]+)\s*\Z")
_CONNECT_BY_STRING = re.compile(rb"\\connect -reuse-previous=on (?P<string>\"(?:[^\"]|\"\")*\")\s*\Z")
_DBNAME = re.compile(rb"dbname=(?:'(?P<quoted>(?:[^'\\]|\\.)*)'|(?P<plain>\S+))\s*\Z", re.DOTALL)
_VERSION = re.compile(rb"-- Dumped from database version (\d+)\.(\d+)")
_END = re.compile(re.escape(COMPLETE) + rb"\n--\n\n(?:\\unrestrict [A-Za-z0-9]+\n\n?)?\Z")
_SPLIT = re.compile(
    rb"(?P<quoted>'[^']*'|\"[^\"]*\"|(?P<tag>" + _TAG + rb").*?(?P=tag))"
    rb"|(?P<aside>--[^\n]*\n?|^\\[^\n]*\n?)|(?P<end>;)",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Copied:
    """The data of one COPY."""

    database: str
    table: str
    """``schema.table``, quoted where a name needs it."""
    rows: int


def text_of(raw: bytes) -> str:
    """Decode a name; one that is no UTF-8 is shown with escapes."""
    return raw.decode("utf-8", "backslashreplace")


def unquoted(identifier: bytes) -> str:
    """Return the name that an SQL identifier stands for."""
    if identifier.startswith(b'"'):
        return text_of(identifier[1:-1].replace(b'""', b'"'))
    return text_of(identifier)


def table_name(written: str) -> str:
    """Return ``schema.table`` quoted in one way, however a server's version quotes it."""
    parts = re.findall(r"\"(?:[^\"]|\"\")+\"|[^.\"]+", written)
    names = [p[1:-1].replace('""', '"') if p.startswith('"') else p for p in parts]
    return ".".join(
        n if re.fullmatch(r"[a-z_][a-z0-9_]*", n) else '"' + n.replace('"', '""') + '"' for n in names
    )


class Scanner:
    """Takes a dump piece by piece; holds no more than one long line of it."""

    def __init__(self, major: int | None = None) -> None:
        """Look for what the server of version ``major`` refuses, when it is given."""
        self.refused: list[tuple[int, int]] = []
        """Where that stands: begins and ends."""
        self._major = major
        self.copies: list[Copied] = []
        self.databases: list[str] = []
        self.version: tuple[int, int] | None = None
        """Of the server that was dumped, as the dump says; old ones do not."""
        self.head_end: int | None = None
        """Where the first database begins: what is before is the cluster's own."""
        # One byte of what was before is always kept, so that a line's start is known as one.
        self._data = b"\n"
        self._at = 1
        self._passed = -1
        self._state = self._sql
        self._until = b""
        self._copying = ""
        self._rows = 0
        self._complete: int | None = None
        self._tail = b""

    def feed(self, data: bytes | memoryview) -> None:
        """Take the next bytes, however many; nothing of them is kept by reference."""
        view = memoryview(data)
        for at in range(0, len(view), _PIECE):
            self._feed(view[at : at + _PIECE])

    def _feed(self, data: memoryview) -> None:
        self._tail = (self._tail + data[-512:])[-512:]
        self._data = self._data[self._at - 1 :] + data
        self._passed += self._at - 1
        self._at = 1
        while self._state():
            pass

    @property
    def settled(self) -> int:
        """Return up to where what came is understood."""
        return self._passed + self._at

    def rows(self) -> dict[str, dict[str, int]]:
        """Return the rows that were copied, by database and table; every database is in it."""
        found: dict[str, dict[str, int]] = {name: {} for name in self.databases}
        for each in self.copies:
            tables = found.setdefault(each.database, {})
            tables[each.table] = tables.get(each.table, 0) + each.rows
        return found

    def problem(self) -> str | None:
        """Say why what came is no whole dump; None when it is one."""
        end = _END.search(self._tail)
        total = self._passed + len(self._data)
        whole = end is not None and self._complete == total - (len(self._tail) - end.start())
        if whole and self._state == self._sql:
            return None
        if total <= 0:
            return "it is empty"
        return f"the completion line did not come, its last database is {self._database!r}"

    def require_whole(self, name: str) -> None:
        """Raise CorruptBackup when what came is no whole dump."""
        if (problem := self.problem()) is not None:
            raise CorruptBackup(problem, name=name)

    @property
    def _database(self) -> str:
        return self.databases[-1] if self.databases else ""

    # Each state goes on from self._at and tells whether it came on: no means that more data are needed.

    def _sql(self) -> bool:
        data = self._data
        found = _TOKEN.search(data, self._at)
        if found is None:
            self._at = max(self._at, len(data) - _TOKEN_LIMIT)
            return False
        token, self._at = found.group(), found.start()
        if token in (b"'", b'"') or token.startswith(b"$"):
            return self._enter(token, found.end())
        if token == b"/*":
            return self._enter(b"*/", found.end())
        if token == b"COPY ":
            return self._copy_begins()
        if token.startswith((b"CREATE", b"SET")):
            return self._refusable(found.end())
        return self._line(token == b"\\")

    def _enter(self, until: bytes, at: int) -> bool:
        self._until, self._at, self._state = until, at, self._quoted
        return True

    def _quoted(self) -> bool:
        at = self._data.find(self._until, self._at)
        if at < 0:
            self._at = max(self._at, len(self._data) - len(self._until) + 1)
            return False
        # A newline that was skipped is the end of a comment: the next line begins after it.
        self._at, self._state = at + len(self._until), self._sql
        return True

    def _line(self, is_command: bool) -> bool:
        """Take a comment, or a command of psql, to its line's end."""
        start, end = self._at, self._data.find(b"\n", self._at)
        if end < 0:
            if len(self._data) - start > _LINE_LIMIT:
                return self._enter(b"\n", start)
            return False
        line = self._data[start:end]
        if is_command:
            self._command(line, start)
        elif line == COMPLETE:
            self._complete = self._passed + start
        elif self.version is None and (said := _VERSION.match(line)):
            self.version = int(said[1]), int(said[2])
        self._at = end + 1
        return True

    def _refusable(self, past: int) -> bool:
        """Note what a statement of one line holds that the server refuses; its text is read on as any other."""
        end = self._data.find(b"\n", self._at)
        if end < 0 and len(self._data) - self._at < _LINE_LIMIT:
            return False
        found = _TOO_NEW.match(self._data[self._at : end])
        if found is not None and self._major is not None and self._major < _SINCE[str(found.lastgroup)]:
            first, last = found.span(str(found.lastgroup))
            self.refused.append((self._passed + self._at + first, self._passed + self._at + last))
        self._at = past
        return True

    def _command(self, line: bytes, start: int) -> None:
        if not line.startswith(b"\\connect "):
            return
        if self.head_end is None:
            self.head_end = self._passed + start
        name = connected(line)
        if name is not None and name not in self.databases[-1:]:
            self.databases.append(name)

    def _copy_begins(self) -> bool:
        found = _COPY.match(self._data, self._at)
        if found is None:
            if len(self._data) - self._at < _LINE_LIMIT and b"FROM stdin;\n" not in self._data[self._at :]:
                return False
            self._at += 5
            return True
        self._copying, self._rows = table_name(text_of(found["table"])), 0
        self._at, self._state = found.end(), self._rows_of
        return True

    def _rows_of(self) -> bool:
        data, at = self._data, self._at
        end = data.find(b"\n\\.\n", at - 1)
        if end < 0:
            self._at = max(at, len(data) - 3)
            self._rows += _lines(data, at, self._at)
            return False
        self._rows += _lines(data, at, end + 1)
        self.copies.append(Copied(self._database, self._copying, self._rows))
        self._at, self._state = end + 4, self._sql
        return True


class Mender:
    """Passes a dump on without what the server that it is of would refuse."""

    def __init__(self, scanner: Scanner) -> None:
        self._scanner = scanner
        self._kept = b""
        self._begin = 0

    def feed(self, data: bytes) -> bytes:
        """Take the next piece; return what can be passed on."""
        self._scanner.feed(data)
        # What the scanner has gone past will never change; a refused part is passed on as a whole.
        settled = self._scanner.settled
        return self._release(data, min([settled, *(a for a, b in self._scanner.refused if b > settled)]))

    def end(self) -> bytes:
        """Return the rest."""
        return self._release(b"", self._begin + len(self._kept))

    def _release(self, data: bytes, until: int) -> bytes:
        whole, begin = self._kept + data, self._begin
        out, self._kept = bytearray(whole[: until - begin]), whole[until - begin :]
        self._begin = until
        for first, last in self._scanner.refused:
            if last <= until:
                # Blanks of the same length: what is where stays as it was.
                out[first - begin : last - begin] = b" " * (last - first)
        self._scanner.refused = [span for span in self._scanner.refused if span[1] > until]
        return bytes(out)


def _lines(data: bytes, start: int, end: int) -> int:
    """Count newlines: ``count`` looks at byte after byte, ``replace`` jumps from one to the next."""
    seen = data.count(b"\n", start, min(end, start + _SAMPLE))
    if end - start <= _SAMPLE or seen * _LONG_ROW > _SAMPLE:
        return seen + data.count(b"\n", min(end, start + _SAMPLE), end)
    piece = data[start:end]
    return len(piece) - len(piece.replace(b"\n", b""))


def connected(line: bytes) -> str | None:
    r"""Return the database that a ``\connect`` goes to, in either spelling."""
    if found := _CONNECT.match(line):
        return unquoted(found["name"])
    if (string := _CONNECT_BY_STRING.match(line)) is None:
        return None
    found = _DBNAME.match(string["string"][1:-1].replace(b'""', b'"'))
    if found is None:
        return None
    if found["plain"] is not None:
        return text_of(found["plain"])
    return text_of(re.sub(rb"\\(.)", rb"\1", found["quoted"], flags=re.DOTALL))


def statements(text: bytes) -> Iterator[tuple[bytes, bool]]:
    """Split the head of a dump; yield each piece, all together the same bytes, and whether it is a statement."""
    start = 0
    for found in _SPLIT.finditer(text):
        if found["end"]:
            yield text[start : found.end()], True
            start = found.end()
        elif found["aside"] and not text[start : found.start()].strip():
            yield text[start : found.end()], False
            start = found.end()
    yield text[start:], False
