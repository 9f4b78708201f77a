"""A real node behind TLS and a password."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hq_backups.engine.elasticsearch.client import Address, Cluster
from hq_backups.engine.errors import ServiceError
from tests.integration.es_helpers import Host, contents, fill, host_of
from tests.testbed.certificates import Authority
from tests.testbed.elasticsearch import ElasticsearchNode
from tests.testbed.gate import Gate

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.elasticsearch6]
PASSWORD = "pw-of-hq-4711"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def gate(es6: ElasticsearchNode, authority: Authority) -> Iterator[Gate]:
    with Gate(es6.url, authority.sign("localhost"), {"hq": PASSWORD, "eve": "e"}, ("eve",)) as made:
        yield made


@pytest.fixture
def host(es6: ElasticsearchNode, gate: Gate, authority: Authority) -> Iterator[Host]:
    with host_of(es6) as made:
        fill(es6, documents=2)
        made.settings |= {
            "elasticsearch_url": gate.url,
            "elasticsearch_username": "hq",
            "elasticsearch_password": PASSWORD,
            "elasticsearch_ca_file": str(authority.file),
        }
        yield made


def test_everything_is_done_through_it_and_the_password_stands_nowhere(host: Host, gate: Gate) -> None:
    before = contents(host.node)
    said = [host.good("run_backup", "elasticsearch", "--type", "daily")]
    host.node.bulk("forms", {"late": {"name": "late"}})
    later = contents(host.node)
    said += [
        host.good("list_backups", "elasticsearch"),
        host.good("check_s3_backups", "elasticsearch"),
        host.restore("latest", "--indices", "forms"),
    ]
    assert contents(host.node) == before
    said.append(host.restore("--undo"))
    assert [each.code for each in said] == [0] * 5
    assert contents(host.node) == later
    assert gate.passed
    assert gate.refused == []
    assert not [each for each in said if PASSWORD in each.text]
    assert not [p for p in host.records.rglob("*") if p.is_file() and PASSWORD.encode() in p.read_bytes()]


@pytest.mark.parametrize(
    ("changes", "status", "code", "said"),
    [
        ({"elasticsearch_password": "wrong-4711"}, 401, 1, "elasticsearch_password"),
        ({"elasticsearch_username": None, "elasticsearch_password": None}, 401, 1, "elasticsearch_password"),
        (
            {"elasticsearch_username": "eve", "elasticsearch_password": "e"},
            403,
            5,
            "is unauthorized for user [eve]",
        ),
    ],
    ids=["wrong", "missing", "no-right"],
)
def test_who_may_not_is_told_so_and_nothing_is_done(
    host: Host, gate: Gate, changes: dict[str, Any], status: int, code: int, said: str
) -> None:
    ended = host.run("run_backup", "elasticsearch", **changes)
    assert ended.code == code, ended.text
    assert said in ended.err
    assert "  next: " in ended.err
    assert "4711" not in ended.text
    assert set(gate.refused) == {status}
    assert host.node.request("GET", "/_snapshot") == {}


def test_the_second_address_is_asked_over_tls_too(host: Host, gate: Gate) -> None:
    ended = host.good("list_backups", "elasticsearch", elasticsearch_url=["https://localhost:1", gate.url])
    assert "is not registered" in ended.err


class TestCertificates:
    def test_one_of_an_unknown_authority_is_refused_before_the_password_is_sent(
        self, host: Host, gate: Gate, tmp_path: Path
    ) -> None:
        (tmp_path / "other").mkdir()
        other = Authority(tmp_path / "other")
        for file in (None, str(other.file)):
            ended = host.run("run_backup", "elasticsearch", elasticsearch_ca_file=file)
            assert ended.code == 1, ended.text
            assert "name its authority in elasticsearch_ca_file" in ended.err
        assert gate.passed == gate.refused == []

    @pytest.mark.parametrize(
        ("name", "days", "said"),
        [
            ("es0.example.com", 1, "its certificate is for another name than localhost"),
            ("localhost", -1, "its certificate has expired"),
        ],
        ids=["another-name", "expired"],
    )
    def test_one_that_is_wrong_itself_is_said_to_be(
        self, host: Host, authority: Authority, name: str, days: int, said: str
    ) -> None:
        with Gate(host.node.url, authority.sign(name, days=days), {"hq": PASSWORD}) as gate:
            ended = host.run("run_backup", "elasticsearch", elasticsearch_url=gate.url)
        assert (ended.code, said in ended.err) == (1, True), ended.text
        assert gate.passed == gate.refused == []

    def test_a_file_that_is_missing_is_said(self, gate: Gate) -> None:
        with pytest.raises(ServiceError, match="no-such-file"):
            _ = Cluster(Address((gate.url,), ca_file="/no-such-file.pem")).about

    def test_a_node_without_tls_is_said_to_be_one(self, host: Host) -> None:
        ended = host.run(
            "run_backup", "elasticsearch", elasticsearch_url=host.node.url.replace("http", "https")
        )
        assert (ended.code, "write elasticsearch_url with http://" in ended.err) == (1, True), ended.text
