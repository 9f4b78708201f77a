"""What a real server said of repositories that it could not use: the deepest cause decides what mends it."""

from __future__ import annotations

from typing import Any

import pytest

from hq_backups.engine.elasticsearch.faults import answered, told


def body(*reasons: str) -> dict[str, Any]:
    """Return a failure whose causes lie one in the other, as 6.8 nests them."""
    error: dict[str, Any] = {}
    for reason in reversed(reasons):
        error = {"type": "repository_verification_exception", "reason": reason, "caused_by": error}
    return {"error": error, "status": 500}


OUTER = "[x] path [env/es] is not accessible on master node"


@pytest.mark.parametrize(
    ("reasons", "mends"),
    [
        (
            (
                OUTER,
                "Unable to upload object",
                "The specified bucket does not exist (Error Code: NoSuchBucket)",
            ),
            "es_snapshot_bucket",
        ),
        (
            (OUTER, "The request signature we calculated does not match (Error Code: SignatureDoesNotMatch)"),
            "http://es0:9200/_nodes/reload_secure_settings",
        ),
        (
            (OUTER, "Unable to execute HTTP request", "Connection refused (Connection refused)"),
            "aws_endpoint",
        ),
        ((OUTER, "Unable to execute HTTP request", "esb.localhost"), "Look at Elasticsearch's log"),
        ((OUTER, "java.net.UnknownHostException: esb.localhost"), "as an IP address"),
        (
            (OUTER, "Unable to execute HTTP request", "Unsupported or unrecognized SSL message"),
            "write aws_endpoint with http://",
        ),
        (("Unknown s3 client name [other]. Existing client configs: default",), "elasticsearch-keystore add"),
        (
            ("Setting [access_key] is insecure, but property [allow_insecure_settings] is not set",),
            "elasticsearch-keystore add",
        ),
        (("[x] repository type [s3] does not exist",), "elasticsearch-plugin install repository-s3"),
        (
            (
                "[x] failed to create repository",
                "[x] location [/a] doesn't match any of the locations specified by path.repo because this setting is "
                "empty",
            ),
            "path.repo: [",
        ),
        (
            (OUTER, "Access Denied (Service: Amazon S3; Status Code: 403; Error Code: AccessDenied)"),
            "ListBucket",
        ),
        ((OUTER, "failed to create blob container", "/a/tests: Permission denied"), "chown -R elasticsearch"),
        # Two known causes: only the deeper one mends it.
        (
            (OUTER, "failed to create blob container", "No space left on device"),
            "Free space in the repository",
        ),
        ((OUTER, "PKIX path building failed: unable to find valid certification path"), "truststore"),
        (
            ("failed to update snapshot in repository", "No space left on device"),
            "cannot even delete its snapshots",
        ),
    ],
    ids=lambda value: value[-1][:30] if isinstance(value, tuple) else None,
)
def test_the_deepest_cause_decides_and_every_cause_is_told(reasons: tuple[str, ...], mends: str) -> None:
    error = answered("PUT", "http://es0:9200/_snapshot/x", 500, body(*reasons))
    assert " <- ".join(reasons) in error.message
    assert mends in error.hint


def test_an_error_that_is_only_text_is_told_too() -> None:
    said = {"error": "Content-Type header [] is not supported", "status": 406}
    assert told(said) == ("", "Content-Type header [] is not supported")
