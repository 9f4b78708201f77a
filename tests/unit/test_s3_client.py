from __future__ import annotations

import threading
from pathlib import Path

import pytest

from hq_backups.engine.config import S3Config
from hq_backups.engine.errors import ConfigurationError
from hq_backups.engine.repository.s3_client import Network, is_aws, make_client
from hq_backups.engine.repository.s3_pace import Pace


@pytest.mark.parametrize(
    ("endpoint", "aws"),
    [
        (None, True),
        ("https://s3.eu-west-1.amazonaws.com", True),
        ("https://s3.cn-north-1.amazonaws.com.cn", True),
        ("https://s3.example.org", False),
        ("https://amazonaws.com.example.org", False),
    ],
)
def test_aws_is_told_from_the_rest_by_its_host(endpoint: str | None, aws: bool) -> None:
    assert is_aws(endpoint) is aws


def url(config: S3Config) -> str:
    where: str = make_client(config).generate_presigned_url(
        "get_object", Params={"Bucket": "the-bucket", "Key": "k"}
    )
    return where


def test_other_services_are_addressed_by_path_whatever_the_users_own_file_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "config"
    file.write_text("[default]\ns3 =\n  addressing_style = virtual\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(file))
    signed = url(S3Config("a", "s", "https://s3.example.org:9000"))
    assert signed.startswith("https://s3.example.org:9000/the-bucket/k?")


def test_aws_is_addressed_by_host() -> None:
    assert url(S3Config("a", "s", None, "eu-west-1")).startswith("https://the-bucket.s3.")


def test_aws_needs_no_region(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_DEFAULT_REGION", raising=False)
    assert "the-bucket" in url(S3Config("a", "s"))


def test_an_impossible_endpoint_is_a_matter_of_settings() -> None:
    with pytest.raises(ConfigurationError, match="S3 cannot be used"):
        make_client(S3Config("a", "s", "s3.example.org"))


def test_waits_end_and_nothing_is_sent_that_older_services_do_not_know() -> None:
    options = make_client(
        S3Config("a", "s", "https://s3.example.org"), Network(connect=3, read=7)
    ).meta.config
    assert (options.connect_timeout, options.read_timeout) == (3, 7)  # type: ignore[attr-defined]
    assert options.request_checksum_calculation == "when_required"  # type: ignore[attr-defined]
    assert options.tcp_keepalive  # type: ignore[attr-defined]


def test_senders_together_stay_below_the_rate() -> None:
    waited: list[float] = []

    class Stop(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waited.append(timeout or 0.0)
            return False

    now = [100.0]
    pace = Pace(1000, Stop(), clock=lambda: now[0])
    pace(500)
    pace(500)
    now[0] += 10
    pace(100)
    assert waited == pytest.approx([0.5, 1.0, 0.1])
