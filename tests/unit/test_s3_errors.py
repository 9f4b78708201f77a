from __future__ import annotations

from typing import Any

import pytest
from botocore import exceptions as boto

from hq_backups.engine import errors
from hq_backups.engine.config import S3Config
from hq_backups.engine.errors import Exit, HQBackupsError
from hq_backups.engine.repository.s3_client import explained
from hq_backups.engine.repository.s3_errors import is_corrupted, is_transient, is_unsupported, translate

CONFIG = S3Config("AKIAEXAMPLE", "s3cr3t-key", "https://s3.example.org", region="eu-west-1")


def answered(code: str, status: int = 400, **more: Any) -> boto.ClientError:
    body = {"Code": code, "Message": "as the service says", **more}
    response: Any = {"Error": body, "ResponseMetadata": {"HTTPStatusCode": status, "HTTPHeaders": {}}}
    return boto.ClientError(response, "PutObject")


def told(error: Exception, key: str | None = "a/key") -> HQBackupsError:
    return translate(error, CONFIG, "the-bucket", key)


@pytest.mark.parametrize(
    ("code", "status", "expected", "hint"),
    [
        ("NoSuchBucket", 404, errors.NoSuchBucket, "_snapshot_bucket"),
        ("NoSuchKey", 404, errors.NoSuchObject, "list_backups --source s3"),
        ("NoSuchVersion", 404, errors.NoSuchObject, "list_backups"),
        ("AccessDenied", 403, errors.AccessDenied, "PutObject"),
        ("403", 403, errors.AccessDenied, "list_backups --config"),
        ("InvalidAccessKeyId", 403, errors.BadCredentials, "AMAZON_S3_ACCESS_KEY"),
        ("SignatureDoesNotMatch", 403, errors.BadCredentials, "AMAZON_S3_SECRET_KEY"),
        ("PermanentRedirect", 301, errors.WrongRegion, "aws_region"),
        ("AuthorizationHeaderMalformed", 400, errors.WrongRegion, "aws_region"),
        ("IllegalLocationConstraintException", 400, errors.WrongRegion, "aws_region"),
        ("RequestTimeTooSkewed", 403, errors.ClockSkew, "timedatectl"),
        ("InvalidObjectState", 403, errors.RepositoryError, "restore-object"),
        ("SlowDown", 503, errors.RepositoryError, "later"),
    ],
)
def test_each_answer_has_its_cause_and_what_to_do(
    code: str, status: int, expected: type[HQBackupsError], hint: str
) -> None:
    error = told(answered(code, status))
    assert type(error) is expected
    assert hint in error.hint
    assert "the-bucket" in error.message or "s3.example.org" in error.message


def test_no_backup_there_is_told_apart_from_every_other_cause() -> None:
    assert told(answered("404", 404)).exit_code is Exit.BAD_BACKUP
    assert isinstance(told(answered("404", 404), key=None), errors.NoSuchBucket)
    for code in ("NoSuchBucket", "AccessDenied", "InvalidAccessKeyId", "PermanentRedirect"):
        assert not isinstance(told(answered(code)), errors.NoSuchObject)


def test_the_region_that_the_service_names_is_passed_on() -> None:
    error = told(answered("AuthorizationHeaderMalformed", 400, Region="garage"))
    assert error.message == "bucket the-bucket is not in region eu-west-1: it is in garage"
    assert error.hint == "Set aws_region: garage"


def test_a_malformed_version_id_is_an_object_that_is_not_there() -> None:
    error = told(answered("InvalidArgument", 400, Message="Invalid version id specified"))
    assert isinstance(error, errors.NoSuchObject)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (boto.EndpointConnectionError(endpoint_url="x", error=OSError("Connection refused")), "refused"),
        (boto.EndpointConnectionError(endpoint_url="x", error=OSError("Failed to resolve 'x'")), "DNS"),
        (boto.ReadTimeoutError(endpoint_url="x"), "no answer in time"),
        (boto.ConnectTimeoutError(endpoint_url="x"), "no connection in time"),
        (boto.ConnectionClosedError(endpoint_url="x"), "closed before the answer"),
        (boto.SSLError(endpoint_url="x", error=OSError("certificate verify failed")), "TLS: certificate"),
    ],
)
def test_a_network_that_fails_is_unreachable_in_plain_words(error: Exception, words: str) -> None:
    found = told(error)
    assert isinstance(found, errors.Unreachable)
    assert words in found.message


def test_no_key_at_all_is_a_matter_of_credentials() -> None:
    assert isinstance(told(boto.NoCredentialsError()), errors.BadCredentials)


def test_a_name_that_is_no_bucket_is_explained() -> None:
    error = told(boto.ParamValidationError(report='Invalid bucket name "Ö"'))
    assert isinstance(error, errors.RepositoryError)
    assert "Invalid bucket name" in error.message


def test_causes_are_chained_and_secrets_are_in_none_of_them() -> None:
    cause = answered("SignatureDoesNotMatch", 403)
    with pytest.raises(errors.BadCredentials) as caught, explained(CONFIG, "the-bucket", "key"):
        raise cause
    assert caught.value.__cause__ is cause
    for text in (str(caught.value), caught.value.hint, repr(caught.value), repr(CONFIG), str(cause)):
        assert "s3cr3t-key" not in text


def test_errors_of_ours_pass_unchanged() -> None:
    with pytest.raises(errors.ObjectMismatch), explained(CONFIG, "b"):
        raise errors.ObjectMismatch("x", key="k", bucket="b")


@pytest.mark.parametrize(
    ("error", "transient", "corrupted", "unsupported"),
    [
        (answered("SlowDown", 503), True, False, False),
        (answered("InternalError", 500), True, False, False),
        (answered("RequestTimeout", 400), True, False, False),
        (boto.ConnectionClosedError(endpoint_url="x"), True, False, False),
        (boto.SSLError(endpoint_url="x", error=OSError("y")), False, False, False),
        (answered("AccessDenied", 403), False, False, False),
        (answered("BadDigest", 400), False, True, False),
        (answered("NotImplemented", 501), False, False, True),
    ],
)
def test_what_is_worth_another_try(
    error: Exception, transient: bool, corrupted: bool, unsupported: bool
) -> None:
    assert (is_transient(error), is_corrupted(error), is_unsupported(error)) == (
        transient,
        corrupted,
        unsupported,
    )
