"""Run a real Elasticsearch node, and fetch it."""

from __future__ import annotations

import os
import shutil
import zipfile
from typing import TYPE_CHECKING, Any

from tests.testbed.cache import ProvisionError, publish, run, scratch
from tests.testbed.packages import apt_install
from tests.testbed.places import IS_ROOT, cache_dir, server_user
from tests.testbed.process import LOOPBACK, ChildService, give, listening, wait_until

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

VERSIONS = {6: "6.8.23", 7: "7.17.28"}
ARTIFACT = "org.elasticsearch.distribution.integ-test-zip:elasticsearch"
JDK = "openjdk-17-jre-headless"
CONFIG = """\
cluster.name: hqb
node.name: n0
network.host: 127.0.0.1
http.port: {port}
transport.{tcp}port: {transport}
discovery.type: single-node
path.data: {data}
path.logs: {logs}
path.repo: {repositories}
cluster.routing.allocation.disk.threshold_enabled: false
"""


def home(version: int) -> Path:
    """Return where a version's distribution lies."""
    return cache_dir() / f"elasticsearch-{version}"


def java() -> str | None:
    """Return the Java that runs it."""
    return shutil.which("java")


def elasticsearch(cache: Path) -> None:
    """Unpack the open servers of HQ's version and of the next."""
    needed = [name for name, there in ((JDK, java()), ("maven", shutil.which("mvn"))) if not there]
    missing = [v for v in VERSIONS if not (cache / f"elasticsearch-{v}" / "lib").is_dir()]
    if not missing:
        needed = [name for name in needed if name == JDK]
    if needed:
        if not IS_ROOT or not shutil.which("apt-get"):
            msg = f"Elasticsearch needs what is not installed: {' '.join(needed)}"
            raise ProvisionError(msg)
        apt_install(needed)
    for version in missing:
        with scratch(cache) as work:
            artifact = f"{ARTIFACT}:{VERSIONS[version]}:zip"
            run(
                "mvn", "--quiet", "--batch-mode", "dependency:copy", f"-Dartifact={artifact}",
                f"-DoutputDirectory={work}", cwd=work,
            )  # fmt: skip
            with zipfile.ZipFile(next(work.glob("*.zip"))) as packed:
                packed.extractall(work / "tree")
            publish(work / "tree" / f"elasticsearch-{VERSIONS[version]}", cache / f"elasticsearch-{version}")


