"""Where settings come from, the strongest source first."""

from __future__ import annotations

import difflib
import os
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hq_backups.conf import yamlfile
from hq_backups.conf.casting import is_unset
from hq_backups.conf.findings import Finding
from hq_backups.conf.template import has_expression
from hq_backups.setting import env_name
from hq_backups.settings_table import BY_ANY_NAME, SHARED_MAPS

PREFIX = "HQ_BACKUPS_"
FILE_VARIABLE = "HQ_BACKUPS_CONFIG"
NOT_SETTINGS = frozenset({FILE_VARIABLE, "HQ_BACKUPS_ENV_FILE"})
_TEST_VARIABLES = "HQ_BACKUPS_TEST"
_BY_ENV_NAME = {env_name(name): name for name in BY_ANY_NAME}
_OF_BACKUPS = re.compile(r"_s3\Z|backup|snapshot", re.IGNORECASE)


@dataclass(frozen=True)
class Given:
    """What one source says about one name."""

    raw: Any = field(repr=False)
    source: str
    templated: bool = False
    """Whether it is of a file that Ansible would render first."""


@dataclass
class Layer:
    """One source: values by the name that it used, and what is wrong with it."""

    values: dict[str, Given] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)


def layers(settings: Any, environ: Mapping[str, str]) -> list[Layer]:
    """Return the sources that an operator writes, the strongest first."""
    return [_from_django(settings), _from_environ(environ), _from_file(settings, environ)]


def _from_django(settings: Any) -> Layer:
    layer = Layer()
    _take_strict(layer, getattr(settings, "HQ_BACKUPS", None), "settings.HQ_BACKUPS")
    return layer


def _from_environ(environ: Mapping[str, str]) -> Layer:
    layer = Layer()
    for variable, value in environ.items():
        if (
            not variable.startswith(PREFIX)
            or variable in NOT_SETTINGS
            or variable.startswith(_TEST_VARIABLES)
        ):
            continue
        name = _BY_ENV_NAME.get(variable)
        if name is None:
            layer.findings.append(_unknown(variable, "the environment", _BY_ENV_NAME))
        else:
            layer.values[name] = Given(value, f"environment variable {variable}")
    return layer


def _from_file(settings: Any, environ: Mapping[str, str]) -> Layer:
    layer = Layer()
    path = environ.get(FILE_VARIABLE) or getattr(settings, FILE_VARIABLE, None)
    if is_unset(path):
        return layer
    path = str(path)
    try:
        data, twice = yamlfile.load(path)
    except yamlfile.Unreadable as error:
        hint = f"{FILE_VARIABLE} must name a file that this user can read: a public.yml, or one like it."
        layer.findings.append(Finding("E001", f"{path} cannot be read: {error}", hint))
        return layer
    for section in (None, "localsettings", "localsettings_private"):
        part = data if section is None else data.get(section)
        source = path if section is None else f"{path} ({section})"
        if isinstance(part, yamlfile.Tagged) and part.encrypted:
            layer.findings.append(_encrypted(str(section), path))
        elif isinstance(part, Mapping):
            _take_ours(layer, part, source)
            _take_strict(layer, part.get("HQ_BACKUPS"), f"{source}: HQ_BACKUPS", templated=True)
    secrets = sorted(n for n, v in layer.values.items() if BY_ANY_NAME[n].secret and not is_unset(v.raw))
    if secrets and os.stat(path).st_mode & stat.S_IROTH:
        message = f"{path} holds {', '.join(secrets)} and can be read by every user of this host"
        layer.findings.append(Finding("W011", message, f"chmod o-r {path}"))
    for name in sorted(twice & set(BY_ANY_NAME)):
        layer.findings.append(
            Finding("W009", f"{name} stands twice in {path}; the last one counts", setting=name)
        )
    return layer


def _take_strict(layer: Layer, given: Any, source: str, *, templated: bool = False) -> None:
    """Take a map in which every name must be ours."""
    if is_unset(given):
        return
    if not isinstance(given, Mapping):
        hint = "Write it as a map of names and values."
        layer.findings.append(Finding("E001", f"{source} is not a map, but a {type(given).__name__}", hint))
        return
    for name, raw in _flat(given):
        if name in BY_ANY_NAME:
            _put(layer, name, raw, source, templated=templated)
        else:
            layer.findings.append(_unknown(name, source, BY_ANY_NAME))


def _take_ours(layer: Layer, given: Mapping[Any, Any], source: str) -> None:
    """Take from a map that also holds names of others."""
    for name, raw in _flat(given):
        if name in BY_ANY_NAME:
            _put(layer, name, raw, source, templated=True)
        elif name in SHARED_MAPS and isinstance(raw, yamlfile.Tagged) and raw.encrypted:
            layer.findings.append(_encrypted(name, source))
        elif _OF_BACKUPS.search(name) and (near := difflib.get_close_matches(name, BY_ANY_NAME, 1, 0.8)):
            hint = f"If {near[0]} is meant, correct it; otherwise nothing is to be done."
            layer.findings.append(
                Finding("W008", f"{name} in {source} is no setting and was passed over", hint)
            )


def _put(layer: Layer, name: str, raw: Any, source: str, *, templated: bool) -> None:
    setting = BY_ANY_NAME[name]
    if isinstance(raw, yamlfile.Tagged):
        if raw.encrypted:
            layer.findings.append(_encrypted(name, source))
        else:
            # The tag is not shown: text that begins with an exclamation mark looks like one, passwords too.
            message = f"{name} in {source} has a tag that only Ansible can read"
            layer.findings.append(
                Finding("E003", message, "Write the plain value, in quotes.", setting.store, setting.name)
            )
        return
    if templated and (setting.secret or setting.in_vault) and has_expression(raw):
        layer.findings.append(_encrypted(name, source, "speaks of the vault"))
        return
    # The upper sections of a file are stronger: what stands there already stays.
    layer.values.setdefault(name, Given(raw, source, templated))


def _flat(given: Mapping[Any, Any]) -> Iterable[tuple[str, Any]]:
    """Yield names and values, those of shared maps as ``map.name``."""
    for key, raw in given.items():
        name = str(key)
        if name not in SHARED_MAPS or not isinstance(raw, Mapping):
            yield name, raw
            continue
        for inner, value in raw.items():
            if isinstance(value, Mapping):
                yield from ((f"{name}.{inner}.{last}", v) for last, v in value.items())
            else:
                yield f"{name}.{inner}", value


def _encrypted(name: str, source: str, how: str = "is encrypted by ansible-vault") -> Finding:
    hint = (
        f"Give it another way, such as the environment variable {env_name(name)}."
        if name in BY_ANY_NAME
        else ""
    )
    setting = BY_ANY_NAME.get(name)
    return Finding(
        "W002",
        f"{name} in {source} {how} and counts as unset",
        hint or "Decrypted values come from HQ's own settings, or from HQ_BACKUPS_ variables.",
        setting.store if setting else None,
        setting.name if setting else None,
    )


def _unknown(name: str, source: str, known: Mapping[str, Any]) -> Finding:
    folded = {k.lower(): k for k in known}
    near = difflib.get_close_matches(name.lower(), folded, 1, 0.5)
    hint = (
        f"Is {folded[near[0]]} meant?"
        if near
        else "Every name is in docs/settings.rst, or: list_backups --config"
    )
    return Finding("E002", f"{source} has the unknown name {name}", hint)
