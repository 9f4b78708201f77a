"""Loading a dump as a user who is no superuser, as on a managed server: what such a user may not say is left out.

Only what pg_dumpall writes of roles is: attributes that only a superuser gives, changes of roles that are not the
user's to change, memberships that are not the user's to give, and who gave them. Each is told. Everything else that
the server refuses ends the load.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from hq_backups.engine.errors import HQBackupsError, PreflightFailed
from hq_backups.engine.events import Events
from hq_backups.engine.postgres.dump import IDENTIFIER, unquoted
from hq_backups.engine.postgres.psql import Server, query_json, query_lines
from hq_backups.engine.postgres.replay import identifier

HOSTED = "^(rds|azure|cloudsql)"
"""Roles that hosting services keep for themselves."""

# Since version 16 a user changes and gives only roles that it has with ADMIN OPTION.
_RIGHTS = """
SELECT json_build_object(
  'user', me.rolname, 'superuser', me.rolsuper, 'createdb', me.rolcreatedb, 'createrole', me.rolcreaterole,
  'replication', me.rolreplication, 'bypassrls', me.rolbypassrls,
  'fixed', (SELECT coalesce(json_agg(rolname), '[]') FROM pg_roles r WHERE r.oid <> me.oid
      AND (r.rolsuper OR r.rolname ~ '{hosted}'
        OR CASE WHEN {admin} THEN NOT pg_has_role(me.oid, r.oid, 'MEMBER WITH ADMIN OPTION')
          ELSE r.rolreplication END)),
  'ungrantable', (SELECT coalesce(json_agg(rolname), '[]') FROM pg_roles r WHERE r.oid <> me.oid
      AND (r.rolsuper OR {admin} AND NOT pg_has_role(me.oid, r.oid, 'MEMBER WITH ADMIN OPTION'))),
  'member', ({member})) FROM pg_roles me WHERE rolname = current_user;
"""
_MEMBER = """
SELECT coalesce(json_agg(pg_get_userbyid(m.roleid)), '[]') FROM pg_auth_members m
  WHERE pg_get_userbyid(m.member) = current_user AND (NOT {admin} OR pg_get_userbyid(m.grantor) = current_user)
