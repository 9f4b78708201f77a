"""Archives of the old scripts, as they were made in each era: restored, or refused by what they hold."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hq_backups.engine.errors import Exit
from tests.integration.couch_helpers import ENV, OTHER, CouchHost, assert_serves
from tests.testbed.couch import CouchNode, couch_user
from tests.testbed.couch_data import make_data_dir, unpack_fixture
from tests.testbed.process import short_directory

Make = Callable[..., CouchNode]
NAME = "couchdb_daily_2026_08_22.tar.gz"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out sync(2), and ask no mapper of ports of this machine."""
    monkeypatch.setattr("os.sync", lambda: None)
    monkeypatch.setenv("ERL_EPMD_PORT", "9")


@pytest.fixture
def place() -> Iterator[Path]:
    """Return a directory that CouchDB's user may read."""
    with short_directory(couch_user()) as path:
        yield path


def tar(archive: Path, *words: str | Path) -> Path:
    """Make an archive with GNU tar, readable for all."""
    subprocess.run(["tar", "--create", "--gzip", f"--file={archive}", *words], check=True)
    archive.chmod(0o644)
    return archive


def strip(path: Path) -> str:
    return rf"--transform=flags=r;s,^{path},,"


def today(place: Path, root: str = "opt/data/couchdb2") -> Path:
    """Make what today's script makes: absolute names, the slash stored."""
    unpack_fixture("t0", place / "x" / root)
    return tar(place / NAME, "--absolute-names", strip(place / "x"), place / "x" / root)


def before_2017_12(place: Path) -> Path:
    """Make what scripts made before 18 December 2017: the slash stripped."""
    unpack_fixture("t0", place / "x/opt/data/couchdb2")
    return tar(place / "couchdb_daily_2017_12_01.gz", "-C", place / "x", "opt/data/couchdb2")


def by_hand(place: Path) -> Path:
    """Make the safety copy of the guide."""
    unpack_fixture("t0", place / "x")
    return tar(place / "couchdb_data_before_restore.tar.gz", "-C", place / "x", ".")


def other_root(place: Path) -> Path:
    """Make one of a host whose encrypted_root is another."""
    return today(place, "mnt/enc rypted/x/couchdb2")


def with_leftovers(place: Path) -> Path:
    """Make one of a node in the middle of compacting and deleting."""
    root = unpack_fixture("t0", place / "x/opt/data/couchdb2")
    (root / ".delete").mkdir(exist_ok=True)
    (root / ".delete" / "0123abcd").write_bytes(b"gone")
    shard = next(root.glob("shards/*/commcarehq.*.couch"))
    for suffix in (".compact", ".compact.data", ".compact.meta"):
        shard.with_name(shard.name + suffix).write_bytes(b"half")
    return tar(place / NAME, "--absolute-names", strip(place / "x"), root)


def named_blobdb(place: Path) -> Path:
    """Make one under the name of 2017's couch script, which called them blobdb."""
    today(place).rename(place / "blobdb_daily_2017_03_01.gz")
    return place / "blobdb_daily_2017_03_01.gz"


def assert_only_databases(tree: Path) -> None:
    """Compare with the fixture: every database, byte for byte, and nothing that is not wanted."""
    with tempfile.TemporaryDirectory() as name:
        real = unpack_fixture("t0", Path(name))
        databases = {p.relative_to(real): p.read_bytes() for p in real.rglob("*.couch")}
    del databases[Path("_nodes.couch")]
    found = {p.relative_to(tree): p.read_bytes() for p in tree.rglob("*") if p.is_file()}
    assert found == databases


def test_it_is_restored_and_served_and_what_cannot_be_checked_is_said(couch_node: Make, place: Path) -> None:
    target = CouchHost(couch_node(node_name=OTHER))
    done = target.restore(str(today(place)), from_env="unknown")
    assert done.code is Exit.OK, done
    assert_serves(target.node, "t0")
    assert "unchecked" in done.warnings
    assert done.of("plan")[0]["facts"]["views"].startswith("built anew")


