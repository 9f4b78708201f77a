"""Alarm mails: to whom, what they say, and sending them within a bounded time."""

from __future__ import annotations

import re
import smtplib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from django.conf import global_settings, settings
from django.core.mail import EmailMultiAlternatives, get_connection
from django.template import Context, Engine
from django.utils.html import escape

from hq_backups.alarm_state import Alarm, State
from hq_backups.conf import surroundings
from hq_backups.conf.secrets import MASK, Secret
from hq_backups.engine.errors import HQBackupsError
from hq_backups.engine.judgement import age_words
from hq_backups.problems import Problem
from hq_backups.wording import clean

if TYPE_CHECKING:
    from hq_backups.alerts import Telling
    from hq_backups.conf import Resolved

TIMEOUT = 20
"""Seconds that a mail server may be silent: with Django's default a dead one would be waited for for ever."""
LONGEST_SUBJECT = 150
MOST = 50
"""Problems that one mail describes; the others are counted."""
_TEMPLATES = Path(__file__).with_name("templates") / "hq_backups" / "mail"
_DEFAULTS = ("webmaster@localhost", "root@localhost")


class NotSent(HQBackupsError):
    """{message}"""  # noqa: D400


@dataclass(frozen=True)
class Described:
    """One problem as a mail shows it."""

    headline: str
    severity: str
    cause: str
    command: str
    host: str
    last_good: str
    since: datetime
    lasts: str
    over_at: datetime | None = None
    was_told: bool = True


def recipients(resolved: Resolved) -> tuple[str, ...]:
    """Return who is told: check_s3_backups_email, else ADMINS, else nobody."""
    named = resolved["check_s3_backups_email"]
    if named:
        return tuple(named)
    # Until Django 6 an admin is a pair of name and address, from then on an address.
    admins = [a if isinstance(a, str) else a[1] for a in getattr(settings, "ADMINS", ()) or () if a]
    return tuple(dict.fromkeys(admins))


def sender() -> str:
    """Return from whom alarms come: the first address that the host has set."""
    given = (settings.DEFAULT_FROM_EMAIL, settings.SERVER_EMAIL)
    return next((address for address in given if address not in _DEFAULTS), given[0])


def backend(resolved: Resolved) -> str:
    """Return the mail backend's dotted path."""
    return resolved.surroundings.mail_backend or settings.EMAIL_BACKEND


def delivers_nowhere(resolved: Resolved) -> str:
    """Return the kind of a backend that delivers nothing; empty for one that does."""
    return surroundings.delivers_nowhere(backend(resolved))


def server(resolved: Resolved) -> str:
    """Return the mail server's address, where the backend speaks to one."""
    if "smtp" not in backend(resolved).lower():
        return ""
    mailers = getattr(settings, "MAILERS", None)
    options: Any = mailers.get("default", {}).get("OPTIONS", {}) if isinstance(mailers, Mapping) else {}
    host = options.get("host") or getattr(settings, "EMAIL_HOST", "localhost")
    return f"{host}:{options.get('port') or getattr(settings, 'EMAIL_PORT', 25)}"


def send_alarms(resolved: Resolved, telling: Telling, state: State, now: datetime) -> tuple[str, ...]:
    """Send one mail about all of it; return to whom, or raise NotSent."""
    to = recipients(resolved)
    if not to:
        raise NotSent("nobody is named: neither check_s3_backups_email nor ADMINS is set")
    subject, text, html = compose(resolved, telling, state, now)
    send(resolved, to, subject, text, html)
    return to


def send(resolved: Resolved, to: Sequence[str], subject: str, text: str, html: str) -> None:
    """Send one mail, or raise NotSent with what the server answered."""
    message = EmailMultiAlternatives(subject, text, sender(), list(to))
    message.attach_alternative(html, "text/html")
    # Out-of-office answers to an alarm help nobody (RFC 3834).
    message.extra_headers["Auto-Submitted"] = "auto-generated"
    try:
        message.connection = _connection()
        count = message.send()
    except Exception as error:
        why = redact(said(error), secrets(resolved))
        raise NotSent(f"{server(resolved) or backend(resolved)} did not take the mail: {why}") from error
    if not count:
        raise NotSent(f"{backend(resolved)} says that it sent nothing")


def send_test(resolved: Resolved, to: Sequence[str], now: datetime) -> str:
    """Send a mail that says where it comes from; return what came of it, or raise NotSent."""
    env, host = clean(resolved["deploy_env"] or "?"), clean(resolved["backup_host_name"])
    line = f"This is a test: alarms of the backups of {env} come from host {host} like this mail."
    text = f"{line}\n\nSent at {now:%Y-%m-%d %H:%M} UTC. Nothing is wrong.\n"
    html = f'<!DOCTYPE html>\n<html lang="en"><body><p>{escape(line)}</p>\n<p>Nothing is wrong.</p></body></html>\n'
    send(resolved, to, _bounded(f"{_prefix()}[{env}] test of backup alarms", LONGEST_SUBJECT), text, html)
    return f"{server(resolved) or backend(resolved)} took the mail"


