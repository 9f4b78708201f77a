"""What the history page shows: runs and artifacts. A cache: the catalog rebuilds it at any time."""

from __future__ import annotations

from django.db import models

from hq_backups.engine.errors import Exit


class BackupRuns(models.QuerySet["BackupRun"]):
    """Runs, as one asks for them."""

    def made(self) -> BackupRuns:
        """Return the backups that are there: one whose upload failed is, and is sent later."""
        backups = self.filter(verb="backup")
        whole = (BackupRun.Status.OK, BackupRun.Status.WARNING)
        return backups.filter(status__in=whole) | backups.filter(exit_code=Exit.UPLOAD_FAILED)


class BackupRun(models.Model):
    """One attempt of one verb on one store."""

    class Status(models.TextChoices):
        """How a run stands."""

        RUNNING = "running"
        OK = "ok"
        WARNING = "warning"
        FAILED = "failed"

    run = models.CharField(max_length=255, unique=True)
    verb = models.CharField(max_length=32)
    store = models.CharField(max_length=32)
    mode = models.CharField(max_length=32, blank=True)
    type = models.CharField(max_length=32, blank=True)
    env = models.CharField(max_length=128, blank=True)
    host = models.CharField(max_length=255, blank=True)
    started_at = models.DateTimeField(db_index=True)
    finished_at = models.DateTimeField(null=True, blank=True)
    status = models.CharField(max_length=16, choices=Status.choices, default=Status.RUNNING)
    exit_code = models.SmallIntegerField(null=True, blank=True)
    error = models.TextField(blank=True)
    hint = models.TextField(blank=True)
    warnings = models.JSONField(default=list, blank=True)
    artifact = models.CharField(max_length=1024, blank=True)
    size = models.BigIntegerField(null=True, blank=True)
    """Stored bytes of what was made or put back."""
    seconds = models.FloatField(null=True, blank=True)
    facts = models.JSONField(default=dict, blank=True)
    """What the verb measured: restore timings, paths."""
    steps = models.JSONField(default=list, blank=True)
    """Its stages: ``[{"at", "name", "message"}]``, at in UTC; the last ones when there were many."""
    process = models.CharField(max_length=128, blank=True)
    """Who runs it on its host: boot id, pid and start of the process, so that one that is dead is told apart."""

    objects = BackupRuns.as_manager()

    class Meta:
        """Newest first."""

        ordering = ("-started_at", "-pk")
        indexes = (models.Index(fields=["store", "verb", "-started_at"], name="hqb_run_store_verb"),)

    def __str__(self) -> str:
        """Return the run id."""
        return self.run


class DueRun(models.Model):
    """A backup that the schedule asked for: once made, nobody else makes it."""

    class State(models.TextChoices):
        """How far it is."""

        QUEUED = "queued"
        RUNNING = "running"
        DONE = "done"
        FAILED = "failed"

    host = models.CharField(max_length=255)
    store = models.CharField(max_length=32)
    type = models.CharField(max_length=32)
    due_at = models.DateTimeField(db_index=True)
    attempts = models.PositiveSmallIntegerField(default=0)
    state = models.CharField(max_length=16, choices=State.choices, default=State.QUEUED)
    queued_at = models.DateTimeField()
    """When it was handed to a worker or a process last."""
    started_at = models.DateTimeField(null=True, blank=True)
    """When that worker or process took it."""
    run = models.CharField(max_length=255, blank=True)
    """The run of the last attempt, once it is known."""

    class Meta:
        """Newest first; one row for each time that something is due."""

        ordering = ("-due_at", "-pk")
        constraints = (
            models.UniqueConstraint(fields=["host", "store", "type", "due_at"], name="hqb_due_once"),
        )

    def __str__(self) -> str:
        """Return what is due, where and when."""
        return f"{self.store} {self.type} on {self.host}, due {self.due_at:%Y-%m-%dT%H:%M:%SZ}"


class Dispatcher(models.Model):
    """Where the schedule was looked at last: one that comes no more is seen by whoever shares the database."""

    host = models.CharField(max_length=255, unique=True)
    seen_at = models.DateTimeField()

    def __str__(self) -> str:
        """Return the host."""
        return self.host


class Artifact(models.Model):
    """One restorable thing, as the catalog listed it last."""

    run = models.CharField(max_length=255, blank=True)
    """The run that made it, here or on another host; empty for files of the old scripts."""
    store = models.CharField(max_length=32)
    mode = models.CharField(max_length=32, blank=True)
    type = models.CharField(max_length=32, blank=True)
    env = models.CharField(max_length=128, blank=True)
    host = models.CharField(max_length=255, blank=True)
    taken_at = models.DateTimeField(db_index=True)
    name = models.CharField(max_length=1024)
    size = models.BigIntegerField(null=True, blank=True)
    sha256 = models.CharField(max_length=64, blank=True)
    managed = models.BooleanField(default=True)
    problem = models.TextField(blank=True)
    """Why it may not be chosen as the latest."""
    verified_at = models.DateTimeField(null=True, blank=True)
    gone_at = models.DateTimeField(null=True, blank=True)
    """When the catalog no longer listed it."""
    manifest = models.JSONField(default=dict, blank=True)
    locations = models.JSONField(default=list, blank=True)

    class Meta:
        """Newest first; one row per thing, however often it is listed."""

        ordering = ("-taken_at", "-pk")
        constraints = (
            models.UniqueConstraint(
                fields=["store", "name", "run", "env", "host", "taken_at"], name="hqb_artifact_once"
            ),
        )
        indexes = (models.Index(fields=["store", "type", "-taken_at"], name="hqb_artifact_store_type"),)

    def __str__(self) -> str:
        """Return the artifact's name."""
        return self.name
