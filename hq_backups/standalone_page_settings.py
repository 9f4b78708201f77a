"""Django settings of the history page of a host without HQ: the commands' own, and what an admin needs."""

from __future__ import annotations

from hq_backups import standalone
from hq_backups.standalone_settings import *  # noqa: F403

_env = standalone.environment()

ALLOWED_HOSTS = _env.list("ALLOWED_HOSTS", default=["127.0.0.1", "localhost", "[::1]"])
INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.messages",
    "django.contrib.sessions",
    "django.contrib.staticfiles",
    "hq_backups",
]
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "hq_backups.standalone_urls.only_from_here",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]
AUTH_PASSWORD_VALIDATORS = [
    {"NAME": "django.contrib.auth.password_validation.MinimumLengthValidator"},
    {"NAME": "django.contrib.auth.password_validation.CommonPasswordValidator"},
]
ROOT_URLCONF = "hq_backups.standalone_urls"
STATIC_URL = "/static/"
# Cookies know no ports: another program's page on this host must not log ours out.
SESSION_COOKIE_NAME = "hq_backups_session"
CSRF_COOKIE_NAME = "hq_backups_csrf"
X_FRAME_OPTIONS = "DENY"
