"""Build the servers that are Go modules."""

from __future__ import annotations

import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.testbed.cache import ProvisionError, run, scratch
from tests.testbed.packages import apt_install
from tests.testbed.places import IS_ROOT

GO_TOOLCHAIN = "1.26.0"


@dataclass(frozen=True)
class GoTool:
    """A server that is built from a Go module."""

    name: str
    package: str
    version: str

    def stamp(self, cache: Path) -> Path:
        """Return the file that shows that this version was built."""
        return cache / "bin" / f".{self.name}-{self.version}"


GO_TOOLS = (
    GoTool("versitygw", "github.com/versity/versitygw/cmd/versitygw", "v1.8.0"),
    GoTool("toxiproxy-server", "github.com/Shopify/toxiproxy/v2/cmd/server", "v2.12.0"),
)


def go_command(cache: Path) -> Path:
    """Return a Go that is new enough, fetching a toolchain with an older one where need be."""
    wanted = tuple(map(int, GO_TOOLCHAIN.split(".")[:2]))
    found = shutil.which("go")
    if not found and IS_ROOT and shutil.which("apt-get"):
        apt_install(["golang-go", "ca-certificates"])
        found = shutil.which("go")
    if not found:
        msg = "building needs Go, which is not installed"
        raise ProvisionError(msg)
    words = run(found, "env", "GOVERSION").strip().removeprefix("go").split()[0].split(".")
    if tuple(map(int, words[:2])) >= wanted:
        return Path(found)
    return go_toolchain(Path(found), cache)


def go_toolchain(old: Path, cache: Path) -> Path:
    """Fetch a newer Go as a module, as newer ones do themselves."""
    system = {"x86_64": "linux-amd64", "aarch64": "linux-arm64"}[platform.machine()]
    module = f"golang.org/toolchain@v0.0.1-go{GO_TOOLCHAIN}.{system}"
    modules = cache / "go-modules"
    with scratch(cache) as work:
        (work / "go.mod").write_text("module testbed\n")
        run(old, "mod", "download", module, cwd=work, GOMODCACHE=str(modules), GOFLAGS="-mod=mod -modcacherw")
    root = modules / module
    for place in (root / "bin", root / "pkg" / "tool"):  # a module's files are never executable
        for path in place.rglob("*"):
            if path.is_file():
                path.chmod(0o755)
    return root / "bin" / "go"


def go_tools(cache: Path) -> None:
    """Build the servers that are Go modules."""
    missing = [wanted for wanted in GO_TOOLS if not wanted.stamp(cache).exists()]
    if not missing:
        return
    go = go_command(cache)
    for wanted in missing:
        with scratch(cache) as work:
            what = f"{wanted.package}@{wanted.version}"
            run(go, "install", what, cwd=work, GOBIN=str(work), GOFLAGS="-modcacherw")
            built = work / wanted.package.rpartition("/")[2]
            (cache / "bin").mkdir(exist_ok=True)
            built.chmod(0o755)
            built.replace(cache / "bin" / wanted.name)
            wanted.stamp(cache).touch()
