"""A client for AWS and for any other S3 service, with waits that end.

From botocore, boto3's lower half: its upper one is not used here, and takes a tenth of a second to load.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

from botocore.config import Config as BotoConfig
from botocore.session import Session

from hq_backups.engine.config import S3Config
from hq_backups.engine.errors import ConfigurationError
from hq_backups.engine.repository.s3_errors import CutAnswer, explained
from hq_backups.engine.repository.s3_http import demand_whole_answers

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

__all__ = ["Network", "explained", "is_aws", "make_client"]

_ANSWER_WITH_XML = (
    "CompleteMultipartUpload",
    "CreateMultipartUpload",
    "GetBucketVersioning",
    "ListMultipartUploads",
    "ListObjectVersions",
    "ListObjectsV2",
)

SIGNING_REGION = "us-east-1"
"""What botocore signs with when a service that is not AWS has no region set."""


@dataclass(frozen=True)
class Network:
    """How long to wait, and how often to try; all in seconds."""

    connect: float = 10.0
    """Also bounds each wait while a request's body is sent on a new connection."""
    read: float = 60.0
    attempts: int = 3
    """Of one small request."""
    patience: float = 600.0
    """For how long one part or range is tried again while nothing gets through."""
    commit: float = 900.0
    """For the answer that completes an upload: some services join the parts before they answer."""


def is_aws(endpoint: str | None) -> bool:
    """Tell whether an endpoint is AWS itself."""
    if endpoint is None:
        return True
    host = urlsplit(endpoint).hostname or ""
    return host.endswith((".amazonaws.com", ".amazonaws.com.cn"))


def make_client(
    config: S3Config,
    network: Network | None = None,
    *,
    attempts: int | None = None,
    read: float | None = None,
    session: Session | None = None,
) -> S3Client:
    """Return a client; it is safe to share between threads, making two of one session at once is not."""
    network = network or Network()
    aws = is_aws(config.endpoint)
    options: dict[str, Any] = {
        "connect_timeout": network.connect,
        "read_timeout": network.read if read is None else read,
        "retries": {"mode": "standard", "total_max_attempts": attempts or network.attempts},
        "tcp_keepalive": True,
        "max_pool_connections": 10,
        # Every upload here carries its own checksum as a plain header: no trailers, which older services
        # store inside the object.
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
        "user_agent_extra": "hq_backups",
    }
    if not aws:
        options["s3"] = {"addressing_style": "path"}
    try:
        client = (session or Session()).create_client(
            "s3",
            endpoint_url=config.endpoint,
            region_name=config.region or (None if aws else SIGNING_REGION),
            aws_access_key_id=config.access_key,
            aws_secret_access_key=config.secret_key,
            config=BotoConfig(**options),
        )
    except ValueError as error:
        raise ConfigurationError(
            f"S3 cannot be used with these settings: {error}",
            hint="See aws_endpoint and aws_region: list_backups --config",
        ) from error
    demand_whole_answers(client)
    for operation in _ANSWER_WITH_XML:
        client.meta.events.register(f"before-parse.s3.{operation}", _refuse_nothing)
    return cast("S3Client", client)


def _refuse_nothing(response_dict: dict[str, Any], operation_model: Any, **_: Any) -> None:
    """Raise CutAnswer for a success without its body: it would pass for an empty list, or for no versions."""
    if response_dict["status_code"] < 300 and not response_dict["body"]:
        raise CutAnswer(operation_model.name)