def _connection() -> Any:
    timeout = min(getattr(settings, "EMAIL_TIMEOUT", None) or TIMEOUT, 2 * TIMEOUT)
    try:
        return get_connection(timeout=timeout)
    except TypeError:
        # A backend of somebody else's, which knows no such argument.
        return get_connection()


def said(error: Exception) -> str:
    """Return what went wrong, with what a mail server answered, as one line."""
    if isinstance(error, smtplib.SMTPRecipientsRefused):
        answers = [f"{who}: {_answer(*each)}" for who, each in error.recipients.items()]
        return clean("it refused the recipients: " + "; ".join(answers))[:500]
    if isinstance(error, smtplib.SMTPResponseException):
        return clean(f"it answered {_answer(error.smtp_code, error.smtp_error)}")[:500]
    text = str(error).strip() or "no words"
    return clean(f"{type(error).__name__}: {' '.join(text.split())}")[:500]


def _answer(code: int, words: bytes | str) -> str:
    text = words.decode(errors="replace") if isinstance(words, bytes) else words
    return f"{code} {' '.join(text.split())}"


def compose(resolved: Resolved, telling: Telling, state: State, now: datetime) -> tuple[str, str, str]:
    """Return the subject, the text and the HTML of one mail."""
    env, host = clean(resolved["deploy_env"] or "?"), clean(resolved["backup_host_name"])
    hide = secrets(resolved)
    mentioned = {key for key, alarm in state.alarms.items() if alarm.over_at is None} - telling.keys
    others = [state.alarms[key].problem for key in sorted(mentioned)]
    context = {
        "env": env,
        "host": host,
        "now": now,
        "parts": [
            ("New", _described(telling.started, now)),
            ("Still wrong", _described(telling.lasting, now)),
            ("Over", _described(telling.over, now)),
        ],
        "others": [headline(problem) for problem in others[:MOST]],
        "undelivered": state.undelivered,
    }
    context["unnamed"] = sum(max(0, len(p) - MOST) for p in (telling.started, telling.lasting, telling.over))
    return (
        redact(subject(env, telling), hide),
        redact(_render("alarm.txt", context, autoescape=False), hide),
        redact(_render("alarm.html", context, autoescape=True), hide),
    )


def subject(env: str, telling: Telling) -> str:
    """Return one bounded line: environment, store and problem of the gravest, and how many more there are."""
    told = [*telling.started, *telling.lasting, *telling.over]
    first = told[0]
    word = "" if telling.started else "still: " if telling.lasting else "over: "
    more = f" (and {len(told) - 1} more)" if len(told) > 1 else ""
    line = f"{_prefix()}[{env}] {word}{headline(first.problem)}"
    return _bounded(" ".join(clean(line).split()), LONGEST_SUBJECT - len(more)) + more


def _prefix() -> str:
    prefix = clean(settings.EMAIL_SUBJECT_PREFIX or "")
    # Nobody chose Django's own.
    return "" if prefix == global_settings.EMAIL_SUBJECT_PREFIX else prefix


def headline(problem: Problem) -> str:
    """Return the store and the problem as one line."""
    store = f"{clean(problem.store)}: " if problem.store else ""
    return store + _bounded(clean(" ".join(problem.title.split())), 200)


def _described(alarms: Sequence[Alarm], now: datetime) -> list[Described]:
    return [
        Described(
            headline(alarm.problem),
            alarm.problem.severity,
            _bounded(clean(" ".join(alarm.problem.cause.split())), 2000),
            clean(alarm.problem.command),
            clean(alarm.problem.host),
            clean(alarm.problem.last_good),
            alarm.since,
            age_words((alarm.over_at or now) - alarm.since),
            alarm.over_at,
            alarm.told_at is not None,
        )
        for alarm in alarms[:MOST]
    ]


def _bounded(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def _render(name: str, context: Mapping[str, Any], *, autoescape: bool) -> str:
    # An engine of our own: the host's may lack our directory, or change what is escaped.
    engine = Engine(dirs=[str(_TEMPLATES)], autoescape=autoescape)
    text = engine.get_template(name).render(Context(dict(context), autoescape=autoescape, use_tz=False))
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def secrets(resolved: Resolved) -> tuple[str, ...]:
    """Return every value that a mail must never hold, longest first."""
    found = [str(e.value) for e in resolved.effective.values() if isinstance(e.value, Secret)]
    found += [urlsplit(value).password or "" for value in found if "://" in value]
    found.append(str(getattr(settings, "EMAIL_HOST_PASSWORD", "") or ""))
    found.append(str(getattr(settings, "SECRET_KEY", "") or ""))
    databases: Mapping[str, Any] = getattr(settings, "DATABASES", None) or {}
    found += [str(d.get("PASSWORD") or "") for d in databases.values() if isinstance(d, Mapping)]
    # Shorter ones would blot out words.
    return tuple(sorted({value for value in found if len(value) >= 6}, key=len, reverse=True))


def redact(text: str, hide: Iterable[str]) -> str:
    """Return ``text`` without the secrets that an answer of some service may have repeated."""
    for secret in hide:
        text = text.replace(secret, MASK)
    return text
