"""Health JSON, metrics and the check for django-health-check: true, shut to strangers, and alive with dead parts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth.models import Permission, User
from django.db import connections
from django.test import Client, RequestFactory
from health_check.exceptions import ServiceUnavailable
from prometheus_client import CollectorRegistry, generate_latest

from hq_backups import metrics, views
from hq_backups.engine.events import utc_now
from hq_backups.healthcheck import Backups
from hq_backups.metrics import BackupCollector
from hq_backups.models import Artifact, BackupRun

TOKEN = "made-up-token-ü"
SECRET = "s3cr3t-made-up"
SETTINGS = {
    "deploy_env": "demo",
    "backup_postgres": "plain",
    "timezone": "UTC",
    "backup_host_name": "pg0",
    "backup_hosts": {"pg0": ["postgres"]},
    "backup_health_token": TOKEN,
    "AMAZON_S3_SECRET_KEY": SECRET,
    "check_s3_backups_email": "ops@example.org",
}
HEADER = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture(autouse=True)
def configured(settings: Any, tmp_path: Path) -> None:
    settings.HQ_BACKUPS = SETTINGS | {"backup_state_dir": str(tmp_path)}
    settings.EMAIL_BACKEND = "django.core.mail.backends.smtp.EmailBackend"


def backed_up(at: datetime, type: str = "daily") -> None:
    run = f"{at:%Y%m%dT%H%M%SZ}"
    common = {"run": run, "store": "postgres", "type": type, "host": "pg0", "size": 1000}
    BackupRun.objects.create(**common, verb="backup", started_at=at, status="ok", seconds=60.5)
    Artifact.objects.create(**common, name=f"postgres_{run}.tar.gz", taken_at=at, verified_at=at)


def all_is_well() -> None:
    now = utc_now()
    backed_up(now - timedelta(minutes=30))
    sunday = now - timedelta(days=now.isoweekday() % 7)
    backed_up(min(sunday.replace(hour=0, minute=0, second=1), now - timedelta(hours=1)), "weekly")


@pytest.fixture
def dead_database(tmp_path: Path) -> Iterator[None]:
    """Point Django at a file that is no database."""
    broken = tmp_path / "broken.sqlite3"
    broken.write_text("this is not a database, " * 100)
    old = connections["default"]
    settings = dict(old.settings_dict) | {"NAME": str(broken)}
    known = connections.settings["default"]
    connections.settings["default"] = settings
    connections["default"] = connections.create_connection("default")
    try:
        yield
    finally:
        connections["default"].close()
        connections.settings["default"] = known
        connections["default"] = old


def scrape() -> dict[str, float]:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(BackupCollector())
    lines = generate_latest(registry).decode().splitlines()
    return {k: float(v) for k, _, v in (line.rpartition(" ") for line in lines if not line.startswith("#"))}


@pytest.mark.django_db
class TestAlive:
    def test_all_well_is_200(self, client: Client) -> None:
        all_is_well()
        response = client.get("/backups/health/", headers=HEADER)
        found = response.json()
        assert (response.status_code, found["status"], found["database"]) == (200, "ok", True), found
        (store,) = found["stores"]
        assert (store["store"], store["host"], store["state"]) == ("postgres", "pg0", "ok")
        assert 1700 < store["last_good"]["daily"]["age_seconds"] < 2000
        assert found["generated_at"].endswith("Z")
        assert "no-cache" in response["Cache-Control"] or "no-store" in response["Cache-Control"]

    def test_a_failed_run_is_503_with_its_problem(self, client: Client) -> None:
        all_is_well()
        BackupRun.objects.create(
            run="f", verb="backup", store="postgres", type="daily", host="pg0", started_at=utc_now(),
            finished_at=utc_now(), status="failed", exit_code=1, error="the server is away",
        )  # fmt: skip
        response = client.get("/backups/health/", headers=HEADER)
        found = response.json()
        assert (response.status_code, found["status"]) == (503, "failing")
        assert found["stores"][0]["last_failed"] == "f"
        assert any("the server is away" in each.get("cause", "") for each in found["problems"])

    def test_no_backup_at_all_is_503(self, client: Client) -> None:
        response = client.get("/backups/health/", headers=HEADER)
        assert response.status_code == 503
        assert "no good backup of postgres is recorded" in [p["title"] for p in response.json()["problems"]]

    @pytest.mark.parametrize("path", ["/backups/health/", "/backups/metrics/"])
    @pytest.mark.parametrize(
        "headers",
        [{}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}, {"Authorization": "Bearer "}],
    )
    def test_strangers_learn_nothing(self, client: Client, path: str, headers: dict[str, str]) -> None:
        all_is_well()
        response = client.get(path, headers=headers)
        assert response.status_code == 403
        assert "postgres" not in response.content.decode()

    def test_without_a_token_in_the_settings_none_fits(self, client: Client, settings: Any) -> None:
        for none in (None, ""):
            settings.HQ_BACKUPS = settings.HQ_BACKUPS | {"backup_health_token": none}
            for sent in ("Bearer ", "Bearer None", "Bearer"):
                assert client.get("/backups/health/", headers={"Authorization": sent}).status_code == 403

    def test_staff_who_may_view_runs_ask_without_a_token(self, client: Client) -> None:
        all_is_well()
        user = User.objects.create_user("someone", password="x")
        client.force_login(user)
        permission = Permission.objects.get(codename="view_backuprun")
        for staff, permissions, code in (
            (False, [permission], 403),
            (True, [], 403),
            (True, [permission], 200),
        ):
            user.is_staff = staff
            user.save()
            user.user_permissions.set(permissions)
            assert client.get("/backups/health/").status_code == code

    def test_secrets_are_in_no_answer(self, client: Client) -> None:
        for path in ("/backups/health/", "/backups/metrics/"):
            text = client.get(path, headers=HEADER).content.decode()
            assert SECRET not in text
            assert TOKEN not in text
            assert json.dumps(TOKEN)[1:-1] not in text

    def test_only_reading_is_answered(self, client: Client) -> None:
        assert client.post("/backups/health/", headers=HEADER).status_code == 405

    def test_metrics_tell_age_size_duration_and_problems(self, client: Client) -> None:
        all_is_well()
        text = client.get("/backups/metrics/", headers=HEADER).content.decode()
        assert "# TYPE hq_backups_last_success_age_seconds gauge" in text
        found = scrape()
        daily = '{host="pg0",store="postgres",type="daily"}'
        assert 1700 < found[f"hq_backups_last_success_age_seconds{daily}"] < 2000
        assert found[f"hq_backups_last_success_size_bytes{daily}"] == 1000
        assert found[f"hq_backups_last_success_duration_seconds{daily}"] == 60.5
        assert found[f"hq_backups_late{daily}"] == 0
        assert found['hq_backups_problems{severity="error",store="postgres"}'] == 0
        assert found["hq_backups_up"] == 1
        BackupRun.objects.create(
            run="f", verb="backup", store="postgres", type="daily", host="pg0", started_at=utc_now(),
            finished_at=utc_now(), status="failed", exit_code=1, error="away",
        )  # fmt: skip
        found = scrape()
        assert found['hq_backups_problems{severity="error",store="postgres"}'] == 1
        assert found['hq_backups_last_run_failed{host="pg0",store="postgres"}'] == 1

    def test_a_host_name_may_be_anything_in_metrics(self, settings: Any) -> None:
        host = 'x"}\n\\ü'
        BackupRun.objects.create(
            run="r", verb="backup", store="couch", host=host, started_at=utc_now(), status="ok"
        )
        assert any('x\\"}\\n\\\\ü' in name for name in scrape())

    def test_the_check_of_django_health_check_raises_what_is_wrong(self) -> None:
        with pytest.raises(ServiceUnavailable, match="no good backup of postgres is recorded"):
            Backups().run()
        with pytest.raises(ServiceUnavailable):
            Backups(store="postgres").run()

    def test_it_is_silent_about_other_stores(self) -> None:
        Backups(store="couch").run()


class TestADeadDatabase:
    pytestmark = pytest.mark.usefixtures("dead_database")

    def test_is_said_to_who_has_the_token(self, django_db_blocker: Any, rf: RequestFactory) -> None:
        with django_db_blocker.unblock():
            response = views.health(rf.get("/", headers=HEADER))
        found = json.loads(response.content)
        assert (response.status_code, found["status"], found["database"]) == (503, "failing", False)
        assert "the database with the history cannot be read" in [each["title"] for each in found["problems"]]

    def test_is_all_that_a_stranger_learns(self, django_db_blocker: Any, client: Client) -> None:
        client.cookies["sessionid"] = "made-up-session-key"
        with django_db_blocker.unblock():
            response = client.get("/backups/health/")
        assert response.status_code == 503
        found = response.json()
        assert [each["title"] for each in found["problems"]] == [
            "the database with the history cannot be read"
        ]
        assert found["stores"] == []

    def test_is_a_metric_and_no_exception(self, django_db_blocker: Any) -> None:
        with django_db_blocker.unblock():
            found = scrape()
        assert found["hq_backups_up"] == 0
        assert found['hq_backups_problems{severity="error",store=""}'] >= 1

    def test_fails_the_check(self, django_db_blocker: Any) -> None:
        with django_db_blocker.unblock(), pytest.raises(ServiceUnavailable, match="cannot be read"):
            Backups().run()


def test_a_scrape_survives_whatever_goes_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("something that nobody thought of")

    monkeypatch.setattr(metrics, "report", broken)
    assert scrape() == {"hq_backups_up": 0}


@pytest.mark.django_db(transaction=True)
def test_the_page_of_django_health_check_shows_it(client: Client) -> None:
    bad = client.get("/ht/", headers={"Accept": "application/json"})
    assert bad.status_code == 500
    assert "no good backup of postgres is recorded" in bad.content.decode()
    all_is_well()
    good = client.get("/ht/", headers={"Accept": "application/json"})
    assert (good.status_code, list(good.json().values())) == (200, ["OK"])