"""
# In one line: it goes where the dump has an empty one. A role that cannot be had is missed where it is needed.
_BORROW = (
    "DO $hqb$DECLARE r name; BEGIN FOR r IN SELECT rolname FROM pg_roles o WHERE NOT rolsuper AND oid >= 16384"
    " AND rolname <> current_user AND rolname !~ '{hosted}' AND NOT pg_has_role(oid, current_user::regrole, 'MEMBER')"
    " AND NOT ({has}) LOOP BEGIN EXECUTE format('GRANT %I TO CURRENT_USER{options}', r);"
    " EXCEPTION WHEN insufficient_privilege OR invalid_grant_operation THEN NULL; END; END LOOP; END $hqb$;"
)
_ALTER = re.compile(
    rb"(ALTER ROLE (" + IDENTIFIER + rb") WITH)"
    rb"((?: (?:NO)?(?:SUPERUSER|INHERIT|CREATEROLE|CREATEDB|LOGIN|REPLICATION|BYPASSRLS))+)(.*)\Z",
    re.DOTALL,
)
_OF_A_ROLE = re.compile(rb"(?:ALTER|COMMENT ON) ROLE (" + IDENTIFIER + rb") ")
_GRANT = re.compile(
    rb"(GRANT (" + IDENTIFIER + rb") TO (" + IDENTIFIER + rb"))"
    rb"( WITH (?:ADMIN|INHERIT|SET) [A-Z, ]*?)?( GRANTED BY (" + IDENTIFIER + rb"))?;\Z"
)
_OWN_MAKING = (b" WITH ADMIN OPTION, INHERIT FALSE, SET FALSE", b" WITH ADMIN TRUE, INHERIT FALSE, SET FALSE")
"""What a user has of a role that it made, since version 16."""


@dataclass(frozen=True)
class Rights:
    """What the user who loads a dump may do."""

    user: str
    major: int
    superuser: bool
    createdb: bool
    createrole: bool
    replication: bool
    bypassrls: bool
    fixed: Sequence[str]
    """Roles that are there and that it may not change."""
    ungrantable: Sequence[str]
    """Roles that are there and that it may not give to others."""
    member: Sequence[str]
    """Roles that it is a member of; since version 16 those that it gave itself."""

    @property
    def may_set(self) -> frozenset[bytes]:
        """Return the attributes beyond the ordinary that it may give or take."""
        newer = self.major >= 16
        known = ((b"REPLICATION", self.replication and newer), (b"BYPASSRLS", self.bypassrls and newer))
        return frozenset(word for word, may in known if may)

    def require(self, server: Server) -> None:
        """Raise PreflightFailed unless the user can make roles and databases."""
        missing = [w for w, has in (("CREATEDB", self.createdb), ("CREATEROLE", self.createrole)) if not has]
        if missing and not self.superuser:
            raise PreflightFailed(
                f"user {self.user} of the server at {server.where} may not make what a dump holds: it lacks "
                f"{' and '.join(missing)}",
                hint="Name the server's administrator in postgres_users.backup, with its password.",
            )


def of_user(psql: Path, server: Server) -> Rights:
    """Ask a server, whose version is known, what our user may do there."""
    admin = _admin(server.major)
    sql = _RIGHTS.format(hosted=HOSTED, admin=admin, member=_MEMBER.format(admin=admin))
    return Rights(major=server.major, **query_json(psql, server, "postgres", sql))


def _admin(major: int) -> str:
    return "true" if major >= 16 else "false"


def borrow_sql(major: int) -> str:
    """Return SQL, in one line, that makes our user a member of every role it can: only so may it give things away."""
    has, options = "pg_has_role(oid, 'USAGE')", ""
    if major >= 16:
        has, options = f"{has} AND pg_has_role(oid, 'SET')", " WITH INHERIT TRUE, SET TRUE"
    return _BORROW.format(hosted=HOSTED, has=has, options=options)


@dataclass
class Narrower:
    """Leaves out of a dump's head what its user may not say."""

    rights: Rights
    left_out: dict[str, None] = field(default_factory=dict)
    """What was, in words, each once."""
    own: dict[str, bytes] = field(default_factory=dict)
    """By role, the statement of the dump that makes our user a member of it."""

    def renew(self, now: Rights, roles: Sequence[str]) -> None:
        """Take the user's rights as they are when ``roles`` are left; what was borrowed meanwhile is not its own."""
        self.rights = replace(now, member=[role for role in self.rights.member if role in roles])

    def changed(self, piece: bytes) -> bytes:
        """Return the statement to run instead, of as many lines."""
        said = piece.strip()
        lead = piece[: len(piece) - len(piece.lstrip())]
        nothing = b"\n" * piece.count(b"\n")
        if (found := _OF_A_ROLE.match(said)) and unquoted(found[1]) in (
            *self.rights.fixed,
            self.rights.user,
        ):
            self._tell(
                f"role {unquoted(found[1])!r} stays as this server has it: attributes, password, settings, comment"
            )
            return nothing
        if found := _ALTER.match(said):
            return lead + found[1] + self._attributes(unquoted(found[2]), found[3]) + found[4]
        if found := _GRANT.match(said):
            kept = self._membership(found)
            return nothing if kept is None else lead + kept + b"\n" * (said.count(b"\n") - kept.count(b"\n"))
        return piece

    def _tell(self, what: str) -> None:
        self.left_out[what] = None

    def _attributes(self, role: str, words: bytes) -> bytes:
        kept = []
        for word in words.split():
            if (
                word.removeprefix(b"NO")
                not in {b"SUPERUSER", b"REPLICATION", b"BYPASSRLS"} - self.rights.may_set
            ):
                kept.append(word)
            elif not word.startswith(b"NO"):
                self._tell(f"role {role!r} is not given {word.decode()}, which it had")
        return b"".join(b" " + word for word in kept)

    def _membership(self, found: re.Match[bytes]) -> bytes | None:
        granted, to, options = unquoted(found[2]), unquoted(found[3]), found[4] or b""
        by = unquoted(found[6]) if found[6] else self.rights.user
        if granted in self.rights.ungrantable:
            self._tell(f"role {to!r} is not made a member of {granted!r}")
            return None
        if to == self.rights.user and self.rights.major >= 16:
            if options in _OWN_MAKING:
                return None
            # It made that role, so it has this already, and nobody can give it to himself.
            words = [w.strip() for w in options.removeprefix(b" WITH ").split(b",")]
            words = [w for w in words if w and not w.startswith(b"ADMIN")]
            options = b" WITH " + b", ".join(words) if words else b""
        if by != self.rights.user:
            self._tell(f"memberships that role {by!r} had given are given by {self.rights.user!r}")
        kept = found[1] + options + b";"
        if to == self.rights.user:
            self.own[granted] = kept
        return kept

    def warn(self, events: Events) -> None:
        """Tell what was left out."""
        for what in self.left_out:
            events.warning("left-out", f"user {self.rights.user} is no superuser of this server: {what}")


@contextmanager
def borrowed(psql: Path, server: Server, before: Rights, events: Events) -> Iterator[Narrower | None]:
    """Let memberships be borrowed inside the block, and give them back however it ends; None for a superuser."""
    if before.superuser:
        yield None
        return
    narrower = Narrower(before)
    try:
        yield narrower
    finally:
        try:
            _give_back(psql, server, narrower, events)
        except HQBackupsError as error:  # there may be another error, which is the one to tell
            events.warning(
                "member-kept",
                f"user {before.user} stays a member of the roles that it was given for the load: {error.message}",
            )


def _give_back(psql: Path, server: Server, narrower: Narrower, events: Events) -> None:
    """End the memberships that our user was given for the load; the dump's own stay."""
    rights = narrower.rights
    now = query_json(psql, server, "postgres", _MEMBER.format(admin=_admin(rights.major)) + ";")
    for role in sorted(set(now) - set(rights.member)):
        again = narrower.own.get(role)
        if again is not None and rights.major < 16:
            continue
        sql = f"REVOKE {identifier(role)} FROM CURRENT_USER;\n{(again or b'').decode()}"
        try:
            query_lines(psql, server, "postgres", sql)
        except HQBackupsError as error:
            events.warning(
                "member-kept", f"user {rights.user} stays a member of role {role!r}: {error.message}"
            )
