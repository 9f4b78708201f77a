"""Django settings of a small host that has Celery, as HQ has; the rest comes from the environment."""

from __future__ import annotations

import json
import os

SECRET_KEY = "made-up-for-tests"
USE_TZ = True
TIME_ZONE = "UTC"
SERVER_ENVIRONMENT = "testing"
INSTALLED_APPS = ["hq_backups"]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": os.environ["TESTBED_DATABASE"],
        "OPTIONS": {"timeout": 30, "transaction_mode": "IMMEDIATE"},
    }
}
HQ_BACKUPS = json.loads(os.environ["TESTBED_HQ_BACKUPS"])
CELERY_BROKER_URL = os.environ["TESTBED_BROKER"]
CELERY_BROKER_TRANSPORT_OPTIONS = {
    "visibility_timeout": int(os.environ["TESTBED_VISIBILITY"]),
    # Look for what was not acknowledged each second, not each hundred.
    "unacked_restore_interval": 1,
    "unacked_restore_throttle": 1,
}
CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP = True
CELERY_PERIODIC_QUEUE = "celery_periodic"
CELERY_WORKER_PREFETCH_MULTIPLIER = 1
# The host's own entry stands for ours: nobody waits ten minutes here.
CELERY_BEAT_SCHEDULE = {
    "hq_backups.dispatch_due": {
        "task": "hq_backups.dispatch_due",
        "schedule": 0.5,
        "options": {"queue": CELERY_PERIODIC_QUEUE},
    }
}
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "handlers": {"stderr": {"class": "logging.StreamHandler"}},
    "root": {"handlers": ["stderr"], "level": "INFO"},
}
