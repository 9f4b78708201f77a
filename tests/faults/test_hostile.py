"""Damaged and hostile archives and manifests, through list, verify and restore: exit 3, nothing outside touched."""

from __future__ import annotations

import copy
import functools
import gzip
import hashlib
import io
import json
import os
import random
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from hq_backups.engine.couch import copying
from hq_backups.engine.events import Events
from tests.factories import manifest as make_manifest
from tests.faults.test_kills import SEED, SWEEP
from tests.faults.victim import ENV, HOST, VICTIMS, HostVictim, Victim
from tests.testbed.couch_data import make_data_dir
from tests.testbed.places import server_user
from tests.testbed.postgres import PostgresServer
from tests.testbed.process import give, short_directory
from tests.testbed.s3 import S3Service

pytestmark = [pytest.mark.faults, pytest.mark.postgres15]
MODES = ("plain", "dump", "tablespaces", "blobdb", "couch")
ONLY = {
    "test_a_hostile_archive_is_refused": ("plain", "blobdb", "couch"),
    "test_a_bomb_ends_where_its_manifest_says": ("plain", "dump", "blobdb", "couch"),
    "test_a_hostile_manifest_is_refused": ("plain", "dump", "blobdb", "couch"),
    "test_an_archive_made_by_hand_is_no_reason_to_refuse_it": ("blobdb", "couch"),
    "test_what_a_manifest_says_of_databases_is_not_believed": ("couch",),
    "test_what_a_manifest_says_of_a_dumped_cluster_is_not_believed": ("dump",),
    "test_a_manifest_that_is_deep_but_legal_does_no_harm": ("plain",),
    "test_a_newer_schema_is_listed_and_its_restore_says_what_to_do": ("plain", "dump", "blobdb", "couch"),
    "test_a_pending_manifest_moves_nothing_into_the_directory": ("plain", "dump"),
}
STEM = "postgres_prod_manual_2026_11_20_101112"
BLOBS = "blobdb_manual_2026_11_20_101112"
DATABASES = "couchdb_manual_2026_11_20_101112"
NAMES = {
    "plain": f"{STEM}.tar",
    "dump": f"{STEM}.sql",
    "blobdb": f"{BLOBS}.tar",
    "couch": f"{DATABASES}.tar",
}
PACKED = {**{mode: f"{name}.gz" for mode, name in NAMES.items()}, "dump": f"{STEM}.gz"}
NAME = NAMES["plain"]


@pytest.fixture(scope="module")
def shown(server: PostgresServer, mode: str) -> Iterator[HostVictim]:
    """Return a victim with one good backup, to which each test adds something bad and takes it away."""
    with short_directory(server_user()) as home:
        victim = VICTIMS[mode](home, server)
        victim.run(victim.backup()).expect(0)
        yield victim


@pytest.fixture
def clean(shown: HostVictim) -> Iterator[HostVictim]:
    good, names, around = [e["run"] for e in shown.good()], shown.names(), set(os.listdir(shown.home))
    yield shown
    made = set(os.listdir(shown.home)) - around
    for name in made:
        shutil.rmtree(shown.home / name)
    for name in shown.names() - names:
        if not name.endswith(".verified.json"):
            (shown.backups / name).unlink()
    assert [e["run"] for e in shown.good()] == good
    assert made == set()


def described(
    content: bytes, plain: bytes | None = None, mode: str = "plain", **changes: Any
) -> dict[str, Any]:
    """Return the manifest that fits an artifact, as plain data."""
    plain = content if plain is None else plain
    facts: dict[str, Any] = {
        "mode": VICTIMS[mode].mode,
        "store": VICTIMS[mode].store,
        "env": ENV,
        "host": HOST,
        "run": "20261120T101112Z-pg0-postgres",
        "type": "manual",
        "plain_size": len(plain),
        "plain_sha256": hashlib.sha256(plain).hexdigest(),
        "crc32": f"{zlib.crc32(content):08x}",
        **changes,
    }
    if mode == "dump":
        facts.setdefault("source", SOURCE)
    if mode == "blobdb":
        facts.setdefault("source", {"files": 1, "directories": 0, "bytes": 3})
    if mode == "couch":
        facts.setdefault("source", promised(plain))
    return json.loads(make_manifest(NAMES[mode], content, **facts).to_json())


