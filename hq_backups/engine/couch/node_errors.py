"""What a node or the network answers, told as causes with something to do about them.

CouchDB's own words: docs.couchdb.org, api/basics, HTTP Status Codes.
"""

from __future__ import annotations

from typing import Any

import requests

from hq_backups.engine.errors import ServiceError
from hq_backups.engine.network_words import network_words

CONFIG = "list_backups --config"
NO_SHARDS = "No DB shards could be opened"
"""No part of the database is mapped to a node that is there."""
NODE_DOWN = "progress not possible"
"""Some part is not."""


def unreachable(url: str, path: str, error: requests.RequestException) -> ServiceError:
    """Return what it means that there was no answer; the facts' status is 0."""
    return ServiceError(
        f"the CouchDB at {url} did not answer {path}: {_network_words(error)}",
        hint=f"See whether it runs, and on which port: curl -sS {url}/ ; couchdb_url and couchdb2_port: {CONFIG}",
        status=0,
    )


def answered(url: str, method: str, path: str, status: int, body: Any) -> ServiceError:
    """Return what an answer means that is not what was asked for; the facts carry its status."""
    said = body if isinstance(body, dict) else {}
    words = str(said.get("reason") or "")[:500] + (f" ({said['error']})"[:100] if said.get("error") else "")
    words = words.strip()
    cause, hint = _meaning(url, path, status, words)
    return ServiceError(
        f"the CouchDB at {url} answered {status} to {method} {path}: {cause}",
        hint=hint,
        status=status,
        reason=words,
    )


def _meaning(url: str, path: str, status: int, words: str) -> tuple[str, str]:
    if status == 401:
        return (
            words or "it does not know this user and password",
            f"Set COUCH_USERNAME and COUCH_PASSWORD to those of a server admin; what is set: {CONFIG}",
        )
    if status == 403:
        return (
            words or "not allowed",
            f"It takes a server admin: COUCH_USERNAME, COUCH_PASSWORD; see {CONFIG}.",
        )
    if status == 404:
        return (
            words or "not found",
            f"See what it has: curl -sS {url}/_all_dbs ; is {url} the node itself, no proxy?",
        )
    if status == 409:
        return words or "conflict", "Somebody else changed it meanwhile: repeat the command."
    if NO_SHARDS in words or NODE_DOWN in words:
        return (
            words,
            "The database is mapped to nodes that are not here, or its shards' files are missing: compare "
            f"{url}/_membership with {url}/_node/_local/_dbs/{path.split('/')[1]}",
        )
    if status in (301, 302, 303, 307, 308) or 200 <= status < 300:
        return words or "this is no answer of CouchDB", f"Point couchdb_url at the node itself; see {CONFIG}."
    return words or "it did not say why", "Look at CouchDB's log, then repeat the command."


def _network_words(error: requests.RequestException) -> str:
    """Return the cause."""
    if isinstance(
        error,
        requests.exceptions.InvalidURL
        | requests.exceptions.MissingSchema
        | requests.exceptions.InvalidSchema,
    ):
        return "this is no address of the kind http://host:port"
    return network_words(error)
