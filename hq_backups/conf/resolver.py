"""Decide what each setting is: the strongest source that says something, else the default."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from hq_backups.conf import template
from hq_backups.conf.casting import cast, is_unset
from hq_backups.conf.findings import Finding
from hq_backups.conf.resolved import Effective, Resolved
from hq_backups.conf.secrets import Secret, display, protect
from hq_backups.conf.sources import Given, layers
from hq_backups.conf.surroundings import Surroundings
from hq_backups.setting import DEAD, REFUSED, Setting
from hq_backups.settings_table import SETTINGS

DEFAULT = "default"
_NOTHING = Given(None, DEFAULT)


def resolve(settings: Any = None, environ: Mapping[str, str] | None = None) -> Resolved:
    """Read every setting; touches no database, network or service, and collects what is wrong."""
    if settings is None:
        from django.conf import settings as django_settings

        settings = django_settings
    return _Resolver(settings, os.environ if environ is None else environ).resolved()


class _Resolver:
    """One reading of the settings; each is looked up once, when something first asks for it."""

    def __init__(self, settings: Any, environ: Mapping[str, str]) -> None:
        self.settings = settings
        self.environ = environ
        self.layers = layers(settings, environ)
        self.findings = [finding for layer in self.layers for finding in layer.findings]
        self.done: dict[str, Effective] = {}
        self.open: list[str] = []

    def resolved(self) -> Resolved:
        """Look up everything."""
        for name in SETTINGS:
            self(name)
        ordered = {name: self.done[name] for name in SETTINGS}
        surroundings = Surroundings.of(self.settings, self.environ)
        return Resolved(ordered, tuple(dict.fromkeys(self.findings)), surroundings)

    def __call__(self, name: str) -> Any:
        """Return the effective value of ``name``; raises NotExpanded when it depends on itself."""
        if name not in self.done:
            if name in self.open:
                raise template.NotExpanded("leads back to itself: " + " -> ".join([*self.open, name]))
            self.open.append(name)
            try:
                self.done[name] = self._effective(SETTINGS[name])
            finally:
                self.open.remove(name)
        return self.done[name].value

    def _effective(self, setting: Setting) -> Effective:
        given, value, broken = self._given(setting)
        if given is None and not broken:
            given, value = self._default(setting)
        if setting.status in (DEAD, REFUSED):
            self._say_ignored(setting, given, value)
        if value is not None:
            value = Secret(value) if setting.secret and isinstance(value, str) else protect(value)
        shown = display(value, secret=setting.secret)
        return Effective(setting.name, value, given.source if given else "not usable", shown, broken)

    def _given(self, setting: Setting) -> tuple[Given | None, Any, bool]:
        """Return what the strongest source says, and whether that is of no use."""
        for layer in self.layers:
            said = {name: layer.values[name] for name in setting.names if name in layer.values}
            said = {name: given for name, given in said.items() if self._says_something(setting, given)}
            values = [self._cast(setting, name, given) for name, given in said.items()]
            if not values:
                continue
            if any(v is None for v in values) and setting.kind != "text_or_off":
                return None, None, True
            if any(v != values[0] for v in values):
                message = f"{' and '.join(said)} are two names of one setting, and differ"
                self.findings.append(
                    Finding("E012", message, "Keep one of them.", setting.store, setting.name)
                )
                return None, None, True
            return next(iter(said.values())), values[0], False
        return self._from_hq(setting)

    def _from_hq(self, setting: Setting) -> tuple[Given | None, Any, bool]:
        raw = setting.django(self.settings) if setting.django else None
        if setting.django is None or is_unset(raw):
            return None, None, False
        given = Given(raw, f"settings.{setting.django.label}")
        value = self._cast(setting, setting.name, given)
        return (None, None, True) if value is None else (given, value, False)

    def _default(self, setting: Setting) -> tuple[Given, Any]:
        raw = setting.default(self) if callable(setting.default) else setting.default
        try:
            return _NOTHING, None if raw is None else cast(setting, raw)
        except ValueError as error:
            message = f"{setting.name}, found out as {raw!r}, {error}"
            self.findings.append(
                Finding("E003", message, f"Set {setting.name}.", setting.store, setting.name)
            )
            return _NOTHING, None

    @staticmethod
    def _says_something(setting: Setting, given: Given) -> bool:
        explicit = given.raw is None or (isinstance(given.raw, str) and bool(given.raw.strip()))
        return not is_unset(given.raw) or (setting.none_is is not None and explicit)

    def _cast(self, setting: Setting, name: str, given: Given) -> Any:
        """Return the value, or None when it is of no use, which is then among the findings."""
        raw = given.raw
        if is_unset(raw):
            return setting.none_is
        try:
            if template.has_expression(raw) and not setting.secret:
                raw = template.expand(raw, self)
            return cast(setting, raw)
        except template.NotExpanded as error:
            id_, words = "E004", f"{name} in {given.source} {error}"
        except ValueError as error:
            id_, words = "E003", f"{name} in {given.source} {error}{self._quoted(setting, raw)}"
        hint = "Write the value itself." if id_ == "E004" else "See the setting in docs/settings.rst."
        self.findings.append(Finding(id_, words, hint, setting.store, setting.name))
        return None

    @staticmethod
    def _quoted(setting: Setting, raw: Any) -> str:
        if setting.secret or setting.kind in ("url", "urls") or not isinstance(raw, (str, int, float)):
            return ""
        text = repr(raw)
        return f", not {text if len(text) < 60 else text[:56] + '...'}"

    def _say_ignored(self, setting: Setting, given: Given | None, value: Any) -> None:
        if given is None or given is _NOTHING or value in (None, False, "", "False", "false", "no"):
            return
        if setting.status == REFUSED:
            message = f"{setting.name} in {given.source} is refused: {setting.reason}"
            finding = Finding("E006", message, f"Remove {setting.name}.", setting.store, setting.name)
        else:
            if given.templated and setting.used_by_others:
                return
            message = f"{setting.name} in {given.source} has no effect: {setting.reason}"
            finding = Finding("W001", message, f"Remove {setting.name}.", setting.store, setting.name)
        self.findings.append(finding)
