"""Settings as the engine wants them."""

from __future__ import annotations

import pwd
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hq_backups.engine.config import STORES, Config, Retention, S3Config, StoreConfig

if TYPE_CHECKING:
    from hq_backups.conf.resolved import Resolved

_AWS = re.compile(
    r"https?://s3(?:[.-](?!dualstack|fips)(?P<region>[a-z0-9-]+))?\.amazonaws\.com(?:\.cn)?", re.IGNORECASE
)

SWITCHES = {
    "postgres": ("backup_postgres", "plain"),
    "couch": ("backup_couch", "True"),
    "blobdb": ("backup_blobdb", "True"),
    "elasticsearch": ("backup_es_s3 or es_local_repo", "True"),
}
"""What switches a store on."""

S3_SWITCHES = {
    "postgres": "postgres_s3",
    "couch": "couch_s3",
    "blobdb": "blobdb_s3",
    "elasticsearch": "backup_es_s3",
}
BUCKETS = {
    "postgres": "postgres_snapshot_bucket",
    "couch": "couchdb_snapshot_bucket",
    "blobdb": "blobdb_snapshot_bucket",
    "elasticsearch": "es_snapshot_bucket",
}
BACKUP_DIRS = {
    "postgres": "postgresql_backup_dir",
    "couch": "couch_backup_dir",
    "blobdb": "blobdb_backup_dir",
    "elasticsearch": "elasticsearch_backup_dir",
}
MIRRORS = {"couch": "remote_couch_backup"}
"""What names the host to which a store's backup directory is copied."""
DATA_DIRS = {
    "postgres": "postgresql_data_dir",
    "couch": "couch_data_dir",
    "blobdb": "blobdb_dir_path",
    "elasticsearch": "elasticsearch_data_dir",
}
REMOTE = ("elasticsearch",)
"""Stores that are spoken to over the network alone: whoever keeps their records may do it."""
_PREFIX = {"postgres": "postgresql", "couch": "couchdb", "blobdb": "blobdb", "elasticsearch": "elasticsearch"}
_HOURLY = {
    "postgres": "postgres_backup_hourly",
    "couch": "couch_backup_hourly",
    "blobdb": "blobdb_backup_hourly",
}


def is_on(resolved: Resolved, store: str) -> bool:
    """Return whether the settings switch ``store`` on."""
    names = SWITCHES[store][0].split(" or ")
    # A switch that cannot be read counts as on, so that a run says so.
    return any(resolved[name] or resolved.effective[name].broken for name in names)


def uploads(resolved: Resolved, store: str) -> bool:
    """Return whether ``store`` is switched on and sent to a bucket."""
    return is_on(resolved, store) and bool(resolved[S3_SWITCHES[store]])


def is_checked(resolved: Resolved, store: str) -> bool:
    """Return whether there is something that can be asked for ``store``'s backups: a bucket, or a server."""
    return bool(resolved[S3_SWITCHES[store]]) or (is_on(resolved, store) and store in REMOTE)


def mode(resolved: Resolved, store: str) -> str:
    """Return how ``store`` is backed up; the usual way where it is switched off."""
    if store == "postgres":
        return str(resolved["backup_postgres"] or "plain")
    return "snapshot" if store == "elasticsearch" else "tar"


def data_dir(resolved: Resolved, store: str) -> Path | None:
    """Return where ``store`` keeps its data."""
    value = resolved[DATA_DIRS[store]]
    return None if value is None else Path(value)


def aws_region(endpoint: str | None) -> tuple[bool, str | None]:
    """Return whether ``endpoint`` is AWS's own, and the region that it names."""
    if endpoint is None:
        return True, None
    match = _AWS.fullmatch(endpoint)
    region = (match["region"] or "").lower() if match else ""
    # Today's variables make s3.None.amazonaws.com of a region that is not set.
    return match is not None, None if region in ("", "none") else region


def config(resolved: Resolved) -> Config:
    """Build the engine's configuration; stores with unusable settings are left out."""
    broken = {f.store for f in resolved.reading if f.store and f.stops(f.store)}
    # PostgreSQL is always there: a rebuilt host restores before anything is switched on.
    wanted = [s for s in STORES if s not in broken and (s == "postgres" or is_on(resolved, s))]
    return Config(
        env=resolved["deploy_env"],
        host=resolved["backup_host_name"],
        timezone=resolved["timezone"],
        compression=resolved["backup_compression"],
        compression_level=resolved["backup_compression_level"],
        s3=_s3(resolved),
        stores={store: _store(resolved, store) for store in wanted},
    )


def _s3(resolved: Resolved) -> S3Config | None:
    names = ("AMAZON_S3_ACCESS_KEY", "aws_endpoint", "aws_region")
    if not any(resolved[name] for name in (*names, *S3_SWITCHES.values())):
        return None
    endpoint = resolved["aws_endpoint"]
    is_aws, region = aws_region(endpoint)
    return S3Config(
        access_key=_plain(resolved["AMAZON_S3_ACCESS_KEY"]),
        secret_key=_plain(resolved["AMAZON_S3_SECRET_KEY"]),
        endpoint=None if is_aws else endpoint,
        region=resolved["aws_region"] or region,
        versioning=resolved["aws_versioning_enabled"],
        upload_limit=resolved["backup_upload_limit"],
    )


