"""What a cluster or the network answers, told as causes with something to do about them.

The truth of a repository's failure is in its deepest ``caused_by``: the whole chain is told.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import requests

from hq_backups.engine.errors import ServiceError, Unanswered
from hq_backups.engine.network_words import network_words

CONFIG = "list_backups --config"
PLUGIN = (
    "On every node:\nsudo /usr/share/elasticsearch/bin/elasticsearch-plugin install repository-s3\n"
    "then restart the nodes one by one, and repeat the command."
)
KEYSTORE = (
    "On every node:\nbin/elasticsearch-keystore add s3.client.default.access_key\n"
    "bin/elasticsearch-keystore add s3.client.default.secret_key\n"
    "then, once: curl -XPOST {url}/_nodes/reload_secure_settings"
)
PATH_REPO = (
    "Name the directory in elasticsearch.yml on every node, such as\npath.repo: [/opt/data/elasticsearch-snapshots]\n"
    "(one that all nodes share, and that the elasticsearch user may write), restart the nodes, repeat the command."
)
MEANINGS: tuple[tuple[str, str], ...] = (
    (r"repository type \[s3\] does not exist", PLUGIN),
    (r"repository type \[", "This kind of repository needs a plugin on every node."),
    (r"path\.repo", PATH_REPO),
    (
        r"access_denied|AccessDeniedException|failed to create blob container|Permission denied",
        "The elasticsearch user may not write the repository's directory. On every node:\n"
        "sudo chown -R elasticsearch: THAT_DIRECTORY && sudo chmod 750 THAT_DIRECTORY",
    ),
    (
        r"allow_insecure_settings|Unable to load AWS credentials|InvalidAccessKeyId|SignatureDoesNotMatch|"
        r"No AWS Credentials|security token|Unable to load credentials",
        "Elasticsearch itself holds the S3 key, in each node's keystore. " + KEYSTORE,
    ),
    (r"Unknown s3 client name", "Its settings stand in each node's keystore. " + KEYSTORE),
    (
        r"NoSuchBucket|bucket does not exist|The specified bucket",
        f"Make the bucket, or see es_snapshot_bucket: {CONFIG}",
    ),
    (
        r"UnknownHost|nodename nor servname|Name or service not known",
        "Elasticsearch 6.8 asks for BUCKET.ENDPOINT unless the endpoint is an IP address: give aws_endpoint as an "
        "IP address, or let DNS answer for every name below it.",
    ),
    (
        r"Connection refused|[Cc]onnect timed out|No route to host",
        f"The nodes cannot reach the S3 endpoint: try it from a node, or see aws_endpoint: {CONFIG}",
    ),
    (r"Unsupported or unrecognized SSL message", "The endpoint speaks http: write aws_endpoint with http://"),
    (r"PKIX|certificate", "The nodes' Java does not trust the endpoint's certificate: add it to their truststore."),
    (
        r"AccessDenied|Access Denied|AllAccessDisabled",
        "The nodes' S3 key may not use that bucket: allow it ListBucket, GetObject, PutObject and DeleteObject there.",
    ),
    (r"No space left on device", "Free space in the repository first: a full one cannot even delete its snapshots."),
    (r"readonly repository", "Another cluster writes to it; this one only restores from it."),
)  # fmt: skip
_WORDS = re.compile(r"[^\x20-\x7e\u00a0-\uffff]")


def unreachable(url: str, method: str, path: str, error: OSError) -> ServiceError:
    """Return what it means that there was no whole answer; Unanswered when the request may have been heard."""
    cause = _network_words(error)
    never_heard = (
        isinstance(error, (requests.ConnectTimeout, requests.exceptions.SSLError))
        or cause
        in (
            "connection refused",
            "its name is not known to DNS",
        )
        or not isinstance(error, requests.RequestException)
    )
    kind = ServiceError if never_heard else Unanswered
    return kind(
        f"the Elasticsearch at {url} did not answer {method} {path[:200]}: {cause}",
        hint=f"See whether it runs: curl -sS {url}/ ; elasticsearch_url: {CONFIG}",
        status=0,
        type="",
        reason=cause,
    )


def answered(method: str, url: str, status: int, body: Any) -> ServiceError:
    """Return what an answer means that is not what was asked for; the facts carry status, type and reason."""
    base, _, path = url.partition("://")[2].partition("/")
    where = f"{url.partition('://')[0]}://{base}"
    kind, words = told(body)
    cause = words or "it did not say why"
    return ServiceError(
        f"the Elasticsearch at {where} answered {status} to {method} /{path[:200]}: {cause}",
        hint=_hint(where, status, words),
        status=status,
        type=kind,
        reason=words,
    )


def told(body: Any) -> tuple[str, str]:
    """Return an error's type and its chain of reasons, the deepest last."""
    error = body.get("error") if isinstance(body, dict) else body
    if not isinstance(error, dict):
        return "", clean(str(error or ""))[:500]
    return str(error.get("type") or ""), " <- ".join(dict.fromkeys(_chain(error)))[:2000]


def _chain(error: Any, depth: int = 20) -> Iterator[str]:
    while isinstance(error, dict) and depth:
        if error.get("reason"):
            yield clean(str(error["reason"]))
        error, depth = error.get("caused_by"), depth - 1


def clean(text: str) -> str:
    """Return untrusted text as one printable line."""
    return _WORDS.sub("?", text.replace("\n", " "))


def hint_for(words: str, url: str = "http://127.0.0.1:9200") -> str:
    """Return what mends a repository that failed with such words; nothing when they say nothing known."""
    # What is said deepest is the truth.
    for reason in reversed(words.split(" <- ")):
        for pattern, hint in MEANINGS:
            if re.search(pattern, reason):
                return hint.replace("{url}", url)
    return ""


def _hint(url: str, status: int, words: str) -> str:
    if status == 401:
        return (
            f"Set elasticsearch_username and elasticsearch_password to a user who may snapshot; see {CONFIG}."
        )
    if status == 403 and "block" in words:
        return (
            "The cluster is blocked: see what blocks it (GET _cluster/settings, free disk), then lift that."
        )
    if status == 403:
        return f"Its user may not: give it the cluster privilege manage and all on indices; see {CONFIG}."
    if status in (400, 404, 405) and not words.strip():
        return f"Is that an Elasticsearch, and no proxy? curl -sS {url}/"
    return hint_for(words, url) or "Look at Elasticsearch's log, then repeat the command."


def _network_words(error: OSError) -> str:
    """Return the cause."""
    text = str(error)
    if not isinstance(error, requests.RequestException):
        # Its own certificates cannot be read: requests says so before anything is sent.
        return text[:300]
    if isinstance(error, requests.exceptions.SSLError) or "SSL" in text:
        if "WRONG_VERSION" in text or "wrong version number" in text:
            return "it does not speak https: write elasticsearch_url with http://"
        if "expired" in text:
            return "its certificate has expired"
        if (wrong := re.search(r"Hostname mismatch|IP address mismatch|doesn't match", text)) is not None:
            asked = re.search(r"not valid for '([^']+)'", text[wrong.start() :])
            return f"its certificate is for another name than {asked[1] if asked else 'the one asked for'}"
        return "its certificate is not trusted: name its authority in elasticsearch_ca_file"
    return network_words(error)
