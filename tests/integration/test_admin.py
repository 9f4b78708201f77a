"""The history page shows hostile names harmlessly, to superusers only, and changes nothing."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from django.contrib.auth.models import Permission, User
from django.test import Client
from django.urls import reverse

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
def test_only_superusers_look(client: Client, page: str) -> None:
    make()
    address = reverse(f"admin:hq_backups_{page}_changelist")
    assert client.get(address).status_code == 302
    user = login(client)
    user.user_permissions.set(Permission.objects.filter(content_type__app_label="hq_backups"))
    assert client.get(address).status_code == 403
    assert "hq_backups" not in client.get(reverse("admin:index")).content.decode()


@pytest.mark.parametrize("page", PAGES)
def test_a_long_list_takes_no_more_queries_than_a_short_one(
    client: Client, page: str, django_assert_num_queries: Any
) -> None:
    make(2)
    login(client, is_superuser=True)
    address = reverse(f"admin:hq_backups_{page}_changelist")
    with django_assert_num_queries(11, exact=False) as short:
        client.get(address)
    make_more = [BackupRun(run=f"more{n}", verb="v", store="s", started_at=AT) for n in range(45)]
    BackupRun.objects.bulk_create(make_more)
    Artifact.objects.bulk_create([Artifact(name=f"more{n}", store="s", taken_at=AT) for n in range(45)])
    with django_assert_num_queries(len(short)):
        client.get(address)
