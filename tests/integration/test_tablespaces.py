"""Servers with tablespaces: backed up, verified and restored, and the live directories never touched."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import json
import os
import tarfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from hq_backups.engine.errors import Exit, ProducerTruncated, UnsafeArchive
from hq_backups.engine.postgres import scratch, spool, tablespaces
from hq_backups.engine.postgres.tools import Tools
from tests.integration.pg_helpers import Host, Outcome, remove, script, sha256, tree
from tests.testbed.postgres import PostgresServer
from tests.testbed.process import give
from tests.testbed.s3 import S3Service

pytestmark = [pytest.mark.postgres15, pytest.mark.root]

FAST, ODD = 'fast disk\'s "own"', "-ödd"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out sync(2): it waits for whatever else this machine writes."""
    monkeypatch.setattr("os.sync", lambda: None)


@dataclasses.dataclass(repr=False)
class Spread(Host):
    """A host whose cluster lies in three places: its data directory and two tablespaces."""

    @property
    def disks(self) -> Path:
        return self.server.workdir / "disks"

    @property
    def live(self) -> tuple[Path, Path]:
        return self.disks / "fast ssd", self.disks / "odd"

    def make(self) -> None:
        for place in (self.disks, *self.live):
            place.mkdir(mode=0o700)
            give(place, self.server.os_user)
        fast, odd = (str(place).replace("'", "''") for place in self.live)
        script(
            self.server,
            f"CREATE TABLESPACE {quoted(FAST)} LOCATION '{fast}';"
            f"CREATE TABLESPACE {quoted(ODD)} LOCATION '{odd}';"
            f"CREATE TABLE here AS SELECT n, 'row ' || n AS t FROM generate_series(1, 1000) n;"
            f"CREATE TABLE apart TABLESPACE {quoted(FAST)} AS SELECT n, 'row ' || n AS t"
            " FROM generate_series(1, 20000) n;"
            f"CREATE INDEX apart_n ON apart (n) TABLESPACE {quoted(ODD)};"
            f"CREATE DATABASE elsewhere TABLESPACE {quoted(ODD)};",
        )
        script(self.server, "CREATE TABLE mine AS SELECT generate_series(1, 500) n;", "elsewhere")
        # Temporary files come and go there.
        script(
            self.server,
            f"SET temp_tablespaces = {quoted(FAST)}; CREATE TEMP TABLE gone AS SELECT generate_series(1, 100);",
        )
        script(self.server, "CHECKPOINT")

    def change(self) -> None:
        script(self.server, "INSERT INTO apart VALUES (0, 'after the backup')")

    def contents(self) -> str:
        return "\n".join(
            [
                script(
                    self.server,
                    "SELECT 'here', md5(string_agg(t, ',' ORDER BY n)) FROM here;"
                    "SELECT 'apart', md5(string_agg(t, ',' ORDER BY n)) FROM apart;"
                    "SELECT relname, spcname FROM pg_class c JOIN pg_tablespace s ON s.oid = reltablespace"
                    " WHERE c.oid >= 16384 ORDER BY 1;"
                    "SELECT datname, spcname FROM pg_database d JOIN pg_tablespace s ON s.oid = dattablespace"
                    " ORDER BY 1",
                ),
                script(self.server, "SELECT sum(n) FROM mine", "elsewhere"),
            ]
        )

    def locations(self) -> dict[str, Path]:
        listed = script(
            self.server,
            "SELECT json_object_agg(spcname, pg_tablespace_location(oid)) FROM pg_tablespace WHERE oid >= 16384",
        )
        return {name: Path(place) for name, place in json.loads(listed).items()}

    def oids(self) -> list[str]:
        return script(self.server, "SELECT oid FROM pg_tablespace WHERE oid >= 16384 ORDER BY 1").split("\n")

    def files(self) -> dict[str, Any]:
        """Return every file of the live tablespaces with inode, mode, owner, size, time and hash."""
        return {
            path: (
                *facts,
                hashlib.sha256(Path(path).read_bytes()).hexdigest() if Path(path).is_file() else "",
            )
            for path, facts in tree(*self.live).items()
        }


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


@pytest.fixture(
    params=[
        pytest.param(14, marks=[pytest.mark.slow, pytest.mark.faults, pytest.mark.postgres14]),
        15,
        pytest.param(18, marks=[pytest.mark.slow, pytest.mark.faults, pytest.mark.postgres18]),
    ]
)
def host(request: pytest.FixtureRequest, fresh_pg: Callable[..., PostgresServer]) -> Spread:
    made = Spread(fresh_pg(request.param))
    made.make()
    return made


