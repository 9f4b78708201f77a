"""One list of everything that lies anywhere; ``latest`` is the newest good one, and never a guess."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hq_backups.engine import forecast
from hq_backups.engine.catalog import Entry, entries, merge, select
from hq_backups.engine.config import Config, StoreConfig
from hq_backups.engine.errors import BackupNotFound, CorruptBackup, NotEnoughSpace, PreflightFailed
from hq_backups.engine.events import Event, Events
from hq_backups.engine.repository.local import LocalRepository
from hq_backups.engine.requests import CatalogRequest, Selection
from hq_backups.engine.stores import open_store
from hq_backups.engine.stores.base import Prepared, Store
from tests.factories import manifest


@pytest.fixture
def store(tmp_path: Path) -> Store:
    settings = StoreConfig("postgres", "plain", tmp_path / "backups")
    settings.backup_dir.mkdir(mode=0o700)
    return open_store(Config("prod", "pg0", timezone="UTC", stores={"postgres": settings}), "postgres")


def silent() -> Events:
    return Events(lambda event: None)


def put(store: Store, day: int, content: bytes = b"content", **changes: Any) -> str:
    name = changes.pop("name", f"postgres_prod_daily_2026_11_{day:02}.tar.gz")
    run = f"202611{day:02}T000002Z-pg0-postgres"
    facts = {
        "run": run,
        "started_at": f"2026-11-{day:02}T00:00:02Z",
        "local_date": f"2026-11-{day:02}",
        **changes,
    }
    described = manifest(name, content, **facts)
    repository = LocalRepository(store.settings.backup_dir)
    repository.partial(described.run).write_bytes(content)
    repository.publish(described)
    return name


def pick(store: Store, name: str = "latest", **options: Any) -> Entry:
    return select(store, Selection("postgres", name, **options), silent())[0]


def test_the_list_is_newest_first_and_has_the_public_shape(store: Store) -> None:
    put(store, 20)
    put(store, 21)
    (store.settings.backup_dir / "s3_backup_status.txt").write_text("no backup")
    (store.settings.backup_dir / "postgres_prod_daily_2026_11_19.tar.gz").write_bytes(b"an old script's")
    listed = entries(store, CatalogRequest(), silent())
    assert [e.name[-9:-7] for e in listed if e.managed] == ["21", "20"]
    (old,) = [e for e in listed if not e.managed]
    assert (old.run, old.sha256, old.host) == (None, None, None)
    assert list(listed[0].to_plain()) == [
        "store", "mode", "type", "env", "host", "taken_at", "name", "size", "sha256", "managed", "verified_at", "run",
        "locations", "problem",
    ]  # fmt: skip


def test_latest_is_the_newest_good_one(store: Store) -> None:
    put(store, 20)
    damaged = put(store, 21)
    (store.settings.backup_dir / damaged).write_bytes(b"short")
    (store.settings.backup_dir / "postgres_prod_daily_2026_11_22.tar.gz").write_bytes(b"an old script's")
    assert pick(store).taken_at == "2026-11-20T00:00:02Z"


def test_latest_is_never_another_environments(store: Store) -> None:
    put(store, 20)
    put(store, 21, env="staging", name="postgres_staging_daily_2026_11_21.tar.gz")
    assert pick(store).env == "prod"


def test_latest_of_several_hosts_is_asked_for(store: Store) -> None:
    put(store, 20)
    put(store, 21, host="pg1")
    with pytest.raises(PreflightFailed, match="pg0, pg1"):
        pick(store)
    assert pick(store, host="pg0").host == "pg0"


def test_latest_of_a_rebuilt_server_is_found_whatever_its_name(store: Store) -> None:
    put(store, 20, host="the-dead-one")
    assert pick(store).host == "the-dead-one"


def test_no_latest_says_why_when_there_is_a_damaged_one(store: Store) -> None:
    with pytest.raises(BackupNotFound):
        pick(store)
    name = put(store, 20)
    (store.settings.backup_dir / name).write_bytes(b"short")
    with pytest.raises(BackupNotFound, match="5 bytes"):
        pick(store)


def test_a_backup_is_found_by_name_run_or_path(store: Store) -> None:
    name = put(store, 20)
    for wanted in (name, "20261120T000002Z-pg0-postgres", str(store.settings.backup_dir / name)):
        assert pick(store, wanted).name == name


def test_a_wrong_name_is_answered_with_near_ones(store: Store) -> None:
    name = put(store, 20)
    with pytest.raises(BackupNotFound, match=name):
        pick(store, "postgres_prod_daily_2026_11_02.tar.gz")


def test_a_damaged_one_asked_for_by_name_is_refused(store: Store) -> None:
    name = put(store, 20)
    (store.settings.backup_dir / name).write_bytes(b"short")
    with pytest.raises(CorruptBackup, match="5 bytes"):
        pick(store, name)


def entry(kind: str, **changes: Any) -> Entry:
    made = Entry(
        "postgres", "plain", "daily", "prod", "pg0", "2026-11-22T00:00:02Z", "n", 1, "a" * 64, True, None, "run",
        ({"kind": kind},),
    )  # fmt: skip
    return replace(made, **changes)


def test_one_artifact_in_two_places_is_one_entry() -> None:
    (one,) = merge([entry("local", verified_at="2026-11-22T05:00:00Z"), entry("s3")])
    assert [p["kind"] for p in one.locations] == ["local", "s3"]
    assert one.verified_at == "2026-11-22T05:00:00Z"


def test_a_damaged_copy_does_not_hide_the_good_one() -> None:
    for order in (
        [entry("local", problem="short"), entry("s3")],
        [entry("s3"), entry("local", problem="short")],
    ):
        merged = merge(order)
        assert sorted(str(e.problem) for e in merged) == ["None", "short"]


def test_runs_of_one_name_stay_apart() -> None:
    assert len(merge([entry("local"), entry("s3", run="other"), entry("s3", sha256="b" * 64)])) == 3


def test_two_runs_of_one_second_that_found_the_same_bytes_stay_apart() -> None:
    daily, weekly = (
        entry("local"),
        entry("local", name="postgres_prod_weekly_2026_11_22.tar.gz", type="weekly"),
    )
    assert {e.type for e in merge([daily, weekly])} == {"daily", "weekly"}


GIB = 1 << 30


def last(store: Store) -> None:
    put(store, 20, plain_size=4 * GIB)


@pytest.mark.parametrize(
    ("estimate", "refused"), [(GIB // 100, True), (GIB - 1, True), (GIB + 1, False), (9 * GIB, False)]
)
def test_a_store_that_lost_most_of_its_data_is_not_backed_up_unasked(
    store: Store, estimate: int, refused: bool
) -> None:
    last(store)
    prepared = Prepared(estimate, {})
    if refused:
        with pytest.raises(PreflightFailed) as caught:
            forecast.refuse_shrink(forecast.newest_good(store), prepared)
        assert "--accept-shrink" in caught.value.hint
    else:
        forecast.refuse_shrink(forecast.newest_good(store), prepared)


def test_a_small_or_first_store_may_be_any_size(store: Store) -> None:
    forecast.refuse_shrink(None, Prepared(0, {}))
    put(store, 20, plain_size=60 << 20)
    forecast.refuse_shrink(forecast.newest_good(store), Prepared(0, {}))


@pytest.mark.parametrize(("free", "says"), [(GIB // 50, "refused"), (GIB // 4, "warned"), (GIB, "")])
def test_a_first_backup_fails_only_where_it_is_hopeless(
    store: Store, monkeypatch: pytest.MonkeyPatch, free: int, says: str
) -> None:
    monkeypatch.setattr("hq_backups.engine.space.free_bytes", lambda path: free)
    told: list[Event] = []
    repository = LocalRepository(store.settings.backup_dir)

    def check() -> None:
        forecast.require_space(repository, None, Prepared(GIB, {}), Events(told.append))

    if says == "refused":
        with pytest.raises(NotEnoughSpace):
            check()
    else:
        check()
        assert bool(told) == (says == "warned")


def test_a_later_backup_is_judged_by_the_last_ones_ratio(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, 20, b"x" * 100, plain_size=400)
    repository, newest = LocalRepository(store.settings.backup_dir), forecast.newest_good(store)
    monkeypatch.setattr("hq_backups.engine.space.free_bytes", lambda path: GIB // 4)
    forecast.require_space(repository, newest, Prepared(GIB // 2, {}), silent())
    with pytest.raises(NotEnoughSpace):
        forecast.require_space(repository, newest, Prepared(GIB, {}), silent())


def test_bare_directories_are_listed_and_half_ones_are_bad(store: Store) -> None:
    whole = store.settings.backup_dir / "postgres_prod_daily_2018_03_14"
    half = store.settings.backup_dir / "postgres_prod_daily_2018_03_15"
    (store.settings.backup_dir / "extracted_backup_2019_08_01").mkdir()
    for directory in (whole, half):
        (directory / "global").mkdir(parents=True)
        (directory / "PG_VERSION").write_text("9.6\n")
    (whole / "global" / "pg_control").write_bytes(bytes(8192))
    listed = {e.name: e for e in entries(store, CatalogRequest(), silent())}
    assert set(listed) == {whole.name, half.name}
    assert (listed[whole.name].size, listed[whole.name].problem) == (8196, None)
    assert listed[whole.name].locations == ({"kind": "local", "path": str(whole)},)
    assert "global/pg_control" in str(listed[half.name].problem)
    for wanted in (half.name, str(half)):
        with pytest.raises(CorruptBackup, match="killed"):
            pick(store, wanted)


def test_a_path_may_be_anywhere_and_called_anything(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "postgres_data_before_restore.tar.gz"
    with pytest.raises(BackupNotFound):
        pick(store, str(path))
    path.write_bytes(b"x")
    found = pick(store, str(path))
    assert (found.type, found.env, found.host, found.mode, found.managed) == (
        "manual",
        None,
        None,
        "plain",
        False,
    )
    couch = tmp_path / "couchdb_daily_2019_01_01.tar.gz"
    couch.write_bytes(b"x")
    with pytest.raises(BackupNotFound, match="of couch"):
        pick(store, str(couch))
    with pytest.raises(BackupNotFound):
        pick(store, "/dev/null")
    with pytest.raises(CorruptBackup):
        pick(store, "/")


def test_an_old_script_s_file_is_never_the_latest(store: Store) -> None:
    name = "postgres_prod_daily_2017_12_24.tar.gz"
    (store.settings.backup_dir / name).write_bytes(b"x")
    with pytest.raises(BackupNotFound):
        pick(store)
    assert pick(store, name).name == name
