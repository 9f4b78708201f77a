"""What is wrong with the settings, in one form for commands and system checks."""

from __future__ import annotations

from dataclasses import dataclass

ERROR, WARNING = "error", "warning"

IDS = {
    "E001": "a source of settings cannot be read",
    "E002": "a name is unknown",
    "E003": "a value does not fit its setting",
    "E004": "a template expression is left",
    "E005": "the environment has no name",
    "E006": "a setting asks for what is refused",
    "E007": "two settings exclude each other",
    "E008": "only one half of the S3 key is set",
    "E009": "the database server's address is pgbouncer's",
    "E010": "the S3 endpoint is no address",
    "E011": "a bucket's name is none",
    "E012": "two names of one setting differ",
    "E013": "a backup directory lies in a data directory",
    "E014": "blobs are not on disk",
    "E015": "the compression does not exist",
    "E016": "the blob directory is not the one that HQ uses",
    "W001": "a setting has no effect any more",
    "W002": "a value is encrypted and was passed over",
    "W003": "what is switched on is not built",
    "W004": "no S3 credentials are to be seen",
    "W005": "mail leaves this host nowhere",
    "W006": "backups travel unencrypted",
    "W007": "the S3 region and endpoint differ",
    "W008": "a name looks like a misspelt setting",
    "W009": "a name stands twice in one file",
    "W010": "this port is usually pgbouncer's",
    "W011": "a file with secrets can be read by everybody",
    "W012": "no host backs up a store",
    "W013": "only one of the two service commands is set",
    "W014": "no user is named for the other host's server",
    "W015": "a cron job of the old scripts is still installed",
    "W016": "alarms are mailed to nobody",
}
"""Every id, with its meaning; ids are never given a second meaning."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, and what to do about it."""

    id: str
    message: str
    hint: str = ""
    store: str | None = None
    """The store that it stops; None concerns all of them."""
    setting: str | None = None

    @property
    def level(self) -> str:
        """Return ``error`` or ``warning``."""
        return ERROR if self.id.startswith("E") else WARNING

    def stops(self, store: str | None) -> bool:
        """Return whether ``store`` (None: anything at all) cannot be worked on."""
        return self.level == ERROR and self.store in (None, store)