def put(victim: Victim, content: bytes, manifest: bytes | dict[str, Any], name: str = NAME) -> str:
    raw = manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()
    raw = raw.replace(b"Infinity", b"1e999")
    for path, body in ((victim.backups / name, content), (victim.backups / f".{name}.json", raw)):
        path.write_bytes(body)
        path.chmod(0o600)
        give(path, victim.user)
    return name


def assert_refused(victim: Victim, name: str, status: int = 3) -> str:
    """Demand that it is listed without harm, and neither verified nor restored."""
    newest = victim.entries()[0]["run"]
    said = victim.here(victim.verify(name)).expect(status).errors
    beside = victim.home / "beside"
    victim.here(victim.restore(name, target_dir=beside)).expect(status)
    assert not beside.exists()
    assert victim.entries()[0]["run"] == newest
    return said


@functools.cache
def couch_backup() -> tuple[bytes, dict[str, Any]]:
    """Return a small backup of CouchDB, not compressed, and what its manifest says of the source."""
    events = Events(lambda event: None)
    with short_directory() as home:
        root = make_data_dir(home / "data", {"one": [{"_id": "a"}]})
        with copying.whole(root, None, events) as (taken, contents):
            stream = copying.CouchStream(taken, contents, {})
            packed = bytearray(1 << 20)
            size = stream.readinto(memoryview(packed))
            assert not stream.readinto(memoryview(bytearray(1)))
            return bytes(packed[:size]), dict(stream.finish())


def promised(plain: bytes) -> dict[str, Any]:
    """Return a source of CouchDB that promises all files that Python's own reader finds in an archive."""
    source = couch_backup()[1]
    found: dict[str, dict[str, Any]] = {}
    with suppress(tarfile.TarError, RecursionError), tarfile.open(fileobj=io.BytesIO(plain)) as archive:
        for each in archive:
            file = archive.extractfile(each) if each.isreg() else None
            if file is None:
                continue
            body = file.read()
            found[each.name.removeprefix("./")] = {
                "size": len(body),
                "sha256": hashlib.sha256(body).hexdigest(),
            }
    return {**source, "files": {**found, **source["files"]}}


# Archives


def tar(*members: tuple[tarfile.TarInfo, bytes], format_: int = tarfile.GNU_FORMAT) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=format_) as archive:
        for member, body in members:
            member.size = len(body)
            archive.addfile(member, io.BytesIO(body))
    return packed.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", mode: int = 0o600) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname, made.mode = kind, link, mode
    return made