def steps_of(done: Outcome) -> str:
    return "\n".join(str(step) for data in done.of("data") for step in data.get("next_steps", ()))


# Backup


def test_backed_up_verified_restored_and_undone(host: Spread, s3: S3Service, bucket: str) -> None:
    host = dataclasses.replace(host, s3=s3, bucket=bucket)
    before = host.contents()
    taken = host.run_as_owner("backup", backup_request())
    assert taken.code is Exit.OK, taken
    assert any(p["phase"] == "spool" for p in taken.of("progress"))
    assert host.leftovers() == []
    known = {t["name"]: t for t in taken.manifest["source"]["tablespaces"]}
    assert {name: t["location"] for name, t in known.items()} == dict(
        zip((FAST, ODD), map(str, host.live), strict=True)
    )
    assert all(t["size"] > 0 for t in known.values())
    for deep in (False, True):
        for source in ("local", "s3") if deep else ("local",):
            files = host.files()
            done = host.verify(deep=deep, select={"source": source})
            assert done.code is Exit.OK, done
            assert host.files() == files
    # In place, the live ones watched from the moment when their server is down.
    host.change()
    now = host.contents()
    host.server.stop()
    files = host.files()
    done = host.restore()
    assert done.code is Exit.OK, done
    assert host.files() == files
    host.server.start()
    assert host.contents() == before
    places = host.locations()
    assert set(places) == {FAST, ODD}
    assert [p.parent for p in places.values()] == [host.disks] * 2
    assert all(p not in host.live and p.stat().st_uid == host.data.stat().st_uid for p in places.values())
    (plan,) = done.of("plan")
    assert sorted(map(str, plan["outer"].values())) == sorted(map(str, places.values()))
    clearing = steps_of(done)
    (version,) = host.live[0].iterdir()
    assert f"{host.live[0]}/{version.name}" in clearing
    assert f"{host.live[1]}/{version.name}" in clearing
    old = f"data.before-{done.events[0].run}"
    assert host.beside() == sorted([".data.hq_backups-restore.json", "data", old, "disks"])
    # And back.
    undone = host.undo()
    assert undone.code is Exit.OK, undone
    host.server.start()
    assert host.contents() == now
    assert set(host.locations().values()) == set(host.live)
    dropping = steps_of(undone)
    assert all(str(place / version.name) in dropping for place in places.values())
    assert all(place.is_dir() for place in places.values())


def backup_request(**changes: Any) -> Any:
    from hq_backups.engine.requests import BackupRequest

    return BackupRequest("postgres", "daily", **{"upload": True, **changes})


def test_restored_on_a_machine_that_lost_everything(host: Spread) -> None:
    before = host.contents()
    assert host.backup().code is Exit.OK
    host.server.stop()
    remove(host.data)
    for place in host.live:
        remove(place)
    done = host.restore()
    assert done.code is Exit.OK, done
    host.server.start()
    assert host.contents() == before
    assert set(host.locations().values()) == set(host.live)


def test_unpacked_beside(host: Spread) -> None:
    assert host.backup().code is Exit.OK
    copy = host.server.workdir / "copy"
    files = host.files()
    done = host.restore(target_dir=copy)
    assert done.code is Exit.OK, done
    assert any(str(copy) + ".outer" in s["message"] for s in done.of("step"))
    links = {p.name: p.readlink() for p in (copy / "pg_tblspc").iterdir()}
    assert links == {oid: host.server.workdir / "copy.outer" / oid for oid in host.oids()}
    assert not (copy / "tablespace_map").exists()
    host.server.stop()
    files = host.files()
    other = PostgresServer(host.server.version, host.server.workdir / "other")
    other.workdir.mkdir()
    give(other.workdir, other.os_user)
    other.data_dir = copy
    other.configure()
    with other:
        here = dataclasses.replace(host, server=other)
        assert set(here.locations().values()) == set(links.values())
        script(other, "INSERT INTO apart SELECT generate_series(1, 1000); CHECKPOINT")
        other.stop()
    assert host.files() == files
    # Where something is already, nothing is put.
    again = host.restore(target_dir=host.server.workdir / "copy2")
    assert again.code is Exit.OK, again
    remove(host.server.workdir / "copy2")
    refused = host.restore(target_dir=host.server.workdir / "copy2")
    assert refused.code is Exit.PREFLIGHT
    assert "copy2.outer" in refused.error


# What an archive or a manifest says


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", content: bytes = b"") -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size, info.mode = kind, link, len(content), 0o600
    padding = bytes(-len(content) % tarfile.BLOCKSIZE)
    return info.tobuf(tarfile.GNU_FORMAT) + content + padding


