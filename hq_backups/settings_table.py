"""The one table of settings: every name of public.yml that concerns backups, and our own.

docs/settings.rst is made from it by tools/settings_reference.py.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from hq_backups.setting import DEAD, REFUSED, Derived, FoundOut, FromDjango, Lookup, Setting

BUILT_MODES = {
    "postgres": ("plain", "dump"),
    "couch": ("tar",),
    "blobdb": ("tar",),
    "elasticsearch": ("snapshot",),
}
"""What this release can back up, by store; whatever else is switched on is said to be not built."""

SHARED_MAPS = ("postgres_users", "couchdb2", "secrets")
"""Maps of the vault that also hold names which are not ours."""


def _host_name(look: Lookup) -> str:
    return re.sub(r"[^A-Za-z0-9._-]|^[^A-Za-z0-9]+", "", socket.gethostname()) or "localhost"


def _state_dir(look: Lookup) -> str:
    system = Path("/var/lib/hq_backups")
    if os.access(system if system.exists() else system.parent, os.W_OK | os.X_OK):
        return str(system)
    base = look.environ.get("XDG_STATE_HOME", "")
    if not base.startswith("/"):
        base = f"{look.environ.get('HOME') or os.path.expanduser('~')}/.local/state"
    return os.path.normpath(f"{base}/hq_backups")


def _elasticsearch_urls(hosts: Any, settings: Any) -> Any:
    if isinstance(hosts, str):
        hosts = [hosts]
    if not isinstance(hosts, (list, tuple)):
        return hosts
    port = getattr(settings, "ELASTICSEARCH_PORT", None) or 9200
    urls = (str(host) if "://" in str(host) else f"http://{host}" for host in hosts)
    return [url if re.search(r":\d+$", url) else f"{url}:{port}" for url in urls]


_port = partial(Setting, kind="int", low=1, high=65535)
_dead = partial(Setting, kind="any", status=DEAD)

GENERAL = (
    Setting(
        name="deploy_env",
        kind="name",
        help="The environment's name: it stands in file names, bucket names and manifests.",
        django=FromDjango("SERVER_ENVIRONMENT"),
    ),
    Setting(
        name="env_monitoring_id",
        kind="name",
        default=Derived("{deploy_env}"),
        help="The environment's name in monitoring; used only where other settings speak of it.",
        django=FromDjango("SERVER_ENVIRONMENT"),
    ),
    Setting(
        name="encrypted_root",
        kind="dir",
        default="/opt/data",
        help="The directory that holds data and backups.",
    ),
    Setting(
        name="nadir_hour",
        kind="int",
        default=0,
        help="The hour, local time, at which daily backups start.",
        low=0,
        high=23,
    ),
    Setting(
        name="nadir_hour_frequency",
        kind="int",
        default=3,
        help="Hours between hourly backups.",
        low=1,
        high=24,
    ),
    Setting(
        name="timezone",
        kind="timezone",
        help="Time zone of dates in file names; unset means the host's own.",
    ),
    Setting(
        name="backup_host_name",
        kind="name",
        default=FoundOut(_host_name, "the host's name"),
        help="The ``<host>`` in keys and manifests.",
    ),
    Setting(
        name="backup_hosts",
        kind="hosts",
        help="Which host backs up which store, such as ``{pg0: [postgres], couch0: [couch]}``. "
        "Unset means that a store belongs to the hosts where its data directory is.",
    ),
    Setting(
        name="backup_schedule",
        kind="bool",
        default=True,
        help="Start what is due through the host's Celery beat; False where cron or a systemd timer does, or where "
        "the host merges ``hq_backups.beat.beat_schedule()`` itself.",
    ),
    Setting(
        name="backup_run_in",
        kind="choice",
        help="Where a backup that Celery starts runs: ``detached``, a process of its own, which outlives the worker "
        "and leaves it free, or ``queue``, the worker of the queue ``hq_backups.<host>``. Unset means ``queue`` for "
        "the hosts that ``backup_hosts`` names, else ``detached``.",
        choices=("detached", "queue"),
    ),
    Setting(
        name="backup_compression",
        kind="choice",
        default="gzip",
        help="How artifacts are compressed. ``zstd`` needs the extra of that name, and gives ``.zst``.",
        choices=("gzip", "zstd", "none"),
    ),
    Setting(
        name="backup_compression_level",
        kind="int",
        default=1,
        help="How hard: 0 to 3 for gzip, 1 to 19 for zstd.",
        low=0,
        high=19,
    ),
    Setting(
        name="backup_state_dir",
        kind="dir",
        default=FoundOut(
            _state_dir, "/var/lib/hq_backups where that can be written, else the XDG state directory"
        ),
        help="Where alarm state, status and the history of a host without HQ lie.",
    ),
    Setting(
        name="backup_health_token",
        kind="text",
        help="What monitoring sends (``Authorization: Bearer …``) to read the health JSON and the metrics without "
        "logging in; unset means that only staff may.",
        secret=True,
    ),
    Setting(
        name="cchq_user", kind="name", default="cchq", help="The user that HQ runs as, who owns its blobs."
    ),
    Setting(
        name="virtualenv_home",
        kind="dir",
        help="The Python environment that sudo's rules name; unset means the one that runs the command.",
    ),
    _dead(
        "root_email",
        used_by_others=True,
        reason="alarms go to check_s3_backups_email, not to a mailbox on the host",
    ),
    _dead("backup_es", reason="it became backup_es_s3 and es_local_repo"),
)

S3 = (
    Setting(
        name="AMAZON_S3_ACCESS_KEY",
        kind="text",
        help="The S3 service's access key id; unset means boto3's own places (``~/.aws``, the host's role).",
        secret=True,
        django=FromDjango("S3_ACCESS_KEY"),
    ),
    Setting(
        name="AMAZON_S3_SECRET_KEY",
        kind="text",
        help="The S3 service's secret access key.",
        secret=True,
        django=FromDjango("S3_SECRET_KEY"),
    ),
    Setting(
        name="aws_endpoint",
        kind="url",
        help="The S3 service's address; unset means AWS. ``https://`` may be left out.",
    ),
    Setting(name="aws_region", kind="text", help="The region, where the service has regions."),
    Setting(
        name="aws_versioning_enabled",
        kind="bool",
        default=True,
        help="True: one key for each type and host, and the bucket keeps versions. "
        "False: a new key with a date for each backup.",
    ),
    Setting(
        name="backup_upload_limit",
        kind="size",
        help="Bytes per second for uploads, such as ``50MB``; unset means no limit.",
    ),
    Setting(
        name="check_s3_backups_email",
        kind="emails",
        help="Who is mailed when backups fail, are missing or shrink; commas between addresses. Unset means ADMINS.",
    ),
    Setting(
        name="backup_heartbeat_url",
        kind="url",
        help="An address outside that is asked (GET) when a backup or check ended and nothing is wrong on this host, "
        "with ``/fail`` at its end when something is; it alarms when it hears nothing.",
        secret=True,
    ),
)


def _stream_store(
    setting: Any,
    title: str,
    *,
    long: str,
    short: str,
    bucket: str,
    directory: tuple[str, str],
    keep: int,
    user: str = "the owner of the data directory",
) -> tuple[Setting, ...]:
    """Return what the stores that are byte streams have in common, under the names that each gives it."""
    return (
        setting(
            directory[0],
            kind="dir",
            default=Derived("{encrypted_root}/backups/" + directory[1]),
            help=f"Where {title} backups are written.",
        ),
        setting(
            f"{long}_backup_days",
            kind="int",
            default=keep,
            help="Days to keep daily backups on disk.",
            low=0,
            high=36500,
        ),
        setting(
            f"{long}_backup_weeks",
            kind="int",
            default=keep,
            help="Weeks to keep weekly backups on disk.",
            low=0,
            high=5200,
        ),
        setting(
            f"{long}_backup_hours",
            kind="int",
            default=1,
            help="Hours to keep hourly backups on disk.",
            low=0,
            high=876000,
        ),
        setting(f"{short}_backup_hourly", kind="bool", default=False, help="Make hourly backups too."),
        setting(f"{short}_s3", kind="bool", default=False, help="Upload the backups to the bucket."),
        setting(
            bucket,
            kind="bucket",
            default=Derived("dimagi-{deploy_env}-" + short + "-backups"),
            help=f"The bucket for {title} backups.",
        ),
        setting(
            f"{long}_backup_os_user",
            kind="name",
            help=f"The system user that makes them; unset means {user}.",
        ),
    )


def _service_commands(setting: Any, prefix: str) -> tuple[Setting, ...]:
    """Return the two commands around a restore."""
    return tuple(
        setting(
            f"{prefix}_{verb}_command",
            kind="words",
            help=f"How to {verb} the server around a restore: a list of words; unset means found out.",
        )
        for verb in ("stop", "start")
    )


_pg = partial(Setting, store="postgres")
_pg_dead = partial(_dead, store="postgres")
POSTGRES = (
    _pg(
        "backup_postgres",
        kind="mode",
        default="plain",
        help="``plain`` copies the data directory (pg_basebackup), ``dump`` writes SQL (pg_dumpall); "
        "False and None mean off.",
        choices=("plain", "dump"),
        none_is=False,
    ),
    *_stream_store(
        _pg,
        "PostgreSQL",
        long="postgresql",
        short="postgres",
        bucket="postgres_snapshot_bucket",
        directory=("postgresql_backup_dir", "postgresql"),
        keep=1,
    ),
    _pg("postgresql_version", kind="version", default="14", help="The server's version."),
    _pg(
        "postgresql_host",
        kind="text",
        help="The server's address or socket directory, never pgbouncer's; unset means its socket.",
    ),
    _port(
        "postgresql_port", default=5432, help="The server's own port, never pgbouncer's.", store="postgres"
    ),
    _pg(
        "postgresql_dir_path",
        kind="dir",
        default=Derived("{encrypted_root}/postgresql"),
        help="The directory that holds data directories.",
    ),
    _pg(
        "postgresql_data_dir",
        kind="dir",
        default=Derived("{postgresql_dir_path}/{postgresql_version}/main"),
        help="The server's data directory, which a restore replaces.",
    ),
    _pg(
        "postgresql_bin_dir",
        kind="dir",
        help="Where pg_basebackup, initdb and the others are; unset means found out.",
    ),
    *_service_commands(_pg, "postgresql"),
    _pg(
        "postgres_users.replication.username",
        kind="text",
        help="User of a base backup from the host of pg_backup_from; needs REPLICATION only.",
        in_vault=True,
    ),
    _pg("postgres_users.replication.password", kind="text", help="Its password.", secret=True),
    _pg(
        "pg_backup_from",
        kind="text_or_off",
        help="The host whose server this one backs up, over the network and at ``postgresql_port``, instead of its "
        "own. A standby will do. Every host that is told so makes the backup, unless ``backup_hosts`` names one.",
    ),
    _pg(
        "postgres_users.backup.username",
        kind="text",
        help="The superuser that backups and restores connect as; unset means postgres.",
        in_vault=True,
    ),
    _pg(
        "postgres_users.backup.password",
        kind="text",
        help="Its password; not needed on the server's own socket.",
        secret=True,
    ),
    _pg_dead("pg_backup_to", reason="backups lie on the host that makes them, and in the bucket"),
    _pg_dead("hot_standby_server", reason="the server itself is asked whether it is a standby"),
    _pg_dead("postgresql_backup_master", reason="backup_postgres switches backups on"),
    _pg_dead(
        "postgresql_user_home",
        used_by_others=True,
        reason="passwords reach PostgreSQL in a file made for each run",
    ),
)

_couch = partial(Setting, store="couch")
COUCH = (
    _couch("backup_couch", kind="bool", default=False, help="Back up CouchDB."),
    *_stream_store(
        _couch,
        "CouchDB",
        long="couchdb",
        short="couch",
        bucket="couchdb_snapshot_bucket",
        directory=("couch_backup_dir", "couchdb2"),
        keep=1,
    ),
    _couch(
        "couch_data_dir",
        kind="dir",
        default=Derived("{encrypted_root}/couchdb2"),
        help="CouchDB's data directory.",
        aliases=("couchdb_data_dir",),
    ),
    _couch("couchdb_user", kind="name", default="couchdb", help="The user that CouchDB runs as."),
    _couch("couchdb_group", kind="name", default="couchdb", help="That user's group."),
    _couch("couchdb_version", kind="version", default="3.5.0", help="CouchDB's version."),
    _couch("couchdb_service_name", kind="name", default="couchdb", help="CouchDB's service."),
    _port(
        "couchdb2_port",
        default=15984,
        help="The node's own port, not the proxy's.",
        store="couch",
    ),
    _couch(
        "couchdb_url",
        kind="url",
        default=Derived("http://127.0.0.1:{couchdb2_port}"),
        help="The node itself, not the proxy.",
    ),
    _couch(
        "COUCH_USERNAME",
        kind="text",
        help="CouchDB's user.",
        in_vault=True,
        aliases=("couchdb2.username",),
        django=FromDjango("COUCH_DATABASES.default.COUCH_USERNAME"),
    ),
    _couch(
        "COUCH_PASSWORD",
        kind="text",
        help="Its password.",
        secret=True,
        aliases=("couchdb2.password",),
        django=FromDjango("COUCH_DATABASES.default.COUCH_PASSWORD"),
    ),
    *_service_commands(_couch, "couchdb"),
    _couch(
        "remote_couch_backup",
        kind="remote",
        help="A host to which rsync copies the backup directory after each good run, by ssh as the user who makes the "
        "backups: ``host`` or ``user@host``, into the directory of the same path; another one is ``host:/path``. What "
        "retention removes here is removed there.",
    ),
    _couch(
        "couchdb_release_dir",
        kind="dir",
        help="A CouchDB release (it has ``bin/couchdb``, ``etc`` and ``releases``), such as ``/opt/couchdb``: "
        "``verify_backup --deep`` then starts a node of its own from it on the unpacked copy.",
    ),
)

_blobdb = partial(Setting, store="blobdb")
BLOBDB = (
    _blobdb("backup_blobdb", kind="bool", default=False, help="Back up the blob directory."),
    *_stream_store(
        _blobdb,
        "BlobDB",
        long="blobdb",
        short="blobdb",
        bucket="blobdb_snapshot_bucket",
        directory=("blobdb_backup_dir", "blobdb"),
        keep=2,
        user="the owner of ``blobdb_backup_dir``, and while that is not there ``cchq_user``",
    ),
    _blobdb(
        "blobdb_dir_path",
        kind="dir",
        default=Derived("{encrypted_root}/blobdb"),
        help="The blob directory.",
        django=FromDjango("SHARED_DRIVE_CONF.blob_dir"),
    ),
    _blobdb(
        "blobdb_restore_owner",
        kind="name",
        default=Derived("{cchq_user}"),
        help="The user whom restored blobs belong to: a name, or a number that the host need not know.",
    ),
    _blobdb(
        "blobdb_restore_group",
        kind="name",
        help="The group that restored blobs get: a name or a number; unset means that user's own.",
    ),
    _blobdb(
        "blobdb_verifier",
        kind="text_or_off",
        default="hq_backups.blob_records.blob_meta",
        help="A function, by its dotted path, that samples HQ's records of blobs for ``verify_backup``; the default "
        "reads BlobMeta where HQ is installed. False switches it off.",
    ),
    _dead("blobdb_user", store="blobdb", reason="blobdb_backup_os_user says who makes the backups"),
)

_es = partial(Setting, store="elasticsearch")
_swift = partial(_dead, store="elasticsearch", reason="backup_es_swift is refused")
ELASTICSEARCH = (
    _es(
        "backup_es_s3",
        kind="bool",
        default=False,
        help="Snapshot Elasticsearch to the bucket; every node needs the plugin repository-s3 and the keys.",
    ),
    _es(
        "es_local_repo",
        kind="bool",
        default=False,
        help="Snapshot it to a directory that all nodes share; not with backup_es_s3.",
    ),
    _es(
        "es_repository_name",
        kind="name",
        default=Derived("{deploy_env}_es_snapshot"),
        help="The snapshot repository; HQ's restore_es_snapshot looks for the default.",
    ),
    _es(
        "es_repository_location",
        kind="text",
        default=Derived("{es_repository_name}"),
        help="Where the directory lies, as the nodes see it: below their ``path.repo``, or absolute.",
    ),
    _es(
        "es_repository_readonly",
        kind="bool",
        default=False,
        help="Another cluster writes to the repository: this one registers it read-only, and only restores from it.",
    ),
    _es(
        "elasticsearch_backup_dir",
        kind="dir",
        default=Derived("{encrypted_root}/backups/elasticsearch"),
        help="Where this host records its snapshots; the snapshots themselves lie in the repository.",
    ),
    _es(
        "es_snapshot_bucket",
        kind="bucket",
        default=Derived("dimagi-{deploy_env}-es-snapshots"),
        help="The bucket for snapshots.",
    ),
    _es(
        "elasticsearch_backup_days",
        kind="int",
        default=3,
        help="Days to keep snapshots, weekly ones too.",
        low=0,
        high=36500,
        aliases=("elastcsearch_backup_days",),
    ),
    _es(
        "es_wait_minutes",
        kind="int",
        default=60,
        help="How long somebody else's snapshot that runs is waited for, before exit code 6.",
        low=0,
        high=10080,
    ),
    _es(
        "es_stall_minutes",
        kind="int",
        default=60,
        help="How long a snapshot or restore of ours may show no progress, before it is aborted. Elasticsearch shows "
        "it file by file: one of 50 GB takes 21 minutes at its default 40 MB/s.",
        low=1,
        high=10080,
    ),
    _es("elasticsearch_version", kind="version", default="6.8.23", help="Elasticsearch's version."),
    _es(
        "elasticsearch_data_dir",
        kind="dir",
        default=Derived("{encrypted_root}/elasticsearch-{elasticsearch_version}/data"),
        help="Elasticsearch's data directory: the store belongs to the hosts that have it.",
    ),
    _port(
        "ELASTICSEARCH_PORT",
        default=9200,
        help="Elasticsearch's port.",
        store="elasticsearch",
        django=FromDjango("ELASTICSEARCH_PORT"),
    ),
    _es(
        "elasticsearch_url",
        kind="urls",
        default=Derived("http://127.0.0.1:{ELASTICSEARCH_PORT}"),
        help="The cluster's address; a list is allowed, and tried in turn.",
        django=FromDjango("ELASTICSEARCH_HOSTS", _elasticsearch_urls),
    ),
    _es(
        "elasticsearch_username",
        kind="text",
        help="The cluster's user, where it asks for one.",
        in_vault=True,
    ),
    _es("elasticsearch_password", kind="text", help="Its password.", secret=True),
    _es(
        "elasticsearch_ca_file",
        kind="text",
        help="The certificates of the authorities that an https cluster is trusted by; unset means the system's.",
    ),
    Setting(
        "backup_es_swift",
        kind="bool",
        default=False,
        store="elasticsearch",
        status=REFUSED,
        reason="its plugin ended with Elasticsearch 1.7; use backup_es_s3 with Swift's S3 interface",
    ),
    _swift("swift_url"),
    _swift("swift_container"),
    _swift("swift_username"),
    _swift("swift_password", secret=True),
    _swift("secrets.es_swift_username"),
    _swift("secrets.es_swift_password", secret=True),
)

GROUPS: Mapping[str, tuple[Setting, ...]] = {
    "General": GENERAL,
    "S3 and alerts": S3,
    "PostgreSQL": POSTGRES,
    "CouchDB": COUCH,
    "BlobDB": BLOBDB,
    "Elasticsearch": ELASTICSEARCH,
}

SETTINGS: Mapping[str, Setting] = {setting.name: setting for group in GROUPS.values() for setting in group}
"""By proper name, in the order of the reference page."""

BY_ANY_NAME: Mapping[str, Setting] = {
    name: setting for setting in SETTINGS.values() for name in setting.names
}
