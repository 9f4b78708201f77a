"""What Django and the process say beside our settings, as far as the rules ask for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_NOWHERE = ("console", "filebased", "locmem", "dummy")
_BOTO_VARIABLES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_PROFILE",
    "AWS_ROLE_ARN",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)


@dataclass(frozen=True)
class Surroundings:
    """Facts that contradictions are found by; nothing here is secret."""

    databases: frozenset[tuple[str, int]] = frozenset()
    """Host and port of every PostgreSQL database of HQ: pgbouncer's, as a rule."""
    mail_backend: str | None = None
    blobs_in_s3: bool = False
    blobs_migrating: bool = False
    blob_dir: str | None = None
    """Where HQ keeps its blobs."""
    boto_credentials: bool = False

    @classmethod
    def of(cls, settings: Any, environ: Mapping[str, str]) -> Surroundings:
        """Read them."""
        return cls(
            databases=frozenset(_databases(getattr(settings, "DATABASES", None) or {})),
            mail_backend=_mail_backend(settings),
            blobs_in_s3=bool(getattr(settings, "S3_BLOB_DB_SETTINGS", None)),
            blobs_migrating=bool(getattr(settings, "BLOB_DB_MIGRATING_FROM_FS_TO_S3", False)),
            blob_dir=_blob_dir(settings),
            boto_credentials=_boto_credentials(environ),
        )


def _databases(databases: Mapping[str, Any]) -> list[tuple[str, int]]:
    found = []
    for database in databases.values():
        if not isinstance(database, Mapping) or "postgresql" not in str(database.get("ENGINE", "")):
            continue
        port = str(database.get("PORT") or 5432)
        if port.isdecimal():
            found.append((str(database.get("HOST") or "localhost"), int(port)))
    return found


def _blob_dir(settings: Any) -> str | None:
    drive = getattr(settings, "SHARED_DRIVE_CONF", None)
    found = drive.get("blob_dir") if isinstance(drive, Mapping) else getattr(drive, "blob_dir", None)
    return None if found is None else str(found)


def delivers_nowhere(backend: str | None) -> str:
    """Return the kind of a mail backend, by its dotted path, that delivers nothing; empty for one that does."""
    parts = (backend or "").lower().split(".")
    return next((word for word in _NOWHERE if word in parts), "")


def _mail_backend(settings: Any) -> str | None:
    mailers = getattr(settings, "MAILERS", None)
    if isinstance(mailers, Mapping) and isinstance(mailers.get("default"), Mapping):
        return str(mailers["default"].get("BACKEND") or "") or None
    return getattr(settings, "EMAIL_BACKEND", None)


def _boto_credentials(environ: Mapping[str, str]) -> bool:
    if any(environ.get(variable) for variable in _BOTO_VARIABLES):
        return True
    home = Path(environ.get("HOME") or "~").expanduser()
    places = (
        environ.get("AWS_SHARED_CREDENTIALS_FILE") or home / ".aws" / "credentials",
        environ.get("AWS_CONFIG_FILE") or home / ".aws" / "config",
    )
    try:
        return any(Path(place).is_file() for place in places)
    except OSError:
        return False