def rewrite(host: Host, plain: bytes | None = None, **source: Any) -> None:
    """Put another archive in the place of a host's artifact, or none, with a manifest that agrees with it."""
    path = host.artifact
    beside = path.with_name(f".{path.name}.json")
    manifest = json.loads(beside.read_bytes())
    manifest["source"] |= source
    if plain is not None:
        stored = gzip.compress(plain, 1)
        path.write_bytes(stored)
        manifest |= {
            "size": len(stored), "sha256": sha256(stored), "crc32": f"{zlib.crc32(stored):08x}",
            "plain_size": len(plain), "plain_sha256": sha256(plain),
        }  # fmt: skip
    beside.write_text(json.dumps(manifest))


HOSTILE: Mapping[str, tuple[Callable[[str], bytes], str]] = {
    "a link to a live directory": (
        lambda oid: member("pg_tblspc/99", tarfile.SYMTYPE, "/tmp/live"),
        "neither file nor directory",
    ),
    "a link in place of ours": (
        lambda oid: member(f"pg_tblspc/{oid}", tarfile.SYMTYPE, "/tmp/live"),
        "neither file nor directory",
    ),
    "a file in place of ours": (lambda oid: member(f"pg_tblspc/{oid}"), "must be a directory"),
    "a file in place of all": (lambda oid: member("pg_tblspc"), "both file and directory"),
    "a way out": (lambda oid: member(f"pg_tblspc/{oid}/../../x"), "leaves the tree"),
    "another's tablespace": (
        lambda oid: member("pg_tblspc/99/PG_15_202209061/1/1"),
        "no tablespace that its",
    ),
    "no tablespace's file": (lambda oid: member(f"pg_tblspc/{oid}/x"), "is not of a tablespace"),
    "a version that is a file": (
        lambda oid: member(f"pg_tblspc/{oid}/PG_15_1"),
        "is not of a tablespace",
    ),
    "the files of another version": (
        lambda oid: member(f"pg_tblspc/{oid}/PG_14_202107181/1"),
        "is not of a tablespace",
    ),
}


def test_hostile_archives_and_manifests(host: Spread) -> None:
    assert host.backup().code is Exit.OK
    good = gzip.decompress(host.artifact.read_bytes())
    known = host.run_as_owner("verify", verify_request()).code
    assert known is Exit.OK
    files, odd = host.files(), host.oids()[1]
    before = host.beside()
    if host.server.version == 15:
        for what, (extra, said) in HOSTILE.items():
            rewrite(host, extra(odd) + good)
            done = host.restore(target_dir=host.server.workdir / "copy")
            assert done.code is Exit.BAD_BACKUP, (what, done)
            assert said in done.error, (what, done.error)
            assert host.beside() == before, what
    # A map in it is passed over: only the manifest's list counts, and the links are ours.
    content = f"{odd} {host.live[0]}\n99 /etc/hq\n".encode()
    rewrite(host, member("tablespace_map", content=content) + good)
    done = host.restore(target_dir=host.server.workdir / "copy")
    assert done.code is Exit.OK, done
    assert not (host.server.workdir / "copy" / "tablespace_map").exists()
    remove(host.server.workdir / "copy")
    remove(host.server.workdir / "copy.outer")
    rewrite(host, good)
    # A tablespace that the archive does not have, and words that make no sense.
    spaces = [{"oid": int(oid), "name": "n", "location": "/x", "size": 1} for oid in host.oids()]
    for listed, said in (
        ([*spaces, {"oid": 99, "name": "gone", "location": "/x"}], "tablespace 99 is not in it"),
        (spaces[:1], "no tablespace that its manifest knows"),
        ([{"oid": "../../x", "name": "n", "location": "/x"}], "makes no sense"),
        ([*spaces, spaces[0]], "makes no sense"),
        ([{"oid": -1, "name": "n", "location": "/x"}], "makes no sense"),
        ([{"oid": 1, "name": "n", "location": 7}], "makes no sense"),
        ("odd", "makes no sense"),
        ([7], "makes no sense"),
    ):
        rewrite(host, tablespaces=listed)
        for done in (
            host.restore(target_dir=host.server.workdir / "copy"),
            host.run("verify", verify_request()),
        ):
            assert done.code is Exit.BAD_BACKUP, (listed, done)
            assert said in done.error, (listed, done.error)
        assert host.beside() == before
    # Locations that must not be followed: the plan says where instead.
    for location in ("/etc/x", "relative", f"{host.disks}/../x", f"{host.data}/in it", f"{host.data}"):
        listed = [{**each, "location": location} for each in spaces]
        rewrite(host, tablespaces=listed)
        done = host.restore(plan_only=True)
        assert done.code is Exit.OK, done
        (plan,) = done.of("plan")
        assert plan["outer"] == {oid: str(host.data) + f".outer-{oid}" for oid in host.oids()}
    assert host.files() == files
    done = host.restore()
    assert done.code is Exit.OK, done
    host.server.start()
    assert sorted(map(str, host.locations().values())) == sorted(plan["outer"].values())


