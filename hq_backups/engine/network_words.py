"""What went wrong between us and a server that speaks HTTP; requests' own words are about its classes."""

from __future__ import annotations

import requests


def network_words(error: requests.RequestException) -> str:
    """Return the cause."""
    text = str(error)
    if "refused" in text:
        return "connection refused"
    if isinstance(error, requests.ConnectTimeout):
        return "no connection in time"
    if isinstance(error, requests.Timeout) or "timed out" in text:
        return "no answer in time"
    if "resolve" in text or "Name or service not known" in text or "name resolution" in text:
        return "its name is not known to DNS"
    if isinstance(error, requests.exceptions.ContentDecodingError):
        return text
    if "reset" in text or "aborted" in text or "Incomplete" in text or "closed" in text:
        return "the connection was closed before the whole answer"
    return type(error).__name__
