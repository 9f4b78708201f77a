"""Django settings of a host without HQ, read by django-environ."""

from __future__ import annotations

from hq_backups import standalone
from hq_backups.clock import host_time_zone

_env = standalone.environment()
_state = standalone.state_dir(_env.ENVIRON)

SECRET_KEY = _env.str("SECRET_KEY", default="") or standalone.secret_key(_state)
DEBUG = False
ALLOWED_HOSTS: list[str] = []
INSTALLED_APPS = ["hq_backups"]
DATABASES = {"default": standalone.database(_env, _state)}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
DEFAULT_FROM_EMAIL = _env.str("DEFAULT_FROM_EMAIL", default="hq-backups@localhost")
SERVER_EMAIL = DEFAULT_FROM_EMAIL
vars().update(_env.email_url("EMAIL_URL", default="smtp://localhost:25"))
CELERY_BROKER_URL = _env.str("CELERY_BROKER_URL", default="")
USE_TZ = True
# Django puts its time zone into the process: with any other than the host's, names would get another's dates.
TIME_ZONE = host_time_zone() or "UTC"
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "handlers": {"stderr": {"class": "logging.StreamHandler"}},
    "root": {"handlers": ["stderr"], "level": "WARNING"},
}
