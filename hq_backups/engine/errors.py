"""Every failure that the engine knows, with its exit code and the next command to type.

An error's docstring is its message template. ``hint`` says what to do next. Exit codes are the interface:
they are listed in docs/commands.rst and must tell the truth.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, ClassVar


class Exit(IntEnum):
    """What a command's exit status says."""

    OK = 0
    ERROR = 1
    USAGE = 2
    BAD_BACKUP = 3
    NOT_CONFIRMED = 4
    PREFLIGHT = 5
    LOCKED = 6
    UPLOAD_FAILED = 7
    RESTORE_ROLLED_BACK = 8
    RESTORE_NEEDS_HANDS = 9


class HQBackupsError(Exception):
    """{message}"""

    exit_code: ClassVar[Exit] = Exit.ERROR
    hint: str = ""

    def __init__(self, message: str = "", *, hint: str | None = None, **facts: Any) -> None:
        """Fill the docstring's template from ``facts``; ``message`` replaces ``{message}``."""
        self.facts = facts
        template = (type(self).__doc__ or "{message}").split("\n", 1)[0]
        self.message = template.format(message=message, **facts)
        self.hint = self.hint.format(message=message, **facts) if hint is None else hint
        super().__init__(self.message)

    @property
    def code(self) -> str:
        """Return the stable name that events and records carry."""
        return type(self).__name__


class UsageError(HQBackupsError):
    """{message}"""

    exit_code = Exit.USAGE


class ConfigurationError(UsageError):
    """{message}"""


class ProtocolMismatch(UsageError):
    """this engine speaks protocol {ours}, the job is of protocol {theirs}"""

    hint = "Both sides must come from one installation: deploy hq_backups again, then repeat the command."


class NotBuiltYet(UsageError):
    """{message}"""


class Cancelled(HQBackupsError):
    """cancelled by {by}"""


class ProducerFailed(HQBackupsError):
    """{program} ended with status {status}: {tail}"""


class ProducerTruncated(HQBackupsError):
    """{program} ended well, but its output is not whole: {message}"""


class ReadBackFailed(HQBackupsError):
    """what was written to {path} could not be read back: {message}"""

    hint = "The disk or its driver loses data. Look at `dmesg`, then run the backup again."


class DiskFull(HQBackupsError):
    """no space left on the disk of {path}"""

    hint = "Free space there (`df -h`), then run the same command again; nothing half-written was kept."


class ServiceError(HQBackupsError):
    """{message}"""


class Unanswered(ServiceError):
    """{message}"""


class NameInUse(ServiceError):
    """{message}"""


class BadPages(HQBackupsError):
    """the server found damaged pages: {message}"""

    hint = (
        "Look at the server's disk first. The last good backup is kept. To have a backup of what can still be read "
        "too, with the damage in it: --accept-bad-pages"
    )


class BackupNotFound(HQBackupsError):
    """no backup {name} of {store}{near}"""

    exit_code = Exit.BAD_BACKUP
    hint = "See what there is: list_backups {store}"


class CorruptBackup(HQBackupsError):
    """{name} is damaged: {message}"""

    exit_code = Exit.BAD_BACKUP
    hint = "Choose another backup (list_backups), and find out what damaged this one."


class UnsafeArchive(CorruptBackup):
    """{name} holds a member that must not be unpacked: {message}"""


class BadManifest(HQBackupsError):
    """manifest {name} cannot be used: {message}"""

    exit_code = Exit.BAD_BACKUP
    hint = "Choose another backup: list_backups"


class NewerManifest(BadManifest):
    """{name} was written by a newer hq_backups (manifest schema {schema}, this one knows {known})"""

    hint = "Update hq_backups on this host, then repeat the command."


class NotConfirmed(HQBackupsError):
    """{message}"""

    exit_code = Exit.NOT_CONFIRMED


class PreflightFailed(HQBackupsError):
    """{message}"""

    exit_code = Exit.PREFLIGHT


class NotEnoughSpace(PreflightFailed):
    """{path} has {free} free, {needed} are needed"""


class WrongEnvironment(PreflightFailed):
    """the backup is of environment {theirs}, this is {ours}"""


class WrongVersion(PreflightFailed):
    """{message}"""


class WrongUser(PreflightFailed):
    """{message}"""


class Locked(HQBackupsError):
    """another run holds {path}: {holder}"""

    exit_code = Exit.LOCKED
    hint = "Wait for it, or look at that process; the lock is freed when it ends, however it ends."


class RepositoryError(HQBackupsError):
    """{message}"""


class NoSuchBucket(RepositoryError):
    """bucket {bucket} does not exist at {endpoint}"""


class NoSuchObject(RepositoryError):
    """{key} is not in bucket {bucket}"""

    exit_code = Exit.BAD_BACKUP
    hint = "See what there is: list_backups --source s3"


class AccessDenied(RepositoryError):
    """access to {what} was denied: {message}"""


class BadCredentials(RepositoryError):
    """{endpoint} does not accept the S3 key: {message}"""


class WrongRegion(RepositoryError):
    """bucket {bucket} is not in region {region}: {message}"""


class ClockSkew(RepositoryError):
    """{endpoint} refuses requests because the clocks differ: {message}"""

    hint = "Set this host's clock (`timedatectl`, `chronyc makestep`)."


class Unreachable(RepositoryError):
    """{endpoint} cannot be reached: {message}"""


class ObjectMismatch(RepositoryError):
    """{key} in {bucket} is not what was sent: {message}"""


class ForeignObject(PreflightFailed):
    """{message}"""


class UploadFailed(HQBackupsError):
    """the local backup is good, but its upload failed: {message}"""

    exit_code = Exit.UPLOAD_FAILED
    hint = "Send it when the cause is mended: upload_backups {store}"


class RestoreRolledBack(HQBackupsError):
    """the restore failed and the old data was put back: {message}"""

    exit_code = Exit.RESTORE_ROLLED_BACK


class RestoreNeedsHands(HQBackupsError):
    """the restore failed and needs work by hand: {message}"""

    exit_code = Exit.RESTORE_NEEDS_HANDS


def rebuild(code: str, message: str, hint: str) -> HQBackupsError:
    """Return the error that a child engine told in an ``error`` event."""
    known = {cls.__name__: cls for cls in _tree(HQBackupsError)}
    error = known.get(code, HQBackupsError)
    made: HQBackupsError = error.__new__(error)
    Exception.__init__(made, message)
    made.facts, made.message, made.hint = {}, message, hint
    return made


def _tree(cls: type[HQBackupsError]) -> list[type[HQBackupsError]]:
    return [cls, *(leaf for child in cls.__subclasses__() for leaf in _tree(child))]
