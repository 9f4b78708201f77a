"""Publishing can be killed anywhere: no file is ever shown with another run's manifest, and nothing good is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from hq_backups.engine import names
from hq_backups.engine.errors import PreflightFailed
from hq_backups.engine.events import Event, Events
from hq_backups.engine.manifest import Manifest
from hq_backups.engine.repository.local import LocalArtifact, LocalRepository
from tests.factories import manifest
from tests.killing import every_step

NAME = "postgres_prod_daily_2026_11_22.tar.gz"
RUN = "20261122T000002Z-pg0-postgres"
LATER = "20261122T120000Z-pg0-postgres"


@pytest.fixture
def repository(tmp_path: Path) -> LocalRepository:
    directory = tmp_path / "backups"
    directory.mkdir(mode=0o700)
    return LocalRepository(directory)


def silent() -> Events:
    return Events(lambda event: None)


def put(repository: LocalRepository, content: bytes, **changes: str) -> Manifest:
    described = manifest(changes.pop("name", NAME), content, **changes)
    repository.partial(described.run).write_bytes(content)
    repository.publish(described)
    return described


def only(repository: LocalRepository) -> LocalArtifact:
    (found,) = repository.found()
    return found


def clear(directory: Path) -> None:
    for path in directory.iterdir():
        path.unlink()


def test_a_published_artifact_lies_beside_its_manifest_as_a_dot_file(repository: LocalRepository) -> None:
    put(repository, b"good")
    assert sorted(p.name for p in repository.directory.iterdir()) == [f".{NAME}.json", NAME]
    found = only(repository)
    assert found.problem is None
    assert found.manifest is not None
    assert found.manifest.run == RUN
    assert (repository.directory / f".{NAME}.json").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("later", [b"the later one", b"other"], ids=["other size", "same size"])
def test_a_publish_killed_anywhere_shows_one_run_whole(repository: LocalRepository, later: bytes) -> None:
    before = b"early"

    def prepare() -> None:
        clear(repository.directory)
        put(repository, before)

    def publish() -> None:
        put(repository, later, run=LATER)

    seen = set()
    for step in every_step(publish, prepare):
        for moment in ("read by another process", "after recovery"):
            found = only(repository)
            content = found.path.read_bytes()
            assert found.problem is None, (step, moment)
            assert found.manifest is not None, (step, moment)
            assert content in (before, later), (step, moment)
            assert found.manifest.run == (RUN if content == before else LATER), (step, moment)
            repository.recover(silent())
        seen.add(content)
        # Recovered: nothing but the artifact and its manifest is left, and a run after it works.
        assert sorted(p.name for p in repository.directory.iterdir()) == [f".{NAME}.json", NAME], step
        put(repository, b"next run", run="20261123T000000Z-pg0-postgres")
        assert only(repository).path.read_bytes() == b"next run"
    assert seen == {before, later}, "kills before and after the artifact's rename"


def test_a_recovery_can_itself_be_killed(repository: LocalRepository) -> None:
    def prepare() -> None:
        clear(repository.directory)
        put(repository, b"early")
        described = manifest(NAME, b"later", run=LATER)
        repository.partial(LATER).write_bytes(b"later")
        (repository.directory / names.pending_name(LATER)).write_bytes(described.to_json())
        (repository.directory / ".dead.partial").write_bytes(b"half")

    for step in every_step(lambda: repository.recover(silent()), prepare):
        found = only(repository)
        assert found.manifest is not None, step
        assert found.problem is None, step
        assert found.path.read_bytes() == (b"early" if found.manifest.run == RUN else b"later")
    repository.recover(silent())
    assert only(repository).path.read_bytes() == b"later"


def test_what_a_dead_run_left_is_removed(repository: LocalRepository) -> None:
    put(repository, b"good")
    (repository.directory / ".x.partial").write_bytes(b"half")
    (repository.directory / ".y.pending.json").write_bytes(b"{")
    (repository.directory / ".z.json.tmp").write_bytes(b"{")
    repository.recover(silent())
    assert sorted(p.name for p in repository.directory.iterdir()) == [f".{NAME}.json", NAME]


def test_a_partial_file_is_no_artifact(repository: LocalRepository) -> None:
    repository.partial(RUN).write_bytes(b"half")
    assert list(repository.found()) == []


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda d: (d / NAME).write_bytes(b"goo"), "3 bytes"),
        (lambda d: (d / f".{NAME}.json").write_bytes(b"{"), "not JSON"),
        (
            lambda d: (d / f".{NAME}.json").write_bytes(manifest("other.tar.gz", b"good").to_json()),
            "other.tar.gz",
        ),
    ],
)
def test_a_damaged_artifact_or_manifest_is_shown_with_its_problem(repository, damage, says) -> None:
    put(repository, b"good")
    damage(repository.directory)
    assert says in (only(repository).problem or "")


def test_a_manifest_of_a_newer_schema_is_listed_with_what_to_do(repository: LocalRepository) -> None:
    put(repository, b"good")
    path = repository.directory / f".{NAME}.json"
    path.write_bytes(path.read_bytes().replace(b'"schema": 1', b'"schema": 2'))
    assert "newer hq_backups" in (only(repository).problem or "")


def test_a_link_is_no_artifact(repository: LocalRepository) -> None:
    (repository.directory / NAME).symlink_to("/etc/passwd")
    assert list(repository.found()) == []


def test_a_new_directory_is_private_and_a_loose_one_is_warned_about(tmp_path: Path) -> None:
    told: list[Event] = []
    LocalRepository(tmp_path / "a" / "b").prepare(Events(told.append))
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700
    assert told == []
    (tmp_path / "loose").mkdir()
    (tmp_path / "loose").chmod(0o755)
    LocalRepository(tmp_path / "loose").prepare(Events(told.append))
    assert [e.data["code"] for e in told] == ["directory-mode"]
    assert (tmp_path / "loose").stat().st_mode & 0o777 == 0o755


def test_a_directory_that_cannot_be_written_fails_the_preflight_with_the_command_to_type(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(PreflightFailed) as caught:
        LocalRepository(tmp_path / "file" / "backups").prepare(silent())
    assert "install -d -m 700" in caught.value.hint


def test_verified_is_remembered_only_for_the_same_contents(repository: LocalRepository) -> None:
    described = put(repository, b"good")
    repository.record_verified(NAME, described.sha256, "2026-11-22T10:00:00Z", deep=True)
    assert only(repository).verified_at == "2026-11-22T10:00:00Z"
    put(repository, b"new!", run=LATER)
    assert only(repository).verified_at is None


def test_removing_takes_everything_that_belongs_to_it(repository: LocalRepository) -> None:
    described = put(repository, b"good")
    repository.record_verified(NAME, described.sha256, "2026-11-22T10:00:00Z", deep=True)
    repository.remove(NAME)
    assert list(repository.directory.iterdir()) == []


def test_a_removal_killed_anywhere_leaves_nothing_behind_after_the_next_run(
    repository: LocalRepository,
) -> None:
    other = "postgres_prod_weekly_2026_11_22.tar.gz"

    def prepare() -> None:
        clear(repository.directory)
        put(repository, b"kept", name=other)
        described = put(repository, b"good")
        repository.record_verified(NAME, described.sha256, "2026-11-22T10:00:00Z", deep=True)

    for step in every_step(lambda: repository.remove(NAME), prepare):
        repository.recover(silent())
        left = {p.name for p in repository.directory.iterdir()}
        assert left in (
            {other, f".{other}.json"},
            {other, f".{other}.json", NAME, f".{NAME}.json", f".{NAME}.verified.json"},
        ), step


def test_a_small_file_whose_writing_is_cancelled_leaves_nothing(
    repository: LocalRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cancelled(fd: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", cancelled)
    with pytest.raises(KeyboardInterrupt):
        repository.record_upload(RUN, {"key": "k"})
    assert list(repository.directory.iterdir()) == []


def test_uploads_are_recorded_until_they_are_over(repository: LocalRepository) -> None:
    repository.record_upload(RUN, {"bucket": "b", "key": "k"})
    assert list(repository.recorded_uploads()) == [(RUN, {"bucket": "b", "key": "k"})]
    (repository.directory / ".bad.upload.json").write_bytes(b"[")
    assert len(list(repository.recorded_uploads())) == 1
    repository.forget_upload(RUN)
    assert list(repository.recorded_uploads()) == []
