"""What a setting is: its name, what it may hold, what it is by default, and who else may know it."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

LIVE, NOT_BUILT, DEAD, REFUSED = "live", "not built", "dead", "refused"


class Lookup(Protocol):
    """What a default may ask."""

    environ: Mapping[str, str]

    def __call__(self, name: str) -> Any:
        """Return another setting's effective value."""


@dataclass(frozen=True)
class Derived:
    """A default made of other settings; unset when one of them is."""

    template: str

    def __call__(self, look: Lookup) -> str | None:
        """Fill the template."""
        names = [name for _, name, _, _ in string.Formatter().parse(self.template) if name]
        values = {name: look(name) for name in names}
        return None if None in values.values() else self.template.format(**values)

    def __str__(self) -> str:
        return self.template.replace("{", "<").replace("}", ">")


@dataclass(frozen=True)
class FoundOut:
    """A default that is found out on the host."""

    find: Callable[[Lookup], Any]
    label: str

    def __call__(self, look: Lookup) -> Any:
        """Find it out."""
        return self.find(look)

    def __str__(self) -> str:
        return self.label


@dataclass(frozen=True)
class FromDjango:
    """What HQ's own Django settings already say."""

    label: str
    """A dotted path: attributes and keys alike."""
    convert: Callable[[Any, Any], Any] | None = None
    """Makes a value of what is found there and of all settings."""

    def __call__(self, settings: Any) -> Any:
        """Return the value, or None where the settings do not have it."""
        value = settings
        for part in self.label.split("."):
            value = value.get(part) if isinstance(value, Mapping) else getattr(value, part, None)
            if value is None:
                return None
        return self.convert(value, settings) if self.convert else value


@dataclass(frozen=True)
class Setting:
    """One name of public.yml, or of our own."""

    name: str
    """A dot means a map within a map."""
    kind: str
    """One of the kinds in conf/casting.py."""
    default: Any = None
    help: str = ""
    store: str | None = None
    """Whose setting it is: an error in it stops only this store. None concerns every store."""
    status: str = LIVE
    reason: str = ""
    """Why it is dead or refused."""
    secret: bool = False
    aliases: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    low: int | None = None
    high: int | None = None
    django: FromDjango | None = None
    in_vault: bool = False
    """Whether public.yml usually refers to the vault here, though it is no secret."""
    used_by_others: bool = False
    """Whether other parts of commcare-cloud use the name too, so that it is no fault in a public.yml."""
    none_is: Any = None
    """What an explicit None says, where that is not simply unset."""

    @property
    def names(self) -> tuple[str, ...]:
        """Return every name that the setting answers to, the proper one first."""
        return (self.name, *self.aliases)


def env_name(name: str) -> str:
    """Return the environment variable that sets ``name``."""
    return "HQ_BACKUPS_" + name.upper().replace(".", "_")