def _plain(secret: str | None) -> str | None:
    """Return text that libraries of others know: S3Config hides it by itself."""
    return None if secret is None else str.__str__(secret)


def _store(resolved: Resolved, store: str) -> StoreConfig:
    prefix = _PREFIX[store]
    bucket = BUCKETS[store]

    def optional(name: str) -> Any:
        return resolved[name] if name in resolved.effective else None

    return StoreConfig(
        store=store,
        mode=mode(resolved, store),
        backup_dir=Path(resolved[BACKUP_DIRS[store]]),
        retention=_retention(
            days=optional(f"{prefix}_backup_days"),
            weeks=optional(f"{prefix}_backup_weeks"),
            hours=optional(f"{prefix}_backup_hours"),
        ),
        hourly=bool(resolved[_HOURLY[store]]) if store in _HOURLY else False,
        s3=bool(resolved[S3_SWITCHES[store]]),
        bucket=resolved[bucket],
        bucket_fallback=_misspelt_bucket(resolved) if store == "postgres" else None,
        # The cluster's own files are none of the engine's.
        data_dir=None if store in REMOTE else data_dir(resolved, store),
        mirror=resolved[MIRRORS[store]] if store in MIRRORS else None,
        os_user=optional(f"{prefix}_backup_os_user") or (_blob_user(resolved) if store == "blobdb" else None),
        stop_command=optional(f"{prefix}_stop_command"),
        start_command=optional(f"{prefix}_start_command"),
        options=_OPTIONS[store](resolved),
    )


def _retention(**given: int | None) -> Retention:
    return Retention(**{name: value for name, value in given.items() if value is not None})


def _misspelt_bucket(resolved: Resolved) -> str | None:
    """Return the default bucket as the first documentation spelt it."""
    if resolved.effective["postgres_snapshot_bucket"].source != "default":
        return None
    return f"dimagi-{resolved['deploy_env']}-posgres-backups"


def _postgres_options(resolved: Resolved) -> Mapping[str, Any]:
    version = resolved.effective["postgresql_version"]
    return {
        # A default is no knowledge: the server itself is asked then.
        "version": None if version.source == "default" else version.value,
        "host": resolved["postgresql_host"],
        "backup_from": resolved["pg_backup_from"],
        "port": resolved["postgresql_port"],
        "bin_dir": resolved["postgresql_bin_dir"],
        "user": resolved["postgres_users.backup.username"],
        "password": resolved["postgres_users.backup.password"],
        "replication_user": resolved["postgres_users.replication.username"],
        "replication_password": resolved["postgres_users.replication.password"],
    }


def _couch_options(resolved: Resolved) -> Mapping[str, Any]:
    version = resolved.effective["couchdb_version"]
    return {
        "url": resolved["couchdb_url"],
        "username": resolved["COUCH_USERNAME"],
        "password": resolved["COUCH_PASSWORD"],
        # A default is no knowledge: the node itself is asked then.
        "version": None if version.source == "default" else version.value,
        "service": resolved["couchdb_service_name"],
        "user": resolved["couchdb_user"],
        "group": resolved["couchdb_group"],
        "release_dir": resolved["couchdb_release_dir"],
    }


def _blobdb_options(resolved: Resolved) -> Mapping[str, Any]:
    return {
        "owner": resolved["blobdb_restore_owner"],
        "owner_is_set": resolved.effective["blobdb_restore_owner"].source != "default",
        "group": resolved["blobdb_restore_group"],
    }


def _blob_user(resolved: Resolved) -> str | None:
    """Return who makes backups of blobs: their directory is nobody's, as a rule, and its owner says nothing."""
    try:
        return Path(resolved["blobdb_backup_dir"]).owner()
    except (OSError, KeyError):
        name = str(resolved["cchq_user"])
    try:
        return pwd.getpwnam(name).pw_name
    except KeyError:
        return None


def _elasticsearch_options(resolved: Resolved) -> Mapping[str, Any]:
    return {
        "urls": list(resolved["elasticsearch_url"]),
        "username": resolved["elasticsearch_username"],
        "password": _plain(resolved["elasticsearch_password"]),
        "ca_file": resolved["elasticsearch_ca_file"],
        "repository": resolved["es_repository_name"],
        "location": resolved["es_repository_location"],
        "readonly": resolved["es_repository_readonly"],
        "patience": {
            "foreign": resolved["es_wait_minutes"] * 60.0,
            "no_progress": resolved["es_stall_minutes"] * 60.0,
        },
    }


_OPTIONS = {
    "postgres": _postgres_options,
    "couch": _couch_options,
    "blobdb": _blobdb_options,
    "elasticsearch": _elasticsearch_options,
}