@pytest.mark.parametrize(
    "make", [before_2017_12, by_hand, other_root, with_leftovers, named_blobdb], ids=lambda f: f.__name__
)
def test_the_data_directory_is_found_in_whatever_it_was_packed(
    couch_node: Make, place: Path, make: Callable[[Path], Path]
) -> None:
    archive = make(place)
    target = CouchHost(couch_node(start=False, node_name=OTHER))
    done = target.restore(str(archive), from_env="unknown", target_dir=place / "copy")
    assert done.code is Exit.OK, done
    assert "unchecked" in done.warnings
    assert_only_databases(place / "copy")


def test_another_environment_s_is_not_restored_unasked(couch_node: Make, place: Path) -> None:
    target = CouchHost(couch_node(node_name=OTHER))
    done = target.restore(str(today(place)))
    assert done.code is Exit.PREFLIGHT
    assert "--from-env unknown" in done.error


def couch_1(place: Path) -> Path:
    """Make one of CouchDB 1.6: databases at the top, no shard maps."""
    root = place / "x/opt/data/couchdb"
    make_data_dir(root, {"commcarehq": []})
    shard = next(root.glob("shards/*/commcarehq.*.couch"))
    shard.rename(root / "commcarehq.couch")
    for path in ("_dbs.couch", "_nodes.couch"):
        (root / path).unlink()
    for path in (root / "shards").rglob("*.couch"):
        path.unlink()
    return tar(place / "couchdb_daily_2017_06_01.gz", "-C", place / "x", "opt/data/couchdb")


def a_link(place: Path) -> Path:
    """Make what the script makes of a data directory that is a link."""
    (place / "x/opt/data").mkdir(parents=True)
    (place / "x/opt/data/couchdb2").symlink_to("/mnt/couch")
    return tar(place / NAME, "--absolute-names", strip(place / "x"), place / "x/opt/data/couchdb2")


def without_a_shard(place: Path) -> Path:
    """Make one that compaction hid a file from."""
    root = unpack_fixture("t0", place / "x/opt/data/couchdb2")
    next(root.glob("shards/*/commcarehq__apps.*.couch")).unlink()
    return tar(place / NAME, "--absolute-names", strip(place / "x"), root)


def without_a_header(place: Path) -> Path:
    """Make one in which a file was cut before its first header."""
    root = unpack_fixture("t0", place / "x/opt/data/couchdb2")
    shard = next(root.glob("shards/*/commcarehq.*.couch"))
    shard.write_bytes(b"")
    return tar(place / NAME, "--absolute-names", strip(place / "x"), root)


def cut(place: Path) -> Path:
    """Make one that a full disk cut."""
    archive = today(place)
    archive.write_bytes(archive.read_bytes()[:200_000])
    return archive


def of_blobs(place: Path) -> Path:
    """Make one of the blob directory under couch's name."""
    blobs = place / "x/opt/data/blobdb"
    blobs.mkdir(parents=True)
    (blobs / "abc").write_bytes(b"blob")
    return tar(place / NAME, "--absolute-names", strip(place / "x"), blobs)


REFUSED = [
    (couch_1, "CouchDB 1"),
    (a_link, "symbolic link"),
    (without_a_shard, "has no file"),
    (without_a_header, "has no header"),
    (cut, "ends"),
    (of_blobs, "no data directory of CouchDB"),
]


@pytest.mark.parametrize(("make", "words"), REFUSED, ids=[case[0].__name__ for case in REFUSED])
def test_it_is_refused_by_what_it_holds(
    couch_node: Make, place: Path, make: Callable[[Path], Path], words: str
) -> None:
    target = CouchHost(couch_node(node_name=OTHER))
    done = target.restore(str(make(place)), from_env="unknown")
    assert done.code is Exit.BAD_BACKUP, done
    assert words in done.error
    assert target.couch.ready()
    assert target.beside() == ["data"]
    assert target.env == ENV
