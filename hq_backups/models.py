"""What the history page shows: runs and artifacts. A cache: the catalog rebuilds it at any time."""

from __future__ import annotations

from django.db import models


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

    class Meta:
        """Newest first."""

        ordering = ("-started_at", "-pk")
        indexes = (models.Index(fields=["store", "verb", "-started_at"], name="hqb_run_store_verb"),)

    def __str__(self) -> str:
        """Return the run id."""
        return self.run


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
