"""The local directory: artifacts under their final names, each with its manifest as a dot file beside it.

Publishing is three steps, in this order: the pending manifest (named by run), the artifact's rename, the
manifest's rename. A kill between any two leaves a state that :meth:`LocalRepository.recover` finishes and that
a reader pairs by size and sha256 (see :meth:`LocalRepository.found`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hq_backups.engine import names
from hq_backups.engine.errors import BadManifest, DiskFull, HQBackupsError, PreflightFailed
from hq_backups.engine.events import Events
from hq_backups.engine.locks import HOLDER_NAME, process_started, user_name
from hq_backups.engine.manifest import MAX_BYTES, Manifest, load_manifest

_PENDING = ".pending.json"
_UPLOAD = ".upload.json"
_VERIFIED = ".verified.json"
_PROBE = ".hq_backups.probe-"


@dataclass(frozen=True)
class LocalArtifact:
    """One file of the directory, with what is known of it."""

    path: Path
    size: int
    mtime: float
    manifest: Manifest | None
    problem: str | None = None
    """Why it is not good, in words; None when nothing speaks against it."""
    verified_at: str | None = None


class LocalRepository:
    """The backup directory of one store."""

    def __init__(self, directory: Path) -> None:
        """Use ``directory``; nothing is touched yet."""
        self.directory = directory

    def prepare(self, events: Events) -> None:
        """Make the directory (0700) when it is missing, prove that it can be written; loose modes are warned of."""
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            probe = self.directory / f"{_PROBE}{os.getpid()}"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise PreflightFailed(
                f"the backup directory {self.directory} cannot be written: {error.strerror}",
                hint=f"sudo install -d -m 700 -o {user_name()} {self.directory}",
            ) from error
        mode = stat.S_IMODE(self.directory.stat().st_mode)
        if mode & 0o077:
            events.warning(
                "directory-mode",
                f"{self.directory} is open to other users (mode {mode:04o}): chmod 700 {self.directory}",
            )

    def partial(self, run: str) -> Path:
        """Return where a run writes its artifact."""
        return self.directory / names.partial_name(run)

    def publish(self, manifest: Manifest) -> Path:
        """Give a finished, tested artifact its final name and its manifest; return its path."""
        pending = self.directory / names.pending_name(manifest.run)
        final = self.directory / manifest.name
        self.write_atomically(pending, manifest.to_json())
        os.rename(self.partial(manifest.run), final)
        self._sync()
        os.rename(pending, self.directory / names.manifest_name(manifest.name))
        self._sync()
        return final

    def found(self) -> Iterator[LocalArtifact]:
        """Yield every artifact of the directory, whoever made it; partial files are none."""
        pending = {m.name: m for _, m in self._pending()}
        with contextlib.suppress(FileNotFoundError), os.scandir(self.directory) as entries:
            for entry in sorted(entries, key=lambda e: e.name):
                if entry.name.startswith(".") or not entry.is_file(follow_symlinks=False):
                    continue
                old = names.recognise(entry.name)
                known = old is not None and old.ext
                if known or (self.directory / names.manifest_name(entry.name)).exists():
                    with contextlib.suppress(FileNotFoundError):
                        yield self._look_at(Path(entry.path), pending.get(entry.name))

    def directories(self) -> Iterator[LocalArtifact]:
        """Yield the bare directories that old scripts left: base backups that were never packed."""
        with contextlib.suppress(FileNotFoundError), os.scandir(self.directory) as entries:
            for entry in sorted(entries, key=lambda e: e.name):
                old = names.recognise(entry.name)
                if old is not None and not old.ext and entry.is_dir(follow_symlinks=False):
                    with contextlib.suppress(FileNotFoundError):
                        yield self.at(entry.name)

    def at(self, name: str) -> LocalArtifact:
        """Return the file or bare directory ``name``, whatever it is called; raises FileNotFoundError."""
        path = self.directory / name
        if path.is_dir():
            size = 0
            for above, _, files in os.walk(path):
                for each in files:
                    with contextlib.suppress(FileNotFoundError):
                        size += os.lstat(os.path.join(above, each)).st_size
            return LocalArtifact(path, size, path.stat().st_mtime, None)
        return self._look_at(path, {m.name: m for _, m in self._pending()}.get(name))

    def recover(self, events: Events) -> None:
        """Finish or remove what dead runs left. Only under the lock."""
        for path, manifest in self._pending():
            final = self.directory / manifest.name
            partial = self.partial(manifest.run)
            if _is(final, manifest):
                os.rename(path, self.directory / names.manifest_name(manifest.name))
                events.step("recover", f"finished {manifest.name}, whose run was killed")
            elif _is(partial, manifest):
                os.rename(partial, final)
                self._sync()
                os.rename(path, self.directory / names.manifest_name(manifest.name))
                events.step("recover", f"finished {manifest.name}, whose run was killed")
            else:
                path.unlink()
        for path in self._leftovers():
            if path.name.endswith(names.SPOOL_SUFFIX) and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
            events.step("recover", f"removed {path.name}, left by a run that died")
        self._sync()

    def _leftovers(self) -> list[Path]:
        """Return what only a run that still lives, or none at all, could need."""
        here = list(self.directory.iterdir())
        there = {path.name for path in here}
        return [path for path in here if path.name.startswith(".") and self._is_leftover(path.name, there)]

    @staticmethod
    def _is_leftover(name: str, there: set[str]) -> bool:
        if name.endswith((names.PARTIAL_SUFFIX, names.SPOOL_SUFFIX, ".tmp", _PENDING)):
            return True
        for prefix in (_PROBE, f"{HOLDER_NAME}."):
            if name.startswith(prefix):
                return process_started(name.removeprefix(prefix)) is None
        # What lies beside an artifact that was removed: prune was killed between the two.
        for suffix in (_VERIFIED, ".json"):
            artifact = name[1:].removesuffix(suffix)
            if name.endswith(suffix) and names.parse_name(artifact) is not None:
                return artifact not in there
        return False

    def remove(self, name: str) -> None:
        """Delete an artifact, then its manifest: a manifest without its artifact is nothing."""
        (self.directory / name).unlink()
        for beside in (names.manifest_name(name), f".{name}{_VERIFIED}"):
            (self.directory / beside).unlink(missing_ok=True)
        self._sync()

    def record_upload(self, run: str, record: dict[str, Any]) -> None:
        """Remember an upload before it begins, so that a later run can abort it."""
        self.write_atomically(self.directory / f".{run}{_UPLOAD}", json.dumps(record).encode())

    def forget_upload(self, run: str) -> None:
        """Forget an upload that is complete or aborted."""
        (self.directory / f".{run}{_UPLOAD}").unlink(missing_ok=True)

    def recorded_uploads(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield run and record of the uploads that no run has finished."""
        for path in sorted(self.directory.glob(f".*{_UPLOAD}")):
            try:
                record = json.loads(path.read_bytes())
            except (OSError, ValueError):
                record = None
            if isinstance(record, dict):
                yield path.name[1:].removesuffix(_UPLOAD), record
            else:
                path.unlink(missing_ok=True)

    def record_verified(self, name: str, sha256: str, at: str, *, deep: bool) -> None:
        """Remember that an artifact was verified."""
        body = {"sha256": sha256, "at": at, "deep": deep}
        self.write_atomically(self.directory / f".{name}{_VERIFIED}", json.dumps(body).encode())

    def write_atomically(self, path: Path, content: bytes) -> None:
        """Write a small file so that it is there whole or not at all."""
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.unlink(missing_ok=True)
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                view = memoryview(content)
                while view:
                    view = view[os.write(fd, view) :]
                os.fsync(fd)
            finally:
                os.close(fd)
            os.rename(temporary, path)
        except BaseException as error:  # a cancelled run leaves nothing either
            temporary.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno in (28, 122):
                raise DiskFull(path=path.parent) from error
            raise
        self._sync()

    def _look_at(self, path: Path, pending: Manifest | None) -> LocalArtifact:
        facts = path.stat()
        manifest: Manifest | None = None
        problem: str | None = None
        try:
            manifest = self.manifest_of(path.name)
        except BadManifest as error:
            problem = f"{error.message}. {error.hint}".strip(". ")
        # The artifact of one run must never be shown with the manifest of another.
        if pending is not None and _is(path, pending):
            manifest, problem = pending, None
        if manifest is None:
            return LocalArtifact(path, facts.st_size, facts.st_mtime, None, problem)
        if manifest.name != path.name:
            problem = f"its manifest is that of {manifest.name}"
        elif manifest.size != facts.st_size:
            problem = f"it has {facts.st_size} bytes, its manifest says {manifest.size}"
        elif pending is not None and not _is(path, manifest):
            problem = "its contents are not what its manifest says"
        verified_at = self._verified_at(manifest)
        return LocalArtifact(path, facts.st_size, facts.st_mtime, manifest, problem, verified_at)

    def manifest_of(self, name: str) -> Manifest | None:
        """Return the manifest beside ``name``; None when there is none, raises BadManifest when it is no good."""
        path = self.directory / names.manifest_name(name)
        try:
            with path.open("rb") as file:
                return load_manifest(file.read(MAX_BYTES + 1), path.name)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise BadManifest(f"it cannot be read ({error.strerror})", name=path.name) from error

    def _verified_at(self, manifest: Manifest) -> str | None:
        try:
            body = json.loads((self.directory / f".{manifest.name}{_VERIFIED}").read_bytes())
            return str(body["at"]) if body["sha256"] == manifest.sha256 else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _pending(self) -> Iterator[tuple[Path, Manifest]]:
        for path in sorted(self.directory.glob(f".*{_PENDING}")):
            try:
                yield path, load_manifest(path.read_bytes(), path.name)
            except (HQBackupsError, OSError):
                continue

    def _sync(self) -> None:
        fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is(path: Path, manifest: Manifest) -> bool:
    """Tell whether ``path`` holds the artifact that ``manifest`` describes."""
    try:
        return path.stat().st_size == manifest.size and file_sha256(path) == manifest.sha256
    except OSError:
        return False
