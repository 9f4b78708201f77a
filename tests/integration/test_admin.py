"""The history page shows hostile names harmlessly, to who may view them, and changes nothing."""

from __future__ import annotations

import html
import re
import shlex
from datetime import UTC, datetime
from typing import Any

import pytest
from django.contrib.auth.models import Permission, User
from django.test import Client
from django.urls import reverse

from hq_backups import detached
from hq_backups.models import Artifact, BackupRun

pytestmark = pytest.mark.django_db

HOSTILE = "<script>alert('x')</script>\"'><img src=x onerror=alert(1)>"
AT = datetime(2026, 11, 22, 0, 0, 2, tzinfo=UTC)
PAGES = ("backuprun", "artifact")


def make(count: int = 1) -> None:
    for number in range(count):
        BackupRun.objects.create(
            run=f"{number}{HOSTILE}",
            verb=HOSTILE[:32],
            store="postgres",
            type="daily",
            host=HOSTILE,
            started_at=AT,
            status="failed",
            error=HOSTILE,
            hint=HOSTILE,
            warnings=[HOSTILE],
            facts={HOSTILE: HOSTILE},
            size=5 << 30,
        )
        Artifact.objects.create(
            run=f"{number}",
            name=f"{number}{HOSTILE}",
            store=HOSTILE[:32],
            type="daily",
            host=HOSTILE,
            taken_at=AT,
            size=5 << 30,
            manifest={HOSTILE: [HOSTILE]},
            locations=[{"kind": HOSTILE, "path": HOSTILE}],
            problem=HOSTILE,
        )


def login(client: Client, **flags: Any) -> User:
    user = User.objects.create_user("someone", password="x", is_staff=True, **flags)
    client.force_login(user)
    return user


@pytest.mark.parametrize("page", PAGES)
def test_names_from_outside_are_escaped_everywhere(client: Client, page: str) -> None:
    make()
    login(client, is_superuser=True)
    model = {"backuprun": BackupRun, "artifact": Artifact}[page]
    addresses = [
        reverse(f"admin:hq_backups_{page}_changelist"),
        reverse(f"admin:hq_backups_{page}_change", args=[model.objects.get().pk]),  # type: ignore[attr-defined]
        reverse(f"admin:hq_backups_{page}_changelist") + "?q=" + HOSTILE,
    ]
    for address in addresses:
        response = client.get(address)
        assert response.status_code == 200
        text = response.content.decode()
        assert "<script>alert(" not in text
        assert "<img src=x" not in text
    assert "&lt;script&gt;alert(" in client.get(addresses[1]).content.decode()
    listed = client.get(addresses[0]).content.decode()
    assert "&lt;script&gt;alert(" in listed
    assert "5.0 GiB" in listed


@pytest.mark.parametrize("page", PAGES)
def test_nobody_adds_changes_or_deletes(client: Client, page: str) -> None:
    make()
    login(client, is_superuser=True)
    pk = {"backuprun": BackupRun, "artifact": Artifact}[page].objects.get().pk  # type: ignore[attr-defined]
    assert client.get(reverse(f"admin:hq_backups_{page}_add")).status_code == 403
    assert client.post(reverse(f"admin:hq_backups_{page}_change", args=[pk]), {"run": "x"}).status_code == 403
    assert (
        client.post(reverse(f"admin:hq_backups_{page}_delete", args=[pk]), {"post": "yes"}).status_code == 403
    )
    data = {"action": "delete_selected", "_selected_action": [pk], "post": "yes"}
    client.post(reverse(f"admin:hq_backups_{page}_changelist"), data)
    assert (BackupRun.objects.count(), Artifact.objects.count()) == (1, 1)


@pytest.mark.parametrize("page", PAGES)
def test_staff_look_when_they_may_view(client: Client, page: str) -> None:
    make()
    address = reverse(f"admin:hq_backups_{page}_changelist")
    model = {"backuprun": BackupRun, "artifact": Artifact}[page]
    one = reverse(f"admin:hq_backups_{page}_change", args=[model.objects.get().pk])  # type: ignore[attr-defined]
    assert client.get(address).status_code == 302
    user = login(client)
    assert [client.get(each).status_code for each in (address, one)] == [403, 403]
    assert "hq_backups" not in client.get(reverse("admin:index")).content.decode()
    for other in ("add", "change", "delete"):
        user.user_permissions.add(Permission.objects.get(codename=f"{other}_{page}"))
    assert client.get(reverse(f"admin:hq_backups_{page}_add")).status_code == 403
    user.user_permissions.set([Permission.objects.get(codename=f"view_{page}")])
    assert [client.get(each).status_code for each in (address, one)] == [200, 200]