class ElasticsearchNode(ChildService):
    """A cluster of one node, with ``repositories`` as its path.repo."""

    name = "elasticsearch"

    def __init__(
        self,
        version: int,
        workdir: Path,
        repositories: Path | None = None,
        *,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        """Prepare to run a version in ``workdir``; ``settings`` are added to its configuration."""
        super().__init__(workdir)
        self.version = version
        self.os_user = server_user()
        self.config = workdir / "config"
        self.data = workdir / "data"
        self.repositories = repositories or workdir / "repositories"
        self.transport = 0
        self._settings = settings or {}

    @staticmethod
    def unavailable(version: int) -> str:
        """Say why it cannot be started here; empty when it can."""
        if not (home(version) / "lib").is_dir():
            return f"Elasticsearch {version} is not on this machine (make testbed)"
        return "" if java() else "java is not on this machine (make testbed)"

    @property
    def url(self) -> str:
        """Return the address of its HTTP interface."""
        return f"http://{LOOPBACK}:{self.port}"

    def argv(self) -> Sequence[str | Path]:
        """Write the configuration; return the command, without the shell script that only starts it."""
        from tests.testbed.process import free_port

        self.transport = self.transport or free_port()
        for path in (self.config, self.data, self.workdir / "logs", self.repositories, self.workdir / "tmp"):
            if not path.exists():
                path.mkdir(parents=True)
                give(path, self.os_user)
        (self.config / "elasticsearch.yml").write_text(
            CONFIG.format(
                port=self.port,
                transport=self.transport,
                tcp="" if self.version > 6 else "tcp.",
                data=self.data,
                logs=self.workdir / "logs",
                repositories=self.repositories,
            )
            + "".join(f"{name}: {value}\n" for name, value in self._settings.items())
        )
        (self.config / "log4j2.properties").write_text(
            "rootLogger.level = warn\nrootLogger.appenderRef.console.ref = console\nappender.console.type = Console\n"
            "appender.console.name = console\nappender.console.layout.type = PatternLayout\n"
            "appender.console.layout.pattern = %d %p %c %m%n\n"
        )
        (self.config / "jvm.options").write_text("")
        for path in self.config.iterdir():
            path.chmod(0o644)
        place = home(self.version)
        return [
            java() or "java",
            "-Xms256m", "-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1",
            f"-Djava.io.tmpdir={self.workdir / 'tmp'}",
            "-Des.networkaddress.cache.ttl=60", "-Djava.awt.headless=true", "-Dfile.encoding=UTF-8",
            "-Dio.netty.noUnsafe=true", "-Dlog4j.shutdownHookEnabled=false", "-Dlog4j2.disable.jmx=true",
            "-Djava.locale.providers=SPI,COMPAT", "-Djava.security.manager=allow",
            "--add-opens=java.base/java.io=ALL-UNNAMED",
            f"-Des.path.home={place}", f"-Des.path.conf={self.config}",
            "-Des.distribution.flavor=oss", "-Des.distribution.type=zip",
            "-cp", f"{place}/lib/*",
            "org.elasticsearch.bootstrap.Elasticsearch",
        ]  # fmt: skip

    def environment(self) -> Mapping[str, str]:
        """Return the child's whole environment."""
        return {
            **super().environment(),
            "ES_TMPDIR": str(self.workdir / "tmp"),
            "LIBFFI_TMPDIR": str(self.workdir / "tmp"),
        }

    def start(self) -> None:
        """Start, with the working directory given to the user whom it runs as."""
        if not self.workdir.exists():
            self.workdir.mkdir(parents=True)
            give(self.workdir, self.os_user)
        os.chmod(self.workdir, 0o755)  # noqa: S103 - its user passes through
        super().start()

    def ready(self) -> bool:
        """Tell whether the cluster has a master."""
        import requests

        if not listening(self.port):
            return False
        try:
            answer = requests.get(f"{self.url}/_cluster/health?timeout=1s", timeout=5)
        except requests.RequestException:
            return False
        return answer.ok and answer.json()["status"] in ("green", "yellow", "red")

    def request(self, method: str, path: str, body: Any = None, *, ok: bool = True) -> Any:
        """Call the HTTP interface and return the decoded answer."""
        import requests

        answer = requests.request(method, self.url + path, json=body, timeout=60)
        if ok and not answer.ok:
            msg = f"{method} {path} answered {answer.status_code}: {answer.text[:1000]}"
            raise AssertionError(msg)
        return answer.json() if answer.content else None

    def bulk(self, index: str, documents: Mapping[str, Mapping[str, Any]]) -> None:
        """Write documents by id, and refresh."""
        import json

        import requests

        kind = {} if self.version > 6 else {"_type": "_doc"}
        lines = []
        for number, document in documents.items():
            lines += [json.dumps({"index": {"_index": index, "_id": number, **kind}}), json.dumps(document)]
        answer = requests.post(
            f"{self.url}/_bulk?refresh=true",
            data="\n".join([*lines, ""]).encode(),
            headers={"Content-Type": "application/x-ndjson"},
            timeout=60,
        )
        answer.raise_for_status()
        assert not answer.json()["errors"], answer.text[:1000]

    def documents(self, index: str) -> dict[str, Any]:
        """Return every document of an index, by id."""
        found: dict[str, Any] = {}
        page = self.request("POST", f"/{index}/_search?scroll=1m", {"size": 1000, "sort": ["_doc"]})
        while page["hits"]["hits"]:
            found |= {hit["_id"]: hit["_source"] for hit in page["hits"]["hits"]}
            page = self.request("POST", "/_search/scroll", {"scroll": "1m", "scroll_id": page["_scroll_id"]})
        self.request("DELETE", "/_search/scroll", {"scroll_id": page["_scroll_id"]})
        return found

    def indices(self) -> list[str]:
        """Return the names of all indices, closed ones too."""
        state = self.request("GET", "/_cluster/state/metadata?filter_path=metadata.indices.*.state")
        return sorted(state.get("metadata", {}).get("indices", {}))

    def settled(self, *indices: str) -> None:
        """Wait until the primaries of some indices are there."""
        wait_until(
            lambda: (
                self.request("GET", f"/_cluster/health/{','.join(indices)}?timeout=1s")["status"] != "red"
            ),
            what=f"{indices} to have their primaries",
        )

    def wipe(self) -> None:
        """Delete every index, alias and repository registration; repositories' files stay."""
        for index in self.indices():
            self.request("DELETE", f"/{index}")
        for name in self.request("GET", "/_snapshot"):
            self.request("DELETE", f"/_snapshot/{name}")
