"""The program ``hq-backups``: HQ's commands on a host that has no HQ."""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import importlib
import os
import pkgutil
import re
import secrets
import stat
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import environ

from hq_backups import __version__
from hq_backups.engine.errors import ConfigurationError, Exit, HQBackupsError
from hq_backups.settings_table import SETTINGS

PROGRAM = "hq-backups"
ENV_FILE = "HQ_BACKUPS_ENV_FILE"
STATE_DIR = "HQ_BACKUPS_BACKUP_STATE_DIR"
SETTINGS_MODULE = "hq_backups.standalone_settings"
PAGE_SETTINGS_MODULE = "hq_backups.standalone_page_settings"
PAGE_COMMANDS = {
    "createsuperuser": "Make a user who may log in to the history page",
    "runserver": "Show the history page: on 127.0.0.1:8000, or on the address that is given",
}
"""Django's own commands that the history page needs; no other command loads the admin for it."""
IN_MEMORY = {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}
EXAMPLES = """\
examples:
  hq-backups run_backup postgres
  hq-backups list_backups
  hq-backups restore_backup postgres latest --dry-run

Settings: HQ_BACKUPS_CONFIG names a public.yml, HQ_BACKUPS_<NAME> one name;
`hq-backups list_backups --config` prints what holds, and where it came from."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; Django's settings are ours."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("help", "-h", "--help"):
        sys.stdout.write(usage())
        return Exit.OK if words else Exit.USAGE
    if words[0] == "--version":
        sys.stdout.write(f"{PROGRAM} {__version__}\n")
        return Exit.OK
    verbs = [*commands(), *PAGE_COMMANDS]
    if words[0] not in verbs:
        near = difflib.get_close_matches(words[0], verbs, 1)
        guess = f"Did you mean {PROGRAM} {near[0]}?" if near else f"See them: {PROGRAM} --help"
        return refuse(ConfigurationError(f"there is no command {words[0]!r}", hint=guess))
    page = words[0] in PAGE_COMMANDS
    os.environ["DJANGO_SETTINGS_MODULE"] = PAGE_SETTINGS_MODULE if page else SETTINGS_MODULE
    try:
        import django

        django.setup()
    except HQBackupsError as error:
        return refuse(error)
    except Exception as error:
        return refuse(ConfigurationError(f"the settings cannot be read: {type(error).__name__}: {error}"))
    helps = bool({"-h", "--help", "--version"} & set(words))
    if page and not helps and is_in_memory():
        return refuse(
            ConfigurationError(
                "the state directory cannot be written, so there is no history to show",
                hint="Set HQ_BACKUPS_BACKUP_STATE_DIR, or run it as the user who makes the backups",
            )
        )
    if not helps:
        prepare_history(page=page)
    if page:
        return page_command(words)
    command = importlib.import_module(f"hq_backups.management.commands.{words[0]}").Command()
    command.run_from_argv([PROGRAM, *words])
    return Exit.OK


def page_command(words: Sequence[str]) -> int:
    """Run one of Django's commands for the history page."""
    from django.core.management import ManagementUtility

    # What the page starts is an ordinary command.
    os.environ["DJANGO_SETTINGS_MODULE"] = SETTINGS_MODULE
    os.environ["DJANGO_RUNSERVER_HIDE_WARNING"] = "true"
    # The page serves its own files, and is there whatever is wrong with the settings: it says so itself.
    more = ["--insecure", "--noreload"] if words[0] == "runserver" else []
    ManagementUtility([PROGRAM, *words, "--skip-checks", *more]).execute()
    return Exit.OK


def refuse(error: HQBackupsError) -> int:
    """Say why nothing is done."""
    sys.stderr.write(
        f"ERROR: {error.message}\n  next: {error.hint}\n" if error.hint else f"ERROR: {error.message}\n"
    )
    return error.exit_code


def commands() -> list[str]:
    """Return the names of our commands."""
    from hq_backups.management import commands as package

    return sorted(name for _, name, _ in pkgutil.iter_modules(package.__path__) if not name.startswith("_"))


def usage() -> str:
    """Return the help page: every command in one line."""
    lines = [
        f"usage: {PROGRAM} COMMAND [options]",
        "",
        "Back up, check and restore the data stores of CommCare HQ.",
        "",
    ]
    modules = {verb: importlib.import_module(f"hq_backups.management.commands.{verb}") for verb in commands()}
    helps = {verb: module.Command.help for verb, module in modules.items()} | PAGE_COMMANDS
    for verb, text in helps.items():
        short = re.split("[:;.]", text)[0]
        lines.append(f"  {verb:<{max(map(len, helps))}}  {short}.")
    return "\n".join([*lines, "", f"Each has its own: {PROGRAM} COMMAND --help", "", EXAMPLES, ""])


