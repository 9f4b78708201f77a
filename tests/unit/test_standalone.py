"""``hq-backups`` on a host without HQ: settings, state, help, exit codes."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import environ
import pytest

import hq_backups
from hq_backups import identity, standalone
from hq_backups.engine.errors import ConfigurationError

Run = Callable[..., "subprocess.CompletedProcess[str]"]
ROOT = Path(hq_backups.__file__).parent.parent


@pytest.fixture
def variables(tmp_path: Path) -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "DJANGO_SETTINGS_MODULE": "somebody.elses",
        "HQ_BACKUPS_DEPLOY_ENV": "demo",
        "HQ_BACKUPS_BACKUP_POSTGRES": "plain",
        "HQ_BACKUPS_BACKUP_STATE_DIR": str(tmp_path / "state"),
        "HQ_BACKUPS_POSTGRESQL_BACKUP_DIR": str(tmp_path / "backups"),
        "HQ_BACKUPS_POSTGRESQL_DATA_DIR": str(tmp_path / "data"),
        "HQ_BACKUPS_POSTGRESQL_BACKUP_OS_USER": identity.me(),
    }


@pytest.fixture
def run(variables: dict[str, str], tmp_path: Path) -> Run:
    def run(
        *words: str, program: str = "hq_backups.standalone", **more: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", program, *words],
            env={**variables, **more},
            cwd=tmp_path,
            text=True,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=60,
            check=False,
        )

    return run


def test_help_lists_every_command_in_one_line(run: Run) -> None:
    done = run("--help")
    assert done.returncode == 0
    for verb in (*standalone.commands(), "createsuperuser", "runserver"):
        (line,) = [line for line in done.stdout.splitlines() if line.startswith(f"  {verb} ")]
        assert line.endswith(".")
    assert "examples:" in done.stdout
    assert max(map(len, done.stdout.splitlines())) < 80


def test_nothing_at_all_is_answered_with_help_and_a_usage_error(run: Run) -> None:
    done = run()
    assert (done.returncode, "usage: hq-backups" in done.stdout) == (2, True)


def test_version(run: Run) -> None:
    assert run("--version").stdout == f"hq-backups {hq_backups.__version__}\n"


def test_a_commands_help_shows_the_programs_name(run: Run, tmp_path: Path) -> None:
    done = run("run_backup", "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: hq-backups run_backup ")
    assert "  hq-backups run_backup all --type auto" in done.stdout
    assert not (tmp_path / "state" / "history.sqlite3").exists()


@pytest.mark.parametrize("word", ["run_bakup", "list-backups", "migrate", "_hidden"])
def test_an_unknown_command_is_a_usage_error(run: Run, word: str) -> None:
    done = run(word)
    assert done.returncode == 2
    assert word in done.stderr
    assert "hq-backups" in done.stderr


def test_the_nearest_command_is_named(run: Run) -> None:
    assert "Did you mean hq-backups list_backups?" in run("list-backups").stderr


@pytest.mark.parametrize(
    ("words", "code", "last"),
    [
        (["run_backup"], 2, None),
        (["run_backup", "nothing"], 2, None),
        (["run_backup", "postgres", "--typ=daily"], 2, None),
        (["run_backup", "couch"], 2, "RESULT failed run=- exit=2"),
        (["restore_backup", "postgres"], 2, "RESULT failed run=- exit=2"),
        (["restore_backup", "postgres", "latest"], 4, "RESULT failed run=- exit=4"),
        (
            ["restore_backup", "postgres", "latest", "--noinput", "--confirm-env=x"],
            4,
            "RESULT failed run=- exit=4",
        ),
        (["upload_backups"], 2, "RESULT failed run=- exit=2"),
    ],
)
def test_exit_codes_and_result_lines_are_true(
    run: Run, words: list[str], code: int, last: str | None
) -> None:
    done = run(*words)
    assert done.returncode == code, done.stderr
    assert done.stdout.splitlines()[-1:] == ([last] if last else [])
    assert "Traceback" not in done.stderr


def test_the_history_is_made_by_itself_and_private(run: Run, tmp_path: Path) -> None:
    assert run("restore_backup", "postgres", "latest").returncode == 4
    state = tmp_path / "state"
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    assert {p.name: stat.S_IMODE(p.stat().st_mode) for p in state.iterdir()} == {
        "secret_key": 0o600,
        "history.sqlite3": 0o600,
    }
    key = (state / "secret_key").read_text()
    run("restore_backup", "postgres", "latest")
    assert (state / "secret_key").read_text() == key


def test_two_that_start_at_once_share_key_and_history(run: Run, tmp_path: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        ended = list(pool.map(lambda _: run("restore_backup", "postgres", "latest"), range(3)))
    assert [done.returncode for done in ended] == [4, 4, 4]
    assert not any("WARNING" in done.stderr for done in ended)
    assert len(list((tmp_path / "state").iterdir())) == 2


def test_only_the_pages_commands_load_the_admin(variables: dict[str, str]) -> None:
    code = (
        "import sys; from hq_backups import standalone\n"
        "try: standalone.main({words!r})\n"
        "except SystemExit: pass\n"
        "print('django.contrib.admin' in sys.modules, 'hq_backups.admin' in sys.modules)"
    )

    def loaded(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code.format(words=list(words))],
            env=variables,
            cwd=variables["HOME"],
            text=True,
            capture_output=True,
            check=True,
        )
        return done.stdout.splitlines()[-1]

    assert loaded("list_backups", "--help") == "False False"
    assert loaded("createsuperuser", "--help") == "True True"


def test_a_user_is_made_and_ordinary_commands_still_know_the_history(run: Run, tmp_path: Path) -> None:
    words = ("createsuperuser", "--noinput", "--username", "someone", "--email", "a@example.org")
    made = run(*words, DJANGO_SUPERUSER_PASSWORD="made-up-for-tests")
    assert (made.returncode, made.stderr) == (0, "")
    assert stat.S_IMODE((tmp_path / "state" / "history.sqlite3").stat().st_mode) == 0o600
    assert run("restore_backup", "postgres", "latest").returncode == 4
    assert "already taken" in run(*words, DJANGO_SUPERUSER_PASSWORD="made-up-for-tests").stderr


def test_a_page_of_a_history_that_ends_with_its_process_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for words in (("runserver",), ("createsuperuser", "--noinput")):
        done = run(*words, HQ_BACKUPS_BACKUP_STATE_DIR=str(tmp_path / "file" / "state"))
        assert done.returncode == 2
        assert "no history to show" in done.stderr
        assert "HQ_BACKUPS_BACKUP_STATE_DIR" in done.stderr


def test_a_state_directory_that_cannot_be_is_a_warning(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run(
        "restore_backup", "postgres", "latest", HQ_BACKUPS_BACKUP_STATE_DIR=str(tmp_path / "file" / "state")
    )
    assert done.returncode == 4
    assert "WARNING: the state directory cannot be written" in done.stderr


@pytest.mark.parametrize(
    "url", ["postgres://u:t0ps3cret@127.0.0.1:1/x", "sqlite:////proc/nowhere/history.sqlite3"]
)
def test_a_history_that_cannot_be_reached_is_a_warning(run: Run, url: str) -> None:
    done = run("restore_backup", "postgres", "latest", DATABASE_URL=url)
    assert done.returncode == 4
    assert done.stderr.count("WARNING: the history cannot be made ready") == 1
    assert "t0ps3cret" not in done.stderr
    assert "Traceback" not in done.stderr


def test_a_damaged_history_is_a_warning(run: Run, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "history.sqlite3").write_bytes(b"no database" * 1000)
    done = run("restore_backup", "postgres", "latest")
    assert (done.returncode, "WARNING: the history" in done.stderr) == (4, True)


@pytest.mark.parametrize("variable", ["DATABASE_URL", "EMAIL_URL"])
def test_a_setting_that_cannot_be_read_is_a_usage_error_without_its_secret(run: Run, variable: str) -> None:
    done = run("list_backups", **{variable: "nonsense://u:t0ps3cret@host/x"})
    assert done.returncode == 2
    assert "ERROR: " in done.stderr
    assert "t0ps3cret" not in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


def test_an_env_file_sets_what_the_environment_does_not(run: Run, tmp_path: Path) -> None:
    lines = tmp_path / "hq_backups.env"
    lines.write_text("HQ_BACKUPS_DEPLOY_ENV=other\nHQ_BACKUPS_BACKUP_HOST_NAME=from-file\n")
    lines.chmod(0o600)
    done = run("list_backups", "--config", HQ_BACKUPS_ENV_FILE=str(lines))
    assert "deploy_env: demo" in done.stdout
    assert "backup_host_name: from-file" in done.stdout


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644])
def test_an_env_file_that_others_can_read_is_refused(run: Run, tmp_path: Path, mode: int) -> None:
    lines = tmp_path / "hq_backups.env"
    lines.write_text("X=1\n")
    lines.chmod(mode)
    done = run("list_backups", HQ_BACKUPS_ENV_FILE=str(lines))
    assert done.returncode == 2
    assert f"chmod 600 {lines}" in done.stderr


def test_an_env_file_that_is_missing_is_refused(run: Run, tmp_path: Path) -> None:
    assert run("list_backups", HQ_BACKUPS_ENV_FILE=str(tmp_path / "none")).returncode == 2


def test_the_state_directory_may_be_named_in_the_settings_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = SimpleNamespace(default=lambda look: f"{look.environ['HOME']}/usual")
    monkeypatch.setattr(standalone, "SETTINGS", {"backup_state_dir": usual})
    named = tmp_path / "public.yml"
    named.write_text(f"backup_state_dir: {tmp_path}/there\n")
    variables = {"HOME": str(tmp_path), "HQ_BACKUPS_CONFIG": str(named)}
    assert standalone.state_dir(variables) == tmp_path / "there"
    for useless in ("- no map\n", "backup_state_dir: '{{ encrypted_root }}/x'\n", "x: [\n"):
        named.write_text(useless)
        assert standalone.state_dir(variables) == tmp_path / "usual"


def test_an_empty_key_of_a_full_disk_is_made_again(tmp_path: Path) -> None:
    (tmp_path / "secret_key").write_text("")
    assert len(standalone.secret_key(tmp_path)) > 40
    assert standalone.secret_key(tmp_path) == standalone.secret_key(tmp_path)
    assert standalone.secret_key(None) != standalone.secret_key(None)


def test_the_history_is_where_database_url_says(tmp_path: Path) -> None:
    assert standalone.database(environ.Env(), None)["NAME"] == ":memory:"
    assert standalone.database(environ.Env(), tmp_path)["NAME"] == str(tmp_path / "history.sqlite3")


def test_a_missing_file_with_secrets_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError):
        standalone.require_private(tmp_path / "none")
