"""What a data directory's control file tells: read by pg_controldata, and its first field by ourselves.

Source: src/include/catalog/pg_control.h; postgresql.org/docs/current/app-pgcontroldata.html.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from hq_backups.engine import process

SECONDS = 60


def report(pg_controldata: Path, data_dir: Path) -> str:
    """Return what pg_controldata prints of a data directory; nothing when it cannot be read."""
    return process.run([str(pg_controldata), "-D", str(data_dir)], check=False, timeout=SECONDS).stdout


def field(said: str, name: str) -> str | None:
    """Return one value of a report, such as ``Database cluster state``."""
    found = re.search(rf"^{re.escape(name)}:\s+(.*)$", said, re.MULTILINE)
    return found[1] if found else None


def system_identifier(content: bytes) -> str:
    """Return the first field of ``global/pg_control``, in the byte order of the machine."""
    return str(int.from_bytes(content[:8], sys.byteorder))
