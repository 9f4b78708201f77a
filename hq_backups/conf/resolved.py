"""What the settings add up to."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hq_backups.conf import engine, rules
from hq_backups.conf.findings import WARNING, Finding
from hq_backups.conf.surroundings import Surroundings
from hq_backups.engine.config import STORES, Config
from hq_backups.engine.errors import ConfigurationError, NotBuiltYet
from hq_backups.settings_table import BUILT_MODES


@dataclass(frozen=True)
class Effective:
    """One setting as it is, and where that comes from."""

    name: str
    value: Any = field(repr=False)
    source: str
    display: Any
    """The value as it may be shown: plain data, secrets masked."""
    broken: bool = False
    """Whether what was given is of no use; the value is None then."""


@dataclass(frozen=True)
class Resolved:
    """Every effective setting; what is wrong is told by :meth:`check` and raised by :meth:`require`."""

    effective: Mapping[str, Effective] = field(repr=False)
    reading: tuple[Finding, ...] = ()
    """What was found wrong while reading."""
    surroundings: Surroundings = field(default_factory=Surroundings)

    def __getitem__(self, name: str) -> Any:
        """Return the value of the setting with this proper name."""
        return self.effective[name].value

    def check(self) -> tuple[Finding, ...]:
        """Return everything that is wrong, errors first."""
        read = (finding for finding in self.reading if not self._is_moot(finding))
        found = dict.fromkeys((*read, *rules.check(self)))
        return tuple(sorted(found, key=lambda finding: finding.id))

    @property
    def notes(self) -> tuple[str, ...]:
        """Return the warnings as text, for a command to print."""
        return tuple(f"{f.message}. {f.hint}".strip() for f in self.check() if f.level == WARNING)

    def require(self, store: str | None = None, *, backup: bool = False) -> None:
        """Raise the first error that concerns ``store`` or all of them.

        With ``backup`` the store must also be switched on, in a mode that this release can make.
        """
        for finding in self.check():
            if finding.stops(store):
                raise ConfigurationError(finding.message, hint=finding.hint)
        if store is None or not backup:
            return
        if store not in self.switched_on:
            name, value = engine.SWITCHES[store]
            hint = f"Set {name}: {value}, or see where it comes from: list_backups --config"
            raise ConfigurationError(f"{store} backups are switched off", hint=hint)
        if store in self.unbuilt:
            raise NotBuiltYet(
                f"{rules.unbuilt(self, store)} not built in this release", hint=rules.UNBUILT_HINT
            )

    @property
    def switched_on(self) -> tuple[str, ...]:
        """Return the stores that the settings switch on, built or not."""
        return tuple(store for store in STORES if engine.is_on(self, store))

    @property
    def enabled(self) -> tuple[str, ...]:
        """Return the stores that are switched on and known to this release."""
        return tuple(store for store in self.switched_on if store in BUILT_MODES)

    @property
    def unbuilt(self) -> tuple[str, ...]:
        """Return the stores that are switched on in a way that this release cannot back up."""
        return tuple(s for s in self.switched_on if engine.mode(self, s) not in BUILT_MODES.get(s, ()))

    @property
    def local(self) -> tuple[str, ...]:
        """Return the enabled stores that belong to this host."""
        return tuple(store for store in self.enabled if self._is_here(store))

    def config(self, require: tuple[str, ...] = ()) -> Config:
        """Return the engine's configuration, switched-off stores included where their backups may lie.

        General errors are raised; a store whose own settings are of no use is left out, unless it is in
        ``require``: then that is raised.
        """
        for store in (None, *require):
            self.require(store)
        return engine.config(self)

    @property
    def state_dir(self) -> Path:
        """Return where alarm state, status and standalone history lie; not made yet."""
        return Path(self["backup_state_dir"])

    @property
    def virtualenv_home(self) -> str | None:
        """Return the Python environment that sudo's rules name."""
        value: str | None = self["virtualenv_home"]
        return value

    def _is_moot(self, finding: Finding) -> bool:
        """Return whether a value that could not be read is not needed, or came from elsewhere."""
        if finding.id != "W002" or finding.setting is None:
            return False
        is_off = finding.store is not None and finding.store not in self.switched_on
        return is_off or self[finding.setting] is not None

    def _is_here(self, store: str) -> bool:
        hosts: Mapping[str, tuple[str, ...]] | None = self["backup_hosts"]
        if hosts is not None:
            return store in hosts.get(self["backup_host_name"], ())
        if store == "postgres" and self["pg_backup_from"]:
            # The data directory is on another host: this one was told to back it up.
            return True
        data_dir = engine.data_dir(self, store)
        try:
            return data_dir is None or stat.S_ISDIR(os.stat(data_dir).st_mode)
        except PermissionError:
            # Something is there; its owner, who will run the engine, sees it.
            return True
        except OSError:
            return False