def test_who_may_not_view_artifacts_sees_none_of_them_in_a_run(client: Client) -> None:
    run = BackupRun.objects.create(
        run="r", verb="backup", store="postgres", started_at=AT, artifact="a.tar.gz"
    )
    Artifact.objects.create(
        run="r", name="a.tar.gz", store="postgres", taken_at=AT, manifest={"inner": "thing"}
    )
    user = login(client)
    user.user_permissions.set([Permission.objects.get(codename="view_backuprun")])
    address = reverse("admin:hq_backups_backuprun_change", args=[run.pk])
    text = client.get(address).content.decode()
    assert "a.tar.gz" in text
    assert "inner" not in text
    assert "/artifact/" not in text


def test_a_runs_page_tells_steps_warnings_error_and_the_command_that_restores_it(client: Client) -> None:
    run = BackupRun.objects.create(
        run="20261122T000002Z-pg0-postgres",
        verb="backup",
        store="postgres",
        type="daily",
        host="pg0",
        started_at=AT,
        status="failed",
        exit_code=7,
        error="the upload was refused",
        hint="upload_backups postgres",
        warnings=["old cron jobs are installed"],
        artifact="it's a name.tar.gz",
        steps=[{"at": "2026-11-22T00:00:02Z", "name": "preflight", "message": "space"}, "no step", None],
        facts={"blocks": 12},
    )
    artifact = Artifact.objects.create(
        run=run.run,
        name=run.artifact,
        store="postgres",
        host="pg0",
        env="other env",
        taken_at=AT,
        manifest={"schema": 1, "source": {"rows": 5}},
        locations=[{"kind": "s3", "bucket": "b", "key": "k", "version_id": "v7"}],
    )
    login(client, is_superuser=True)
    address = reverse("admin:hq_backups_backuprun_change", args=[run.pk])
    text = html.unescape(client.get(address).content.decode())
    for words in (
        "the upload was refused", "upload_backups postgres", "old cron jobs are installed", "preflight",
        '"blocks": 12', '"rows": 5', "s3://b/k (version v7)", "(exit 7)",
    ):  # fmt: skip
        assert words in text
    (command,) = re.findall(r"<pre[^>]*>(commcare-cloud [^<]*)</pre>", text)
    assert shlex.split(command) == [
        "commcare-cloud", "testing", "django-manage", "restore_backup", "postgres", "--source", "s3",
        "--host", "pg0", "--from-env", "other env", "it's a name.tar.gz",
    ]  # fmt: skip
    artifact.gone_at = AT
    artifact.save()
    gone = html.unescape(client.get(address).content.decode())
    assert "commcare-cloud" not in gone
    assert "It cannot be restored" in gone


def test_what_is_gone_is_marked_in_the_list(client: Client) -> None:
    Artifact.objects.create(name="old.tar.gz", store="postgres", taken_at=AT, gone_at=AT)
    login(client, is_superuser=True)
    address = reverse("admin:hq_backups_artifact_changelist")
    assert re.search(r'hqb-quiet">.*gone</span>', client.get(address).content.decode())
    for state, found in (("gone", 1), ("there", 0)):
        assert client.get(f"{address}?state={state}").context["cl"].result_count == found


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("store=postgres", 1), ("store=couch", 0), ("type=daily", 1), ("status__exact=failed", 1),
        ("status__exact=ok", 0), ("verb=backup", 0), ("host=nobody", 0), ("q=alert", 1), ("q=nothing", 0),
        ("started_at__year=2026", 1), ("started_at__year=2026&started_at__month=11", 1),
        ("started_at__year=2026&started_at__month=11&started_at__day=22", 1), ("started_at__year=2025", 0),
    ],
)  # fmt: skip
def test_the_list_is_narrowed(client: Client, query: str, found: int) -> None:
    make()
    login(client, is_superuser=True)
    response = client.get(f"{reverse('admin:hq_backups_backuprun_changelist')}?{query}")
    assert response.status_code == 200
    assert response.context["cl"].result_count == found


