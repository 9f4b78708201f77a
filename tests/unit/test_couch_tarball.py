"""The tar that is made of a snapshot: what the disk is asked for before it is read."""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from hq_backups.engine.couch import snapshot
from hq_backups.engine.couch.frozen import Frozen
from hq_backups.engine.couch.tarball import AHEAD, Tarball

MIB = 1 << 20
SIZES = (0, 1, 511, 512, MIB - 1, MIB, MIB + 1, 3 * MIB + 77, 9 * MIB, 25 * MIB, 200)


@pytest.fixture
def taken(tmp_path: Path) -> snapshot.Snapshot:
    """Return a snapshot of files of many sizes."""
    below = tmp_path / "shards" / "00000000-ffffffff"
    below.mkdir(parents=True)
    (tmp_path / "_dbs.couch").write_bytes(b"d" * 5000)
    for number, size in enumerate(SIZES):
        (below / f"db{number}.1700000000.couch").write_bytes(bytes([number]) * size)
    return snapshot.take(tmp_path)


def test_the_disk_is_asked_for_every_byte_once_and_before_it_is_read(
    taken: snapshot.Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: Counter[str] = Counter()
    before, late = [0], []
    ask, read_into = Frozen.ask, Frozen.read_into

    def asking(file: Frozen, offset: int, length: int) -> None:
        assert offset == asked[file.path]
        asked[file.path] += length
        before[0] += length
        ask(file, offset, length)

    def reading(file: Frozen, buffer: memoryview, offset: int) -> int:
        count = read_into(file, buffer, offset)
        if offset + count > asked[file.path]:
            late.append((file.path, offset))
        before[0] -= count
        assert before[0] <= AHEAD + 3 * MIB, "more is asked for than memory should hold"
        return count

    monkeypatch.setattr(Frozen, "ask", asking)
    monkeypatch.setattr(Frozen, "read_into", reading)
    stream, out, buffer = Tarball(taken), io.BytesIO(), bytearray(MIB)
    while count := stream.readinto(memoryview(buffer)):
        out.write(buffer[:count])
    assert not late
    assert asked == Counter({file.path: file.size for file in taken.files if file.size})
    out.seek(0)
    with tarfile.open(fileobj=out) as tar:
        assert {m.name: m.size for m in tar if m.isfile()} == {f"./{f.path}": f.size for f in taken.files}
    taken.close()
