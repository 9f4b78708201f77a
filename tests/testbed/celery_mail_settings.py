"""The settings of a small host that has Celery, and a mail server."""

from __future__ import annotations

import os

from tests.testbed.celery_settings import *  # noqa: F403

EMAIL_BACKEND = "django.core.mail.backends.smtp.EmailBackend"
EMAIL_HOST, EMAIL_PORT = "127.0.0.1", int(os.environ["TESTBED_MAIL_PORT"])
