"""What S3 and the network answer, told as causes with something to do about them.

Error codes: https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from botocore import exceptions as boto
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

from hq_backups.engine import errors
from hq_backups.engine.config import S3Config
from hq_backups.engine.errors import HQBackupsError, RepositoryError

CONFIG = "list_backups --config"

_BUCKET = {"NoSuchBucket"}
_OBJECT = {"NoSuchKey", "NoSuchVersion", "NotFound", "404", "MethodNotAllowed", "405"}
_DENIED = {"AccessDenied", "AllAccessDisabled", "AccountProblem", "Forbidden", "403"}
_CREDENTIALS = {
    "InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken", "InvalidSecurity",
    "AuthFailure", "NotSignedUp", "Unauthorized", "UnauthorizedAccess", "401",
    "XAdminUserNotFound",
}  # fmt: skip
_REGION = {
    "PermanentRedirect", "TemporaryRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraint",
    "IllegalLocationConstraintException", "InvalidRegion", "301", "307",
}  # fmt: skip
_CLOCK = {"RequestTimeTooSkewed", "RequestExpired"}
_BUSY = {
    "InternalError", "SlowDown", "SlowDownRead", "SlowDownWrite", "ServiceUnavailable", "Busy",
    "RequestTimeout", "OperationAborted", "ConditionalRequestConflict", "Throttling", "ThrottlingException",
    "TooManyRequests", "RequestLimitExceeded", "BandwidthLimitExceeded", "IncompleteBody",
    "XMinioServerNotInitialized",
}  # fmt: skip
_CORRUPTED = {
    "BadDigest", "InvalidDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch",
    "ContentSHA256Mismatch", "InvalidChunk",
}  # fmt: skip
_NETWORK = (
    boto.ConnectionError,
    boto.HTTPClientError,
    boto.IncompleteReadError,
    ResponseParserError,
    HTTPError,
    OSError,
)

FAILURES = (boto.ClientError, boto.BotoCoreError, ResponseParserError, HTTPError)
"""What a request can raise."""


class CutAnswer(boto.ConnectionClosedError):
    """An answer that ended in the middle: http.client takes half of the headers for all of them."""

    def __init__(self, what: str) -> None:
        """Say which answer."""
        super().__init__(endpoint_url=what)


@contextlib.contextmanager
def explained(config: S3Config, bucket: str, key: str | None = None) -> Iterator[None]:
    """Raise what goes wrong inside as errors of ours."""
    try:
        yield
    except (*FAILURES, OSError) as error:
        raise translate(error, config, bucket, key) from error


def code_of(error: BaseException) -> str:
    """Return the service's error code; empty when it did not answer."""
    return str(error.response.get("Error", {}).get("Code", "")) if isinstance(error, boto.ClientError) else ""


def status_of(error: BaseException) -> int:
    """Return the HTTP status of the answer; 0 when there was none."""
    if not isinstance(error, boto.ClientError):
        return 0
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def is_transient(error: BaseException) -> bool:
    """Tell whether the same request may succeed later: nobody answered, or the service was busy."""
    if isinstance(error, boto.ClientError):
        return code_of(error) in _BUSY or status_of(error) in (429, 500, 502, 503, 504)
    return isinstance(error, _NETWORK) and not isinstance(error, boto.SSLError)


def is_corrupted(error: BaseException) -> bool:
    """Tell whether the service says that other bytes arrived than were sent."""
    return code_of(error) in _CORRUPTED


def is_unsupported(error: BaseException) -> bool:
    """Tell whether the service does not know what was asked."""
    return code_of(error) in ("NotImplemented", "501", "XNotImplemented") or status_of(error) == 501


def is_missing(error: BaseException) -> bool:
    """Tell whether the service says that there is no such object; HEAD says no more than 404."""
    return code_of(error) in _OBJECT


