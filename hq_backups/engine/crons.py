"""The cron jobs of the old scripts: while they run, their pruning and their keys collide with ours."""

from __future__ import annotations

from pathlib import Path

CRON_DIR = Path("/etc/cron.d")
FILES = {
    "postgres": "backup_postgres",
    "couch": "backup_couch",
    "blobdb": "backup_blobdb",
    "elasticsearch": "create_es_snapshot",
}
"""What commcare-cloud calls them (ansible roles pg_backup, couchdb2, backups)."""
HINT = (
    "Remove it on this host, or, while both run, give these backups another directory and another bucket "
    "(docs/restore.rst)."
)


def installed(store: str) -> Path | None:
    """Return the old cron job of a store, if it does anything."""
    path = CRON_DIR / FILES[store]
    try:
        lines = path.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return None
    except OSError:
        # It is there, and not for us to read.
        return path
    # A job begins with its minute, or @daily; the rest are comments and variables.
    return (
        path if any(line.lstrip()[:1] in tuple("0123456789*@") and line.strip() for line in lines) else None
    )


def collision(store: str) -> str | None:
    """Say what an old cron job that is still installed does to our backups; None without one."""
    path = installed(store)
    if path is None:
        return None
    if store == "elasticsearch":
        return f"{path} is still installed: it deletes snapshots by age, ours among them"
    return (
        f"{path} is still installed: it deletes files by their names, which are ours too, and uploads over the "
        "same keys"
    )


def warning(store: str) -> str | None:
    """Say such a collision, and what to do about it."""
    found = collision(store)
    return None if found is None else f"{found}. {HINT}"
