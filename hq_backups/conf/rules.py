"""Contradictions between settings, each a small function that yields findings."""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import re
from collections.abc import Callable, Iterator
from pathlib import PurePath
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from hq_backups.conf import engine
from hq_backups.conf.findings import Finding
from hq_backups.conf.surroundings import delivers_nowhere
from hq_backups.engine import crons
from hq_backups.engine.config import STORES
from hq_backups.settings_table import BUILT_MODES

if TYPE_CHECKING:
    from hq_backups.conf.resolved import Resolved

UNBUILT_HINT = "Keep the old way of backing it up until a release builds this."
PGBOUNCER_PORT = 6432
# botocore's own rule (botocore.handlers.VALID_BUCKET, VALID_S3_ARN): anything else it refuses to send.
_BUCKET = re.compile(r"[A-Za-z0-9._-]{1,255}|arn:.+")


def check(resolved: Resolved) -> Iterator[Finding]:
    """Yield what every rule finds."""
    for rule in RULES:
        yield from rule(resolved)


def unbuilt(resolved: Resolved, store: str) -> str:
    """Return what of ``store`` is not built, as the beginning of a sentence."""
    if store in BUILT_MODES:
        return f"{store} backups in the mode {engine.mode(resolved, store)} are"
    return f"{store} backups are"


def _broken(resolved: Resolved, *names: str) -> bool:
    """Return whether one of ``names`` is of no use, which has been said already."""
    return any(resolved.effective[name].broken for name in names)


def _environment(resolved: Resolved) -> Iterator[Finding]:
    if resolved["deploy_env"] is None and not _broken(resolved, "deploy_env"):
        hint = "Set deploy_env (HQ_BACKUPS_DEPLOY_ENV); in HQ it is SERVER_ENVIRONMENT."
        yield Finding(
            "E005", "deploy_env is not set: backups would have no environment", hint, setting="deploy_env"
        )


def _not_built(resolved: Resolved) -> Iterator[Finding]:
    for store in resolved.unbuilt:
        switch = engine.SWITCHES[store][0]
        message = f"{switch}: {unbuilt(resolved, store)} not built in this release, nothing is backed up"
        yield Finding("W003", message, UNBUILT_HINT, store, switch)


def _other_host(resolved: Resolved) -> Iterator[Finding]:
    source = resolved["pg_backup_from"]
    names = ["postgres_users.backup.username", "postgres_users.replication.username"]
    if not source or _broken(resolved, "pg_backup_from", *names):
        return
    if engine.mode(resolved, "postgres") == "dump":
        # A replication connection gives no SQL.
        names = names[:1]
    if not any(resolved[name] for name in names):
        message = f"pg_backup_from is {source}, but no user is named who may log in there"
        hint = f"Set {' or '.join(names)} and its password, and let it in by the other server's pg_hba.conf."
        yield Finding("W014", message, hint, "postgres", names[0])


def _elasticsearch_repositories(resolved: Resolved) -> Iterator[Finding]:
    if resolved["backup_es_s3"] and resolved["es_local_repo"]:
        message = "backup_es_s3 and es_local_repo exclude each other"
        yield Finding("E007", message, "Keep one of them.", "elasticsearch", "es_local_repo")


def _credentials(resolved: Resolved) -> Iterator[Finding]:
    names = ("AMAZON_S3_ACCESS_KEY", "AMAZON_S3_SECRET_KEY")
    missing = [name for name in names if not resolved[name]]
    if not missing or _broken(resolved, *names):
        return
    for store in STORES:
        switch = engine.S3_SWITCHES[store]
        if not engine.uploads(resolved, store):
            continue
        if len(missing) == 1:
            message = f"{switch} is on and the S3 key is set by half: {missing[0]} is missing"
            yield Finding("E008", message, f"Set {missing[0]}.", store, missing[0])
        elif not resolved.surroundings.boto_credentials:
            message = f"{switch} is on, but no S3 credentials are set or to be seen"
            hint = "Set AMAZON_S3_ACCESS_KEY and AMAZON_S3_SECRET_KEY; only a host with a role needs none."
            yield Finding("W004", message, hint, store, names[0])


def _endpoint(resolved: Resolved) -> Iterator[Finding]:
    endpoint = resolved["aws_endpoint"]
    if endpoint is None:
        return
    parts = urlsplit(endpoint)
    if parts.username or parts.path or parts.query or parts.fragment:
        hint = "Give scheme, host and port only; keys and buckets have settings of their own."
        yield Finding("E010", "aws_endpoint holds more than an address", hint, None, "aws_endpoint")
        return
    is_aws, region = engine.aws_region(endpoint)
    if region and resolved["aws_region"] and region != resolved["aws_region"]:
        message = f"aws_endpoint is of region {region}, aws_region is {resolved['aws_region']}, which is used"
        yield Finding("W007", message, "Make them one, or leave aws_endpoint out.", None, "aws_endpoint")
    if not is_aws and parts.scheme == "http" and not _is_near(parts.hostname or ""):
        hint = "Use https://, unless the way there is safe by other means."
        yield Finding("W006", f"aws_endpoint {endpoint} is not encrypted", hint, None, "aws_endpoint")