def translate(error: Exception, config: S3Config, bucket: str, key: str | None = None) -> HQBackupsError:
    """Return what an error of botocore means, with what to do next."""
    endpoint = config.endpoint or "AWS S3"
    if isinstance(error, boto.ClientError):
        return _answered(error, config, endpoint, bucket, key)
    if isinstance(
        error, (boto.NoCredentialsError, boto.PartialCredentialsError, boto.CredentialRetrievalError)
    ):
        return errors.BadCredentials("there is none", endpoint=endpoint, hint=_KEYS_HINT)
    if isinstance(error, boto.SSLError):
        hint = f"Look at aws_endpoint ({CONFIG}), the service's certificate and this host's clock."
        return errors.Unreachable(f"TLS: {_innermost(error)}", endpoint=endpoint, hint=hint)
    if isinstance(error, _NETWORK):
        hint = f"Look at aws_endpoint ({CONFIG}) and at the network: curl -sSI {config.endpoint or 'https://s3.amazonaws.com'}"
        return errors.Unreachable(_network_words(error), endpoint=endpoint, hint=hint)
    if isinstance(error, (boto.InvalidRegionError, boto.NoRegionError)):
        return errors.WrongRegion(
            str(error), bucket=bucket, region=config.region, hint=f"Set aws_region; see {CONFIG}."
        )
    return RepositoryError(f"{endpoint}, bucket {bucket}: {error}", hint=f"See the settings: {CONFIG}")


_KEYS_HINT = f"Set AMAZON_S3_ACCESS_KEY and AMAZON_S3_SECRET_KEY; what is set: {CONFIG}"


def _answered(
    error: boto.ClientError, config: S3Config, endpoint: str, bucket: str, key: str | None
) -> HQBackupsError:
    body: dict[str, Any] = dict(error.response.get("Error", {}))
    code = code_of(error)
    words = str(body.get("Message") or code)
    where = f"s3://{bucket}/{key}" if key else f"bucket {bucket}"
    if code in _BUCKET or (code in ("404", "NotFound") and key is None):
        return errors.NoSuchBucket(
            bucket=bucket,
            endpoint=endpoint,
            hint=f"Make the bucket, or correct its name (…_snapshot_bucket) or aws_endpoint; see {CONFIG}.",
        )
    if code in _OBJECT or (code == "InvalidArgument" and "version id" in words.lower()):
        return errors.NoSuchObject(key=key or "what was asked for", bucket=bucket)
    if code == "InvalidObjectState":
        return RepositoryError(
            f"{where} is archived and cannot be read now: {words}",
            hint="Have the service bring it back first (aws s3api restore-object), then repeat the command.",
        )
    if code in _CREDENTIALS:
        return errors.BadCredentials(f"{words} ({code})", endpoint=endpoint, hint=_KEYS_HINT)
    if code in _DENIED:
        return errors.AccessDenied(
            f"{words} ({error.operation_name})",
            what=where,
            hint=f"Allow this S3 key to do {error.operation_name} there, or set another one; see {CONFIG}.",
        )
    if code in _REGION:
        headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
        theirs = body.get("Region") or headers.get("x-amz-bucket-region")
        return errors.WrongRegion(
            f"it is in {theirs}" if theirs else words,
            bucket=bucket,
            region=config.region or "(unset)",
            hint=f"Set aws_region: {theirs}"
            if theirs
            else f"Set aws_region and aws_endpoint to the bucket's; see {CONFIG}.",
        )
    if code in _CLOCK:
        return errors.ClockSkew(words, endpoint=endpoint)
    return RepositoryError(
        f"{endpoint} answered {code or status_of(error)} to {error.operation_name} of {where}: {words}",
        hint="The service is busy or ill: repeat the command later." if is_transient(error) else None,
    )


def _network_words(error: Exception) -> str:
    text = _innermost(error)
    if "resolve" in text or "Name or service not known" in text or "name resolution" in text:
        return "its name is not known to DNS"
    if "refused" in text:
        return "connection refused"
    if isinstance(error, boto.ConnectTimeoutError) or "unreachable" in text or "No route" in text:
        return "no connection in time" if "unreachable" not in text else "network unreachable"
    if isinstance(error, ResponseParserError):
        return f"its answer is no S3 answer ({text})"
    if isinstance(error, (boto.ReadTimeoutError, TimeoutError)) or "timed out" in text:
        return "no answer in time"
    if "reset" in text or isinstance(error, boto.ConnectionClosedError):
        return "the connection was closed before the answer"
    return text


def _innermost(error: BaseException) -> str:
    """Return the words of the first cause: botocore's own are about its classes."""
    inner: Any = error
    for _ in range(8):
        kwargs = getattr(inner, "kwargs", None)
        deeper = kwargs.get("error") if isinstance(kwargs, dict) else getattr(inner, "reason", None)
        if not isinstance(deeper, BaseException):
            break
        inner = deeper
    return str(inner)