def test_dates_lead_from_years_to_days(client: Client) -> None:
    for at in (datetime(2024, 12, 31, 23, tzinfo=UTC), datetime(2026, 1, 2, tzinfo=UTC)):
        BackupRun.objects.create(run=str(at), verb="backup", store="postgres", started_at=at)
    login(client, is_superuser=True)
    address = reverse("admin:hq_backups_backuprun_changelist")

    def links(query: str = "") -> list[str]:
        text = html.unescape(client.get(address + query).content.decode())
        part = text[text.index('class="toplinks"') : text.index('id="changelist-form"')]
        return [link for link in re.findall(r'href="(\?[^"]*)"', part) if link != "?"]

    assert links() == ["?started_at__year=2024", "?started_at__year=2025", "?started_at__year=2026"]
    assert links("?started_at__year=2024") == ["?started_at__month=12&started_at__year=2024"]
    days = links("?started_at__year=2026&started_at__month=1")
    assert days[-1] == "?started_at__day=2&started_at__month=1&started_at__year=2026"


def test_only_superusers_have_a_backup_verified(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(detached, "start", lambda resolved, words: started.append(list(words)))
    there = Artifact.objects.create(
        name="-x's.tar.gz", store="postgres", taken_at=AT, locations=[{"kind": "s3", "bucket": "b"}]
    )
    gone = Artifact.objects.create(name="gone.tar.gz", store="postgres", taken_at=AT, gone_at=AT)
    far = Artifact.objects.create(
        name="far.tar.gz", store="couch", host="c9", taken_at=AT, locations=[{"kind": "local", "path": "/b"}]
    )
    address = reverse("admin:hq_backups_artifact_changelist")
    data = {"action": "verify_now", "_selected_action": [each.pk for each in (there, gone, far)]}
    user = login(client)
    user.user_permissions.set([Permission.objects.get(codename="view_artifact")])
    assert "verify_now" not in client.get(address).content.decode()
    client.post(address, data)
    assert started == []
    user.is_superuser = True
    user.save()
    assert "verify_now" in client.get(address).content.decode()
    said = html.unescape(client.post(address, data, follow=True).content.decode())
    assert started == [["verify_backup", "--store", "postgres", "--source", "s3", "--", "-x's.tar.gz"]]
    assert "A process on" in said
    assert "verifies -x's.tar.gz" in said
    assert "Not verified: gone.tar.gz (it is gone)" in said
    assert "Not verified: far.tar.gz (its only copy lies on c9" in said
    assert "verify_backup --store couch --host c9 far.tar.gz" in said


def test_nothing_restores_from_the_web(client: Client) -> None:
    make()
    login(client, is_superuser=True)
    for page in PAGES:
        text = client.get(reverse(f"admin:hq_backups_{page}_changelist")).content.decode()
        assert set(re.findall(r'<option value="(\w+)"', text)) <= {"verify_now"}


@pytest.mark.parametrize("page", PAGES)
def test_a_damaged_row_breaks_no_page(client: Client, page: str) -> None:
    junk: list[Any] = ["text", 5, None, [None, 5, ["x"]], {"kind": None}, {"a": {"b": []}}]
    login(client, is_superuser=True)
    for number, value in enumerate(junk):
        run = BackupRun.objects.create(
            run=f"r{number}", verb="backup", store="what", started_at=AT, status="odd", artifact="a",
            warnings=value or [], facts=value or {}, steps=value or [],
        )  # fmt: skip
        artifact = Artifact.objects.create(
            run=run.run, name="a", store="what", taken_at=AT, manifest=value or {}, locations=value or []
        )
        pk = {"backuprun": run, "artifact": artifact}[page].pk
        assert client.get(reverse(f"admin:hq_backups_{page}_change", args=[pk])).status_code == 200
    assert client.get(reverse(f"admin:hq_backups_{page}_changelist")).status_code == 200