def _is_near(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:
        return host == "localhost" or "." not in host


def _buckets(resolved: Resolved) -> Iterator[Finding]:
    for store in STORES:
        name = engine.BUCKETS[store]
        bucket = resolved[name]
        if engine.uploads(resolved, store) and bucket is not None and not _BUCKET.fullmatch(bucket):
            hint = f"Set {name} to the bucket's name alone, without s3:// or a path."
            yield Finding("E011", f"{name} is no name of a bucket: {bucket}", hint, store, name)


def _pgbouncer(resolved: Resolved) -> Iterator[Finding]:
    host, port = resolved["pg_backup_from"] or resolved["postgresql_host"], resolved["postgresql_port"]
    if port != PGBOUNCER_PORT:
        return
    message = f"postgresql_port {port} is pgbouncer's, which cannot pass a backup on"
    hint = "Give the server's own port, usually 5432."
    bouncers = {h for h, p in resolved.surroundings.databases if p == port}
    if bouncers and (host is None or host.startswith("/") or host in bouncers):
        yield Finding(
            "E009", message + " (DATABASES has the same address)", hint, "postgres", "postgresql_port"
        )
    else:
        yield Finding(
            "W010", f"postgresql_port {port} is usually pgbouncer's", hint, "postgres", "postgresql_port"
        )


def _mail(resolved: Resolved) -> Iterator[Finding]:
    kind = delivers_nowhere(resolved.surroundings.mail_backend)
    if resolved["check_s3_backups_email"] and kind:
        message = f"check_s3_backups_email is set, but mail goes nowhere: the mail backend is {kind}"
        hint = "Give HQ a mail server: EMAIL_SMTP_HOST in public.yml, EMAIL_LOGIN in the vault."
        yield Finding("W005", message, hint, None, "check_s3_backups_email")


def _nested(resolved: Resolved) -> Iterator[Finding]:
    for store in ("postgres", "couch", "blobdb"):
        backup, data = engine.BACKUP_DIRS[store], engine.DATA_DIRS[store]
        if None in (resolved[backup], resolved[data]) or not engine.is_on(resolved, store):
            continue
        if PurePath(resolved[backup]).is_relative_to(resolved[data]):
            message = (
                f"{backup} {resolved[backup]} lies in {data} {resolved[data]}: backups would hold themselves"
            )
            yield Finding("E013", message, f"Set {backup} to a directory elsewhere.", store, backup)


def _compression(resolved: Resolved) -> Iterator[Finding]:
    codec, level = resolved["backup_compression"], resolved["backup_compression_level"]
    low, high = {"gzip": (0, 3), "zstd": (1, 19)}.get(codec, (0, 19))
    if level is not None and not low <= level <= high:
        message = f"backup_compression_level {level} does not exist for {codec}"
        yield Finding("E015", message, f"Use {low} to {high}.", None, "backup_compression_level")
    if codec == "zstd" and importlib.util.find_spec("zstandard") is None:
        message = "backup_compression is zstd, but the library zstandard is not installed"
        yield Finding(
            "E015", message, "Install the extra hq-backups[zstd], or use gzip.", None, "backup_compression"
        )


def _hosts(resolved: Resolved) -> Iterator[Finding]:
    hosts = resolved["backup_hosts"]
    if hosts is None:
        return
    for store in resolved.enabled:
        if not any(store in stores for stores in hosts.values()):
            message = f"{store} backups are on, but backup_hosts gives {store} to no host"
            yield Finding("W012", message, f"Add {store} to its host there.", store, "backup_hosts")


def _commands(resolved: Resolved) -> Iterator[Finding]:
    for store, prefix in (("postgres", "postgresql"), ("couch", "couchdb")):
        names = [f"{prefix}_{verb}_command" for verb in ("stop", "start")]
        missing = [name for name in names if not resolved[name]]
        if len(missing) == 1 and not _broken(resolved, *names):
            other = next(name for name in names if name not in missing)
            hint = f"Set {missing[0]} too: what one manager stops, another may not start."
            yield Finding("W013", f"{other} is set, but {missing[0]} is not", hint, store, missing[0])


def _blobs(resolved: Resolved) -> Iterator[Finding]:
    around = resolved.surroundings
    if resolved["backup_blobdb"] and around.blobs_in_s3 and not around.blobs_migrating:
        message = "backup_blobdb is on, but HQ keeps its blobs in S3 (S3_BLOB_DB_SETTINGS), not on disk"
        yield Finding(
            "E014", message, "Switch it off, and protect the bucket itself.", "blobdb", "backup_blobdb"
        )


def _old_crons(resolved: Resolved) -> Iterator[Finding]:
    for store in resolved.enabled:
        if (message := crons.collision(store)) is not None:
            yield Finding("W015", message, crons.HINT, store, engine.SWITCHES[store][0])


def _blob_directory(resolved: Resolved) -> Iterator[Finding]:
    ours, theirs = resolved["blobdb_dir_path"], resolved.surroundings.blob_dir
    if not resolved["backup_blobdb"] or None in (ours, theirs):
        return
    # On a host without a shared drive, one is a link to the other.
    if os.path.realpath(ours) != os.path.realpath(str(theirs)):
        message = f"blobdb_dir_path is {ours}, but HQ keeps its blobs in {theirs} (SHARED_DRIVE_CONF)"
        hint = "Leave blobdb_dir_path out: HQ's own setting is taken then."
        yield Finding("E016", message, hint, "blobdb", "blobdb_dir_path")


RULES: tuple[Callable[[Resolved], Iterator[Finding]], ...] = (
    _environment,
    _not_built,
    _other_host,
    _elasticsearch_repositories,
    _credentials,
    _endpoint,
    _buckets,
    _pgbouncer,
    _mail,
    _nested,
    _blobs,
    _blob_directory,
    _compression,
    _hosts,
    _commands,
    _old_crons,
)
