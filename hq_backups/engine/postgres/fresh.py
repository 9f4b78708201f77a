"""A new cluster for a dump to be loaded into: made as the old one was, and given its configuration afterwards."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from hq_backups.engine import process
from hq_backups.engine.errors import DiskFull, PreflightFailed, ProducerFailed
from hq_backups.engine.events import Events
from hq_backups.engine.postgres.psql import last_line
from hq_backups.engine.postgres.replay import Cluster, Setting
from hq_backups.engine.postgres.tools import Tools

INITDB_SECONDS = 600
CONFIGURATION = (
    "postgresql.conf",
    "pg_hba.conf",
    "pg_ident.conf",
    "conf.d",
    "server.crt",
    "server.key",
    "root.crt",
    "root.crl",
)
"""What a data directory holds of its configuration, where that lies in it, and initdb cannot know."""
_AUTO = "postgresql.auto.conf"

# Of the server that loads: a power cut ends in a failed restore anyhow, and what it wrote is synced as a whole.
LOADING = {
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "wal_level": "minimal",
    "max_wal_senders": "0",
    "max_wal_size": "256MB",
    "shared_buffers": "64MB",
    "maintenance_work_mem": "64MB",
    "max_parallel_maintenance_workers": "1",
    "wal_init_zero": "off",
}
WAL = 256 << 20
"""Bytes of WAL that a load keeps, at most: ``max_wal_size``."""


def initdb(tree: Path, cluster: Cluster, major: int, tools: Tools) -> None:
    """Initialise ``tree`` as the recorded cluster was; raises PreflightFailed with initdb's words."""
    base = cluster.database("template0")
    argv = [str(tools.own("initdb", major).path), f"--pgdata={tree}", f"--username={cluster.bootstrap}"]
    argv += [f"--encoding={base.encoding}", f"--lc-collate={base.collate}", f"--lc-ctype={base.ctype}"]
    argv += [f"--wal-segsize={cluster.segment >> 20}", "--no-sync"]
    argv += ["--auth-local=peer", "--auth-host=scram-sha-256"]
    if base.provider == "i":
        argv += ["--locale-provider=icu", f"--icu-locale={base.locale or ''}"]
        argv += [f"--icu-rules={base.rules}"] if base.rules else []
    elif base.provider == "b":
        argv += ["--locale-provider=builtin", f"--builtin-locale={base.locale or ''}"]
    if cluster.checksums:
        argv.append("--data-checksums")
    elif major >= 18:
        argv.append("--no-data-checksums")
    try:
        process.run(argv, timeout=INITDB_SECONDS)
    except ProducerFailed as error:
        said = str(error.facts["stderr"])
        if "No space left on device" in said:
            raise DiskFull(path=tree) from error
        hint = "Look at the disk and at the directory's owner."
        if "locale" in said:
            hint = "Give this host the locales that the server had (locale -a, locale-gen), then repeat the command."
        raise PreflightFailed(
            f"a new cluster could not be made in {tree}: {last_line(said)}", hint=hint
        ) from error


def configure(tree: Path, replaces: Path | None, cluster: Cluster, *, inside: bool, events: Events) -> None:
    """Give a loaded cluster the configuration of the one that it replaces, else what was recorded of it.

    ``inside`` says whether the configuration of the server that was dumped lay in its data directory.
    """
    there = replaces is not None and (replaces / "postgresql.conf").is_file()
    if replaces is not None and there:
        copied = [name for name in (*CONFIGURATION, _AUTO) if _copy(replaces / name, tree / name)]
        events.step("configure", f"took {', '.join(copied)} over from {replaces}")
        return
    if replaces is not None and (not inside or (replaces / "PG_VERSION").is_file()):
        # Debian keeps them in /etc: initdb's would only mislead.
        for name in ("postgresql.conf", "pg_hba.conf", "pg_ident.conf"):
            (tree / name).unlink(missing_ok=True)
        _append(tree / _AUTO, [s for s in cluster.files if s.automatic])
        return
    _append(tree / _AUTO, [s for s in cluster.files if s.automatic])
    if inside:
        _append(tree / "postgresql.conf", [s for s in cluster.files if not s.automatic])
        if replaces is not None:  # a copy beside serves nobody
            events.warning(
                "configuration",
                "the old configuration files are not there: settings are as they were recorded with the backup, "
                f"who may log in (pg_hba.conf) is initdb's default: look at {replaces}",
            )


def _copy(source: Path, target: Path) -> bool:
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    elif source.is_file():
        shutil.copy2(source, target)
    else:
        return False
    return True


def _append(path: Path, settings: list[Setting]) -> None:
    """Add settings to a configuration file; the last one of a name counts."""
    if settings:
        with path.open("a") as file:
            file.write("\n# As they were recorded with the backup that was restored.\n")
            file.writelines(f"{s.name} = '{_quoted(s.value)}'\n" for s in settings)


def _quoted(value: str) -> str:
    return re.sub(r"(['\\])", r"\1\1", value)