def environment() -> environ.Env:
    """Return the environment, with the lines of the file that HQ_BACKUPS_ENV_FILE names below it."""
    path = os.environ.get(ENV_FILE)
    if path:
        require_private(Path(path))
        environ.Env.read_env(path, overwrite=False)
    return environ.Env()


def require_private(path: Path) -> None:
    """Raise ConfigurationError when a file with secrets is open to others."""
    try:
        info = path.stat()
    except OSError as error:
        raise ConfigurationError(
            f"{ENV_FILE} names {path}, which cannot be read: {error.strerror}"
        ) from error
    if stat.S_IMODE(info.st_mode) & 0o077:
        raise ConfigurationError(f"{path} holds secrets and can be read by others", hint=f"chmod 600 {path}")
    if not os.access(path, os.R_OK):
        raise ConfigurationError(f"{ENV_FILE} names {path}, which this user cannot read")


def state_dir(variables: Mapping[str, str]) -> Path | None:
    """Return the directory of the history, made 0700 when it is missing; None when it cannot be written."""
    path = Path(
        _configured_state_dir(variables) or SETTINGS["backup_state_dir"].default(_Variables(variables))
    )
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return None
    return path if os.access(path, os.W_OK | os.X_OK) else None


class _Variables:
    """What the default of the state directory asks for, before there are any settings."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.environ = environ

    def __call__(self, name: str) -> None:
        return None


def _configured_state_dir(variables: Mapping[str, str]) -> str | None:
    if variables.get(STATE_DIR):
        return variables[STATE_DIR]
    if not variables.get("HQ_BACKUPS_CONFIG"):
        return None
    from hq_backups.conf import yamlfile

    # What is wrong with the file is said by the command, with all the rest.
    with contextlib.suppress(yamlfile.Unreadable):
        found = yamlfile.load(variables["HQ_BACKUPS_CONFIG"])[0].get("backup_state_dir")
        return found if isinstance(found, str) and found.startswith("/") else None
    return None


def secret_key(directory: Path | None) -> str:
    """Return the key in the state directory, made when missing; without a directory, one for this run."""
    if directory is None:
        return secrets.token_urlsafe(50)
    path = directory / "secret_key"
    with contextlib.suppress(FileNotFoundError):
        if key := path.read_text().strip():
            return key
    fresh = directory / f".secret_key.{os.getpid()}"
    try:
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(fd, "w") as file:
            file.write(secrets.token_urlsafe(50) + "\n")
        # Of two that start at once, one wins and both use its key; an empty one was left by a full disk.
        if path.exists() and not path.stat().st_size:
            path.unlink(missing_ok=True)
        with contextlib.suppress(FileExistsError):
            os.link(fresh, path)
        return path.read_text().strip()
    except OSError:
        return secrets.token_urlsafe(50)
    finally:
        fresh.unlink(missing_ok=True)


def database(env: environ.Env, directory: Path | None) -> dict[str, Any]:
    """Return the history's database."""
    if env.str("DATABASE_URL", default=""):
        return dict(env.db_url("DATABASE_URL"))
    if directory is None:
        return dict(IN_MEMORY)
    return {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": str(directory / "history.sqlite3"),
        "OPTIONS": {"timeout": 10},
    }


def is_in_memory() -> bool:
    """Tell whether the history ends with this process, for want of a place."""
    from django.conf import settings

    return settings.DATABASES["default"]["NAME"] == ":memory:" and not os.environ.get("DATABASE_URL")


def prepare_history(*, page: bool = False) -> None:
    """Make the history's tables what this version needs; what goes wrong stops no command.

    The page's users and permissions are made anew each time: a command may have made the history's own tables first.
    """
    from django.conf import settings
    from django.db import connection

    if is_in_memory():
        warn("the state directory cannot be written, so no history is kept: set HQ_BACKUPS_BACKUP_STATE_DIR")
    try:
        with _migration_lock(settings.DATABASES["default"]):
            _migrate(always=page)
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        warn(f"the history cannot be made ready ({first}); the catalog has everything")
    finally:
        with contextlib.suppress(Exception):
            connection.close()


def _migrate(*, always: bool) -> None:
    from django.core.management import call_command
    from django.db import connection
    from django.db.migrations.executor import MigrationExecutor

    executor = MigrationExecutor(connection)
    if always or executor.migration_plan(executor.loader.graph.leaf_nodes()):
        call_command("migrate", verbosity=0, interactive=False)


@contextlib.contextmanager
def _migration_lock(settings: Mapping[str, Any]) -> Iterator[None]:
    """Let one process at a time make the tables of a history file."""
    name = str(settings["NAME"])
    if not settings["ENGINE"].endswith("sqlite3") or name == ":memory:":
        yield
        return
    fd = os.open(Path(name).parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        Path(name).touch(mode=0o600)
        yield
    finally:
        os.close(fd)


def warn(text: str) -> None:
    """Say what is not right, on standard error."""
    sys.stderr.write(f"WARNING: {text}\n")


if __name__ == "__main__":
    sys.exit(main())
