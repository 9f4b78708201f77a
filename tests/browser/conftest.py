"""The standalone history page, served to a real Chromium."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

import hq_backups
from tests.conftest import require_service
from tests.testbed.process import LOOPBACK, free_port, short_directory, wait_until

ROOT = Path(hq_backups.__file__).parent.parent
CHROMIUM = Path("/usr/bin/chromium")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
USER, PASSWORD = "someone", "made-up-for-tests"
RUNS, ARTIFACTS = "/admin/hq_backups/backuprun/", "/admin/hq_backups/artifact/"
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
HOSTILE = (
    "<script>document.title='taken over'</script>\"'><img src=x onerror=\"document.title='taken over'\">"
)
LONG = "x" * 300

FILL = f"""
from datetime import timedelta
from hq_backups.engine.events import utc_now
from hq_backups.models import Artifact, BackupRun

now = utc_now()
hostile, long = {HOSTILE!r}, {LONG!r}
for host in ("pg0", (hostile + long)[:255]):
    for day in range(7):
        at = now - timedelta(days=day, hours=1)
        type = "weekly" if at.isoweekday() == 7 else "daily"
        bad = day == 0 and host != "pg0"
        run = f"{{at:%Y%m%d}}{{host}}"[:255]
        name = f"postgres_{{day}}_{{host}}_{{long}}"
        BackupRun.objects.create(
            run=run, verb="backup", store="postgres", type=type, env="demo", host=host, started_at=at, finished_at=at,
            status="failed" if bad else "warning" if day == 1 else "ok", error=hostile + long if bad else "",
            hint=hostile if bad else "", warnings=[hostile, long] if day == 1 else [], seconds=60 + day, size=day << 30,
            artifact=name, steps=[{{"at": "2026-11-22T00:00:02Z", "name": "copy", "message": hostile + long}}],
            facts={{hostile: long}},
        )
        if not bad:
            Artifact.objects.create(
                run=run, name=name, store="postgres", type=type, env="demo", host=host, taken_at=at, size=day << 30,
                gone_at=now if day > 3 else None, manifest={{"name": hostile, "long": long}}, sha256="a" * 64,
                locations=[{{"kind": "local", "path": "/b/" + name}}, {{"kind": "s3", "bucket": "b", "key": long}}],
            )
BackupRun.objects.create(
    run="deep", verb="verify", store="postgres", host="pg0", started_at=now, status="ok", seconds=75,
    facts={{"deep": True}},
)
"""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Serve the page on a history with hostile names, by hq-backups itself."""
    with short_directory() as home:
        variables = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
            "HQ_BACKUPS_DEPLOY_ENV": "demo",
            "HQ_BACKUPS_BACKUP_POSTGRES": "plain",
            "HQ_BACKUPS_BACKUP_HOST_NAME": "pg0",
            "HQ_BACKUPS_BACKUP_STATE_DIR": str(home / "state"),
            "DJANGO_SUPERUSER_PASSWORD": PASSWORD,
        }
        command = [sys.executable, "-m", "hq_backups.standalone"]
        made = ["createsuperuser", "--noinput", "--username", USER, "--email", "a@example.org"]
        subprocess.run([*command, *made], env=variables, check=True, capture_output=True)
        page_settings = variables | {"DJANGO_SETTINGS_MODULE": "hq_backups.standalone_page_settings"}
        fill = f"import django; django.setup()\n{FILL}"
        subprocess.run([sys.executable, "-c", fill], env=page_settings, check=True)
        where = f"{LOOPBACK}:{free_port()}"
        with (home / "server.log").open("w") as log:
            server = subprocess.Popen([*command, "runserver", where], env=variables, stdout=log, stderr=log)
        try:
            wait_until(lambda: answers(f"http://{where}/favicon.ico"), what="the history page")
            yield f"http://{where}"
        finally:
            server.terminate()
            server.wait(10)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1):  # noqa: S310 - our own server
            return True
    except OSError:
        return False


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Start Chromium once."""
    require_service("Chromium", CHROMIUM.exists(), f"{CHROMIUM} is missing (make testbed)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def logged_in(browser: Browser, address: str) -> Any:
    """Log in by the form, once, and return the cookies."""
    context = browser.new_context()
    page = context.new_page()
    page.goto(f"{address}/")
    page.fill("#id_username", USER)
    page.fill("#id_password", PASSWORD)
    page.click("input[type=submit]")
    page.wait_for_selector("#hqb-standing")
    state = context.storage_state()
    context.close()
    return state


@pytest.fixture(scope="module")
def pages(browser: Browser, address: str, logged_in: Any) -> list[str]:
    """Return the paths of the lists, of a failed run, of one with warnings, and of backups there and gone."""
    context = browser.new_context(storage_state=logged_in)
    page = context.new_page()
    found = [RUNS, ARTIFACTS]
    for query in (
        "status__exact=failed",
        "status__exact=warning",
        "gone_at__isempty=1",
        "gone_at__isempty=0",
    ):
        page.goto(f"{address}{RUNS if query.startswith('status') else ARTIFACTS}?{query}")
        link = page.locator("#result_list tbody th a").first.get_attribute("href")
        assert link is not None
        found.append(link.partition("?")[0])
    context.close()
    return found


class Visit:
    """A page, and what its console said."""

    def __init__(self, context: BrowserContext, address: str) -> None:
        self.context, self.address = context, address
        self.said: list[str] = []
        self.page: Page = context.new_page()
        self.page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.said.append(f"error: {error}"))

    def go(self, path: str) -> Page:
        self.page.goto(f"{self.address}{path}")
        return self.page


@pytest.fixture
def visit(browser: Browser, address: str, logged_in: Any) -> Iterator[Callable[..., Visit]]:
    """Return a function that opens a logged-in window."""
    contexts = []

    def visit(viewport: Any = DESKTOP, scheme: Any = "light") -> Visit:
        context = browser.new_context(viewport=viewport, color_scheme=scheme, storage_state=logged_in)
        contexts.append(context)
        return Visit(context, address)

    yield visit
    for context in contexts:
        context.close()
