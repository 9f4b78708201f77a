"""An artifact's way into the bucket: planned, followed while the file grows, compared, given its manifest.

A bucket that fails must not cost the local backup: every failure is kept until :meth:`BucketUpload.finish`
returns it. Only a key that belongs to somebody else stops a run, before it has done anything.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from hq_backups.engine import names
from hq_backups.engine.config import Config, StoreConfig
from hq_backups.engine.errors import ConfigurationError, ForeignObject, HQBackupsError, RepositoryError
from hq_backups.engine.events import Events, format_utc, utc_now
from hq_backups.engine.manifest import Manifest
from hq_backups.engine.repository.local import LocalRepository

if TYPE_CHECKING:
    from hq_backups.engine.repository.s3 import S3Repository
    from hq_backups.engine.repository.s3_keys import KeyPlan
    from hq_backups.engine.repository.s3_upload import FollowingUpload
    from hq_backups.engine.stores.base import Store

RUN_METADATA = "hq-backups-run"


def open_bucket(store: Store) -> S3Repository:
    """Return the bucket of a store; raises ConfigurationError when there is none."""
    return bucket_of(store.config, store.settings)


def bucket_of(config: Config, settings: StoreConfig) -> S3Repository:
    """Return the bucket that is set for a store; raises ConfigurationError when there is none."""
    if config.s3 is None or not settings.bucket:
        raise ConfigurationError(
            f"{settings.store} has no bucket", hint="See the settings: list_backups --config"
        )
    # Loading botocore takes longer than many a command: only those wait for it that have a bucket to ask.
    from hq_backups.engine.repository.s3 import S3Repository

    return S3Repository(config.s3, settings.bucket, settings.bucket_fallback)


class BucketUpload:
    """One artifact's upload."""

    def __init__(
        self, store: Store, repository: LocalRepository, events: Events, *, tidy: bool = True
    ) -> None:
        """Open the bucket, and unless told not to ``tidy`` abort what dead runs left unfinished in it."""
        self._store = store
        self._local = repository
        self._events = events
        self._failure: BaseException | None = None
        self._plan: KeyPlan | None = None
        self._upload: FollowingUpload | None = None
        self._left = False
        self._run = ""
        self._bucket: S3Repository | None = None
        try:
            self._bucket = open_bucket(store)
            self._bucket.probe()
            if tidy:
                abort_dead_uploads(self._bucket, repository, events)
        except RepositoryError as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        self._failure = error
        message = error.message if isinstance(error, HQBackupsError) else str(error)
        self._events.warning("upload", f"the bucket cannot be used, the backup goes on locally: {message}")

    @property
    def where(self) -> str:
        """Return the planned place in words."""
        if self._plan is None or self._bucket is None:
            return "no bucket"
        return f"s3://{self._bucket.bucket}/{self._plan.key}"

    @property
    def fixed(self) -> bool:
        """Tell whether the planned key is the one per type and host."""
        return self._plan is not None and self._plan.fixed

    def plan(
        self, name: str, run: str, type_: str, local: datetime, mode: str, done: Manifest | None = None
    ) -> None:
        """Choose the key; raises ForeignObject when it is not ours to write.

        ``done`` describes a finished artifact, whose object may stand there already: it is not sent twice.
        """
        self._run = run
        if self._failure is not None or self._bucket is None:
            return
        from hq_backups.engine.repository.s3_keys import plan_key

        config = self._store.config
        try:
            self._plan = plan_key(
                self._bucket,
                store=self._store.name,
                type_=type_,
                mode=mode,
                codec=config.compression,
                env=config.env,
                host=config.host,
                run=run,
                name=name,
                started_local=local,
                want_versions=config.s3 is not None and config.s3.versioning,
                size=done.size if done else None,
                crc32=int(done.crc32, 16) if done else None,
            )
        except ForeignObject:
            raise
        except RepositoryError as error:
            self._fail(error)
            return
        for code, message in self._plan.warnings:
            self._events.warning(code, message)

    def start(self, path: Path, size_hint: int) -> None:
        """Begin to send ``path``, which may still grow, to about ``size_hint`` bytes."""
        if (
            self._failure is not None
            or self._bucket is None
            or self._plan is None
            or self._plan.adopt is not None
        ):
            return
        from hq_backups.engine.repository.s3_upload import FollowingUpload

        key, bucket = self._plan.key, self._bucket.bucket
        record = {"bucket": bucket, "key": key, "started": format_utc(utc_now())}
        self._local.record_upload(self._run, record)
        self._upload = FollowingUpload(
            self._bucket,
            key,
            path,
            size_hint=size_hint,
            metadata={RUN_METADATA: self._run},
            limit=self._store.config.s3.upload_limit if self._store.config.s3 else None,
            on_progress=lambda sent: self._events.progress("upload", sent),
            on_started=lambda upload_id: self._local.record_upload(
                self._run, {**record, "upload_id": upload_id}
            ),
        )
        self._upload.start()

    def advance(self, size: int) -> None:
        """Tell how many bytes stand on disk."""
        if self._upload is not None:
            self._upload.advance(size)

    def abort(self) -> None:
        """Leave nothing of it in the bucket; what cannot be reached now stays on record for the next run."""
        if self._upload is not None:
            self._left = not self._upload.abort()
            self._upload = None
        # Interrupted before it began, there is a record of nothing.
        if not self._left:
            self._local.forget_upload(self._run)

    def finish(self, manifest: Manifest) -> BaseException | None:
        """Send the last part of a published artifact, compare, write the manifest; return what failed."""
        if self._failure is not None or self._bucket is None or self._plan is None:
            return self._failure
        try:
            self._finish(self._bucket, self._plan, manifest)
        except Exception as error:
            self.abort()
            return error
        except BaseException:
            self.abort()
            raise
        return None

    def _finish(self, bucket: S3Repository, plan: KeyPlan, manifest: Manifest) -> None:
        stored = plan.adopt
        if stored is None:
            if self._upload is None:
                raise RepositoryError("the upload was never begun")
            self._events.step("upload", f"sending the rest to {self.where}")
            stored = self._upload.finish(
                manifest.size, int(manifest.crc32, 16), if_none_match=plan.if_none_match
            )
        location = {
            "kind": "s3",
            "bucket": stored.bucket,
            "key": stored.key,
            "version_id": stored.version_id,
            "checked": stored.checked,
        }
        remote = replace(manifest, repository=location)
        bucket.put_manifest(plan.key + names.MANIFEST_KEY_SUFFIX, remote.to_json())
        self._upload = None
        self._local.forget_upload(self._run)
        self._events.emit(
            "artifact", manifest={"name": manifest.name, "run": manifest.run}, location=location
        )
        self._events.step("upload", f"{self.where} is compared ({stored.checked})")


def abort_dead_uploads(bucket: S3Repository, local: LocalRepository, events: Events) -> None:
    """Abort the uploads that dead runs of this directory began. Only under the lock."""
    for run, record in local.recorded_uploads():
        if record.get("bucket") != bucket.bucket:
            continue
        key, started = str(record.get("key", "")), str(record.get("started", ""))
        if upload_id := record.get("upload_id"):
            found = [str(upload_id)]
        else:
            # Killed before the service's answer was written down: whatever began there since is that one.
            found = [u for u, initiated in bucket.unfinished_uploads(key) if format_utc(initiated) >= started]
        for each in found:
            bucket.abort_upload(key, each)
            events.step("recover", f"aborted the unfinished upload of {key}")
        local.forget_upload(run)