def header(name: str, size: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    """Return a header block whose size field is written as it is given."""
    block = bytearray(member(name, kind).tobuf(tarfile.GNU_FORMAT))
    block[124:136] = size.ljust(12, b"\0")[:12]
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def sparse() -> bytes:
    """Return an old GNU sparse member that says it is larger than what is stored of it."""
    block = bytearray(header("sparse", b"00000001000\0", tarfile.GNUTYPE_SPARSE))
    block[386:410] = b"00000000000\0" + b"00000001000\0"
    block[483:495] = b"00004000000\0"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + b"x" * 512


FINE = (member("PG_VERSION"), b"15\n")
END = b"\0" * 1024
NEGATIVE = b"\xff" * 11 + b"\x80"
PAX = header("pax", b"00000000013\0", tarfile.XHDTYPE) + b"11 path=a/b\n".ljust(512, b"\0")

ARCHIVES: dict[str, Callable[[Path], bytes]] = {
    "absolute": lambda out: tar((member(str(out / "made")), b"x")),
    "dots": lambda out: tar((member("../made"), b"x")),
    "dots-inside": lambda out: tar((member("a/../../made"), b"x")),
    "symlink": lambda out: tar((member("link", tarfile.SYMTYPE, str(out)), b""), (member("link/made"), b"x")),
    "symlink-to-shards": lambda out: tar(
        (member("shards", tarfile.SYMTYPE, str(out)), b""), (member("shards/a/made.couch"), b"x")
    ),
    "dots-among-shards": lambda out: tar((member("shards/../../made.couch"), b"x")),
    "symlink-inside": lambda out: tar(FINE, (member("link", tarfile.SYMTYPE, "PG_VERSION"), b"")),
    "hardlink": lambda out: tar((member("link", tarfile.LNKTYPE, "/etc/hostname"), b"")),
    "device": lambda out: tar((member("null", tarfile.CHRTYPE), b"")),
    "fifo": lambda out: tar((member("fifo", tarfile.FIFOTYPE), b"")),
    "twice": lambda out: tar(FINE, FINE),
    "file-then-directory": lambda out: tar((member("a"), b"x"), (member("a/b"), b"x")),
    "directory-then-file": lambda out: tar((member("a", tarfile.DIRTYPE, mode=0o700), b""), (member("a"), b"x")),
    "long-name": lambda out: tar((member("n" * 300), b"x")),
    "deep-path": lambda out: tar((member("/".join(["d"] * 4000)), b"x")),
    "sparse": lambda out: sparse() + END,
    "negative-size": lambda out: header("back", NEGATIVE) + b"x" * 512 + END,
    "huge-size": lambda out: header("huge", b"77777777777\0") + b"x" * 512 + END,
    "size-of-letters": lambda out: header("letters", b"abcdefg\0") + END,
    "pax-after-pax": lambda out: PAX * 3000 + END,
    "pax-without-end": lambda out: header("pax", b"77777777777\0", tarfile.XHDTYPE) + END,
    "cut": lambda out: tar(FINE, (member("a"), b"x" * 5000))[:2048],
    "nothing": lambda out: b"",
    "no-tar": lambda out: b"this is no archive" * 100,
    "only-an-end": lambda out: END,
    "not-a-cluster": lambda out: tar((member("a"), b"x")),
}  # fmt: skip


@pytest.mark.parametrize("kind", ARCHIVES)
def test_a_hostile_archive_is_refused(clean: HostVictim, tmp_path: Path, kind: str, mode: str) -> None:
    content = ARCHIVES[kind](tmp_path)
    if mode == "couch" and content.endswith(END) and content != END and kind != "not-a-cluster":
        # All that belongs there follows, or it would be refused for what it lacks.
        content = content.rstrip(b"\0")
        content += bytes(-len(content) % 512) + couch_backup()[0]
    assert_refused(clean, put(clean, content, described(content, mode=mode), NAMES[mode]))
    assert os.listdir(tmp_path) == []


def test_an_archive_made_by_hand_is_no_reason_to_refuse_it(clean: HostVictim, mode: str) -> None:
    name = put(clean, CONTENTS[mode], described(CONTENTS[mode], mode=mode), NAMES[mode])
    clean.here(clean.verify(name)).expect(0)


def test_a_bomb_ends_where_its_manifest_says(clean: HostVictim, mode: str) -> None:
    name = "_big.couch" if mode == "couch" else "big"
    plain = DUMP + b"\n" * (64 << 20) if mode == "dump" else tar((member(name), b"\0" * (64 << 20)))
    content, name = gzip.compress(plain), PACKED[mode]
    manifest = {**described(content, plain[: 1 << 20], mode, codec="gzip"), "name": name}
    assert "unpacks to more than" in assert_refused(clean, put(clean, content, manifest, name))


# Manifests


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


CONTENT = tar(FINE)
DUMP = (
    b"--\n-- PostgreSQL database cluster dump\n--\n\n\\connect template1\n\n\\connect postgres\n\n"
    b"CREATE TABLE public.n (id integer);\nCOPY public.n (id) FROM stdin;\n1\n2\n\\.\n\n"
    b"--\n-- PostgreSQL database cluster dump complete\n--\n\n"
)
CONTENTS = {"plain": CONTENT, "dump": DUMP, "blobdb": CONTENT, "couch": couch_backup()[0]}
BASE = {"name": "template0", "encoding": "UTF8", "collate": "C.UTF-8", "ctype": "C.UTF-8"}
SOURCE: dict[str, Any] = {
    "version_num": 150018,
    "cluster": {"bootstrap": "postgres", "databases": [BASE]},
    "rows": {"template1": {}, "postgres": {"public.n": 2}},
    "roles": ["postgres"],
}
MANIFESTS: dict[str, Any] = {
    "source-endless": {"source": {"files": float("inf")}},
    "source-deep": {"source": {"a": json.loads(nested(400))}},
    "name-with-slashes": {"name": "../../etc/passwd"},
    "name-of-another": {"name": NAME.replace("101112", "101113")},
    "name-with-a-newline": {"name": NAME + "\n"},
    "name-of-a-surrogate": {"name": "\ud800"},
    "run-with-slashes": {"run": "/../../x"},
    "run-of-a-surrogate": {"run": "\ud800"},
    "run-with-controls": {"run": "a\x1b[2Jb"},
    "size-negative": {"size": -1},
    "size-huge": {"size": 10**30},
    "size-true": {"size": True},
    "size-text": {"size": "12"},
    "size-other": {"size": 7},
    "sha-other": {"sha256": "0" * 64},
    "sha-upper": {"sha256": "A" * 64},
    "plain-sha-other": {"plain_sha256": "0" * 64},
    "plain-size-huge": {"plain_size": 10**30},
    "plain-size-other": {"plain_size": 512},
    "codec-unknown": {"codec": "rot13"},
    "mode-unknown": {"mode": "sideways"},
    "type-unknown": {"type": "yearly"},
    "store-unknown": {"store": "mysql"},
    "store-other": {"store": "another"},
    "date-impossible": {"local_date": "2026-02-31"},
    "time-impossible": {"started_at": "yesterday"},
    "warnings-of-numbers": {"warnings": [1, 2]},
    "source-a-list": {"source": []},
    "field-unknown": {"exec": "rm -rf /"},
    "schema-zero": {"schema": 0},
    "schema-newer": {"schema": 2},
    "schema-text": {"schema": "1"},
    "deep": b'{"source": {"a": ' + nested(200_000) + b"}}",
    "number-endless": b'{"schema": ' + b"9" * 100_000 + b"}",
    "not-utf-8": b'{"name": "\xff\xfe"}',
    "empty": b"",
    "a-list": b"[]",
    "null": b"null",
    "too-large": b" " * ((64 << 20) + 1),
}


def changed(change: Any, mode: str = "plain") -> bytes | dict[str, Any]:
    if isinstance(change, bytes):
        return change
    if isinstance(name := change.get("name"), str):
        change = {"name": name.replace(NAME, NAMES[mode]).replace(".tar", Path(NAMES[mode]).suffix)}
    if change.get("store") == "another":
        change = {"store": "postgres" if mode == "couch" else "couch"}
    return {**described(CONTENTS[mode], mode=mode), **change}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_hostile_manifest_is_refused(clean: HostVictim, kind: str, mode: str) -> None:
    name = NAMES[mode]
    put(clean, CONTENTS[mode], changed(MANIFESTS[kind], mode), name)
    good = [e["name"] for e in clean.good()]
    here = [e for e in clean.entries() if e["locations"][0]["path"].endswith(f"/{name}")]
    if kind != "store-other":  # which is not listed among this store's
        clean.here(clean.verify(name)).expect(3)
        beside = clean.home / "beside"
        # What is stored is proven by its own sum: a restore does not compute the other one. (What stands for
        # PostgreSQL's files here is refused by pg_verifybackup.)
        proven = kind == "plain-sha-other" and mode != "plain"
        clean.here(clean.restore(name, target_dir=beside)).expect(0 if proven else 3)
        assert beside.exists() == proven
        shutil.rmtree(beside, ignore_errors=True)
    assert len(here) == (kind != "store-other")
    assert [e["name"] for e in clean.good()] == good
    # `latest` is another, and a prune keeps what it knows nothing of.
    clean.here(clean.verify()).expect(0)


def cluster(**changes: Any) -> dict[str, Any]:
    return {"cluster": {**SOURCE["cluster"], **changes}}


def base(**changes: Any) -> dict[str, Any]:
    return cluster(databases=[BASE, {**BASE, "name": "postgres", **changes}])


CLUSTERS: dict[str, dict[str, Any]] = {
    "no-cluster": {"cluster": None},
    "cluster-a-list": {"cluster": []},
    "bootstrap-a-list": cluster(bootstrap=[]),
    "bootstrap-empty": cluster(bootstrap=""),
    "bootstrap-reserved": cluster(bootstrap="pg_read_all_data"),
    "bootstrap-with-a-zero": cluster(bootstrap="a\0b"),
    "segment-odd": cluster(segment=17),
    "segment-huge": cluster(segment=1 << 40),
    "encoding-with-sql": base(encoding="UTF8'; DROP"),
    "collate-a-flag": base(collate="x --auth=trust"),
    "provider-unknown": base(provider="x"),
    "owner-with-sql": base(owner='postgres"; CREATE ROLE evil SUPERUSER; --'),
    "comment-with-a-zero": base(comment="\0"),
    "connections-with-sql": base(connections="1; DROP"),
    "privilege-with-sql": base(
        granted=True,
        grants=[{"grantor": "postgres", "grantee": None, "privilege": "ALL; DROP", "grantable": False}],
    ),
    "grantor-unknown": base(
        granted=True,
        grants=[{"grantor": "evil", "grantee": None, "privilege": "CONNECT", "grantable": False}],
    ),
    "setting-with-sql": base(settings=[{"role": None, "values": ["a; DROP DATABASE postgres; --=1"]}]),
    "file-that-runs": cluster(files=[{"name": "archive_command", "value": "touch x", "automatic": True}]),
    "file-of-a-standby": cluster(files=[{"name": "primary_conninfo", "value": "x", "automatic": True}]),
    "file-with-a-line-more": cluster(files=[{"name": "port", "value": "1\nfsync = off", "automatic": True}]),
    "version-text": {"version_num": "150018"},
    "rows-missing": {"rows": None},
    "rows-a-list": {"rows": []},
    "rows-a-number": {"rows": {"template1": {}, "postgres": 7}},
    "rows-other": {"rows": {"template1": {}, "postgres": {"public.n": 3}}},
    "roles-a-number": {"roles": 7},
    "roles-of-lists": {"roles": [["a"]]},
    "roles-null": {"roles": None},
    "tablespaces-odd": {"tablespaces": [{"oid": "../x", "name": "n", "location": "/x"}]},
    "tablespace-nowhere": {"tablespaces": [{"oid": 99999, "name": "n", "location": 7}]},
}


@pytest.mark.parametrize("kind", ["good", *CLUSTERS])
def test_what_a_manifest_says_of_a_dumped_cluster_is_not_believed(clean: HostVictim, kind: str) -> None:
    source = {**SOURCE, **CLUSTERS.get(kind, {})}
    name = put(clean, DUMP, described(DUMP, mode="dump", source=source), NAMES["dump"])
    beside = clean.home / "beside"
    if kind == "good":  # so that no refusal is of something else
        clean.here(clean.verify(name)).expect(0)
        clean.run(clean.restore(name, target_dir=beside)).expect(0)
        shutil.rmtree(beside)
        return
    clean.run(clean.restore(name, target_dir=beside)).expect(3)
    assert not beside.exists()
    clean.settled()


def of_one(**changes: Any) -> dict[str, Any]:
    """Return what a manifest says of databases, something else of one of them."""
    return {"databases": {**couch_backup()[1]["databases"], "one": changes}}


DATABASE: dict[str, Any] = couch_backup()[1]["databases"]["one"]
SOURCES: dict[str, Any] = {
    "no-files": {"files": None},
    "files-a-list": {"files": []},
    "files-of-numbers": {"files": {"_dbs.couch": 7}},
    "files-missing": {"files": {}},
    "file-more": {"files": {**couch_backup()[1]["files"], "_more.couch": {"size": 1, "sha256": "0" * 64}}},
    "file-endless": {"files": {"_dbs.couch": {"size": float("inf"), "sha256": "0" * 64}}},
    "databases-a-list": {"databases": []},
    "databases-none": {"databases": {}},
    "database-a-number": of_one(**{}),
    "ranges-a-number": of_one(**{**DATABASE, "ranges": 7}),
    "ranges-of-numbers": of_one(**{**DATABASE, "ranges": {"00000000-ffffffff": 7}}),
    "ranges-other": of_one(**{**DATABASE, "ranges": {"00000000-ffffffff": ["evil@host"]}}),
    "ranges-elsewhere": of_one(**{**DATABASE, "suffix": "/../../../etc/passwd"}),
    "shards-a-list": {"shards": []},
    "shards-of-text": {"shards": {"shards/a/b.couch": "abc"}},
    "shard-with-more": {"shards": {**couch_backup()[1]["shards"], "shards/a/b.couch": [1, 2, 3, 4, 5]}},
    "counts-endless": {"shards": {path: [float("inf")] * 3 for path in couch_backup()[1]["shards"]}},
    "counts-other": {"shards": {path: [7, 7, 7] for path in couch_backup()[1]["shards"]}},
    "parts-of-its-own": {"parts": [{"manifest": {}, "location": {"kind": "local", "path": "/etc/hostname"}}]},
}


@pytest.mark.parametrize("kind", SOURCES)
def test_what_a_manifest_says_of_databases_is_not_believed(clean: HostVictim, kind: str) -> None:
    content, source = couch_backup()
    manifest = described(content, mode="couch", source={**source, **SOURCES[kind]})
    name = put(clean, content, manifest, NAMES["couch"])
    beside = clean.home / "beside"
    clean.here(clean.restore(name, target_dir=beside)).expect(3)
    assert not beside.exists()


def test_a_manifest_that_is_deep_but_legal_does_no_harm(clean: HostVictim) -> None:
    manifest = described(CONTENT)
    manifest["source"]["deep"] = json.loads(nested(20))
    assert "is not in it" in assert_refused(clean, put(clean, CONTENT, manifest))


def test_a_newer_schema_is_listed_and_its_restore_says_what_to_do(clean: HostVictim, mode: str) -> None:
    name = put(clean, CONTENTS[mode], changed({"schema": 2}, mode), NAMES[mode])
    (entry,) = [e for e in clean.entries() if e["name"] == name]
    assert "newer hq_backups" in entry["problem"]
    said = clean.here(clean.restore(name, target_dir=clean.home / "beside")).expect(3).errors
    assert "newer" in said
    assert "Update hq_backups" in said


def test_a_pending_manifest_moves_nothing_into_the_directory(clean: HostVictim, tmp_path: Path) -> None:
    outside = clean.home / "outside.partial"
    outside.write_bytes(CONTENT)
    give(outside, clean.user)
    for run in (f"/../../{clean.home.name}/outside", "/../outside", "\ud800"):
        pending = clean.backups / f".{hashlib.md5(run.encode('utf-8', 'replace')).hexdigest()}.pending.json"  # noqa: S324
        pending.write_text(json.dumps({**described(CONTENT), "run": run}))
    clean.run(clean.prune()).expect(0)
    assert outside.read_bytes() == CONTENT
    assert clean.stray_files() == set()
    outside.unlink()


def test_hostile_manifests_in_the_bucket_harm_nobody(
    victim: Victim, s3: S3Service, versioned_bucket: str
) -> None:
    victim.use_bucket(s3, versioned_bucket)
    run = victim.run(victim.backup()).expect(0).events[0]["run"]
    key = next(k for k in victim.objects() if not k.endswith(".json"))
    client = s3.client()
    good = json.loads(client.get_object(Bucket=versioned_bucket, Key=f"{key}.manifest.json")["Body"].read())
    prefix = key.partition("_")[0]
    elsewhere = copy.deepcopy(good)
    elsewhere["run"] = "20991120T101112Z-pg0-postgres"
    client.put_object(Bucket=versioned_bucket, Key=f"{prefix}_daily_evil.tar", Body=CONTENT)
    bodies = {
        # Says that its object lies under another key, or is another version.
        f"{prefix}_daily_evil.tar": json.dumps(elsewhere).encode(),
        f"{prefix}_weekly_evil.tar": b"[" * 100_000,
        f"{prefix}_hourly_evil.tar": b"\xff",
        f"{prefix}_manual_evil.tar": json.dumps({**good, "schema": 2}).encode(),
        f"{prefix}_manual_evil2.tar": json.dumps({**good, "size": -1}).encode(),
        f"{prefix}_/../../evil.tar": json.dumps(good).encode(),
        f"{prefix}_gone.tar": json.dumps(
            {**elsewhere, "repository": {**good["repository"], "key": f"{prefix}_gone.tar"}}
        ).encode(),
    }
    for name, body in bodies.items():
        if ".." not in name:
            client.put_object(Bucket=versioned_bucket, Key=f"{name}.manifest.json", Body=body)
    assert {e["run"] for e in victim.good("s3")} == {run}
    victim.run(victim.verify(source="s3")).expect(0)
    victim.run(victim.backup()).expect(0)


# Damage


def flips(path: Path, count: int, first: int = 0, last: int | None = None) -> Iterator[int]:
    """Flip one bit at a time, put it back after each look."""
    dice = random.Random(SEED)
    size = path.stat().st_size if last is None else last
    spots = sorted(dice.sample(range(first, size), min(SWEEP or count, size - first)))
    for spot in spots:
        bit = 1 << dice.randrange(8)
        with path.open("r+b", buffering=0) as file:
            for _ in range(2):
                file.seek(spot)
                old = file.read(1)[0]
                file.seek(spot)
                file.write(bytes([old ^ bit]))
                if _ == 0:
                    yield spot


@pytest.mark.parametrize("codec", ["none", "gzip"])
def test_any_flipped_bit_of_an_archive_is_found(victim: Victim, codec: str) -> None:
    victim.run(victim.backup(changes={"compression": codec})).expect(0)
    (entry,) = victim.good()
    path = victim.backups / entry["name"]
    size = entry["size"]
    for spot in (
        s for part in (flips(path, 4), flips(path, 1, 0, 10), flips(path, 1, size - 8)) for s in part
    ):
        outcome = victim.here(victim.verify(entry["name"]))
        assert outcome.status == 3, (spot, outcome)
        assert "is damaged" in outcome.errors
    victim.here(victim.verify(entry["name"])).expect(0)


def test_any_flipped_bit_of_a_manifest_is_found_or_harmless(victim: Victim) -> None:
    victim.run(victim.backup()).expect(0)
    (entry,) = victim.good()
    found = 0
    for spot in flips(victim.backups / f".{entry['name']}.json", 12):
        (listed,) = victim.entries()
        status = victim.here(victim.verify(entry["name"])).status
        assert status in (0, 3), (spot, listed)
        found += status == 3
    assert found
    victim.here(victim.verify(entry["name"])).expect(0)


def test_a_damaged_archive_is_not_restored_over_good_data(own_victim: Callable[..., HostVictim]) -> None:
    victim = own_victim()
    victim.run(victim.backup()).expect(0)
    victim.change_data()
    data, around = victim.fingerprint(), victim.beside()
    (entry,) = victim.good()
    for spot in flips(victim.backups / entry["name"], 1):
        outcome = victim.run(victim.restore()).expect(3)
        assert "is damaged" in outcome.errors, spot
        assert victim.is_serving()
        assert victim.fingerprint() == data
        assert victim.beside() == around
    victim.run(victim.restore()).expect(0)
    assert victim.fingerprint() != data
