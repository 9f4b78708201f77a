"""What a document's attachments are, as its node would say (CouchDB's couch_att.erl)."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from hq_backups.engine.couch.blocks import Damaged

_FIELDS = 8
"""``{Name, Type, Places, StoredLength, Length, RevPos, Md5, Encoding}``, since CouchDB 1.0."""


def stubs(term: object) -> Mapping[str, Mapping[str, Any]]:
    """Return the stub of every attachment by its name; raise ValueError when the term is no such list."""
    if not isinstance(term, list):
        raise Damaged(_NONE)
    return dict(map(_stub, term))


def _stub(term: object) -> tuple[str, Mapping[str, Any]]:
    if not isinstance(term, tuple) or len(term) != _FIELDS:
        raise Damaged(_NONE)
    name, kind, _, _, length, revpos, md5, _ = term
    if not (isinstance(name, bytes) and isinstance(kind, bytes) and isinstance(md5, bytes)):
        raise Damaged(_NONE)
    if not (isinstance(length, int) and isinstance(revpos, int)):
        raise Damaged(_NONE)
    return name.decode("utf-8"), {
        "content_type": kind.decode("utf-8"),
        "revpos": revpos,
        "digest": "md5-" + base64.b64encode(md5).decode("ascii"),
        "length": length,
        "stub": True,
    }


_NONE = "a document's attachments are not readable"