def verify_request() -> Any:
    from hq_backups.engine.requests import Selection, VerifyRequest

    return VerifyRequest(Selection("postgres", "latest"))


def test_a_scratch_server_is_not_started_on_links_that_lead_elsewhere(tmp_path: Path) -> None:
    tree, live = tmp_path / "data", tmp_path / "live"
    for place in (tree / "pg_tblspc", live, tmp_path / "outer" / "16384"):
        place.mkdir(parents=True)
    (tree / "pg_tblspc" / "16384").symlink_to(tmp_path / "outer" / "16384")
    tablespaces.require_own(tree, [tmp_path / "outer"], "it")
    (tree / "pg_tblspc" / "16385").symlink_to(live)
    with (
        pytest.raises(UnsafeArchive, match="another cluster's"),
        scratch.running(tree, 15, Tools(None), superuser="postgres", name="it"),
    ):
        pass
    (tree / "pg_tblspc" / "16385").unlink()
    (tree / "tablespace_map").write_text("16385 /live\n")
    with pytest.raises(UnsafeArchive, match="tablespace_map"):
        tablespaces.require_own(tree, [tmp_path / "outer"], "it")


# The spool


def archives(place: Path, **files: list[bytes]) -> Path:
    """Write what pg_basebackup leaves in a spool."""
    for name, members in files.items():
        (place / f"{name.removeprefix('t')}.tar").write_bytes(b"".join(members) + bytes(1024))
    (place / "backup_manifest").write_bytes(b"{}" * 300)
    return place


def ustar(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.mode = kind, len(content), 0o600
    return info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % tarfile.BLOCKSIZE)


def read(place: Path) -> bytes:
    stream, out, buffer = spool.Spooled(place), bytearray(), bytearray(700)
    while count := stream.readinto(memoryview(buffer)):
        out += buffer[:count]
    return bytes(out)


def test_files_become_one_archive_and_are_gone(tmp_path: Path) -> None:
    long = "PG_15_202209061/" + "n" * 80
    big = os.urandom(3 << 20) + b"x"
    archives(
        tmp_path,
        base=[ustar("PG_VERSION", b"15\n"), ustar("pg_tblspc", kind=tarfile.DIRTYPE)],
        t16384=[ustar("PG_15_202209061", kind=tarfile.DIRTYPE), ustar(long, big)],
    )
    with tarfile.open(fileobj=io.BytesIO(read(tmp_path))) as tar:
        found = {m.name: tar.extractfile(m) for m in tar.getmembers()}
    assert list(found) == [
        "PG_VERSION", "pg_tblspc", "backup_manifest", "pg_tblspc/16384/PG_15_202209061", f"pg_tblspc/16384/{long}",
    ]  # fmt: skip
    data = found[f"pg_tblspc/16384/{long}"]
    assert data is not None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cut", [512, 1024, 1536, 2000])
def test_a_file_that_is_cut_short_is_none(tmp_path: Path, cut: int) -> None:
    archives(tmp_path, base=[ustar("PG_VERSION", b"15\n")], t16384=[ustar("PG_15_1/1", b"d" * 600)])
    path = tmp_path / "16384.tar"
    path.write_bytes(path.read_bytes()[: cut if cut < 2000 else -512])
    with pytest.raises(ProducerTruncated):
        read(tmp_path)


def test_a_strange_file_is_told_of(tmp_path: Path) -> None:
    archives(tmp_path, base=[ustar("PG_VERSION", b"15\n")])
    (tmp_path / "pg_wal.tar").touch()
    with pytest.raises(ProducerTruncated, match="pg_wal"):
        read(tmp_path)
    (tmp_path / "pg_wal.tar").unlink()
    (tmp_path / "base.tar").write_bytes(ustar("x", kind=tarfile.SYMTYPE) + bytes(1024))
    with pytest.raises(ProducerTruncated, match="neither file nor directory"):
        read(tmp_path)


def test_what_a_tablespace_map_says() -> None:
    assert tablespaces.mapped(b"16384 /a b\n16385 /c\\\nd\\\\e\n") == {"16384": "/a b", "16385": "/c\nd\\e"}
    assert tablespaces.mapped(b"") == {}
    with pytest.raises(ProducerTruncated):
        tablespaces.mapped(b"x /y\n")
