"""The main job, on real services: a PostgreSQL server and a blob directory backed up, lost, and restored.

Starts a real server and an S3 server on free loopback ports, in a directory of its own, and stops them at the
end. As root the server runs as user postgres, as everywhere; as a normal user as that user.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hq_backups.engine import accounts
from tests.testbed.postgres import PostgresServer
from tests.testbed.process import LOOPBACK, free_port, give, short_directory
from tests.testbed.s3 import MotoServer

COMMAND = [sys.executable, "-m", "hq_backups.standalone"]
BUCKETS = ("dimagi-demo-postgres-backups", "dimagi-demo-blobdb-backups")

ROWS = """
CREATE TABLE form_submission (
  id bigserial PRIMARY KEY, domain text NOT NULL, form_id uuid NOT NULL, received_on timestamptz NOT NULL,
  body jsonb NOT NULL
);
INSERT INTO form_submission (domain, form_id, received_on, body)
SELECT 'district-' || n % 40, gen_random_uuid(), timestamptz '2026-01-01' + n * interval '7 minutes',
  jsonb_build_object('visit', n, 'name', md5(n::text), 'weight_kg', round((random() * 30 + 2)::numeric, 1),
    'gps', format('%s %s', random() * 10, random() * 40), 'danger_signs', n % 17 = 0)
FROM generate_series(1, 20000) n;
CREATE TABLE case_index (case_id uuid PRIMARY KEY, owner text, opened date, closed boolean, properties jsonb);
INSERT INTO case_index
SELECT gen_random_uuid(), 'chw-' || n % 300, date '2025-01-01' + n % 600, n % 5 = 0,
  jsonb_build_object('mother', md5(n::text), 'edd', date '2026-06-01' + n % 200)
FROM generate_series(1, 8000) n;
"""
FINGERPRINT = """
SELECT count(*) || ' forms ' || md5(string_agg(f::text, '' ORDER BY id)) FROM form_submission f;
SELECT count(*) || ' cases ' || md5(string_agg(c::text, '' ORDER BY case_id)) FROM case_index c;
"""


def say(text: str) -> None:
    """Announce a stage."""
    print(f"\n== {text}", flush=True)


def hq_backups(environment: dict[str, str], *arguments: str) -> None:
    """Run a command as an operator would; the demo ends when it fails."""
    print(f"$ hq-backups {' '.join(arguments)}", flush=True)
    subprocess.run([*COMMAND, *arguments], env=environment, check=True)


def fill(server: PostgresServer) -> None:
    """Load some thousands of rows like HQ's, under names that need quoting."""
    for database in ("commcarehq", '"formplayer ""copy"""'):
        server.psql(f"CREATE DATABASE {database}")
    server.psql('CREATE ROLE commcarehq LOGIN; CREATE ROLE "report reader"')
    server.psql(ROWS, dbname="commcarehq")


def attach(blobs: Path, user: str) -> str:
    """Write some hundred attachments and forms as HQ keeps them, and return their digest."""
    for number in range(300):
        path = blobs / f"form-{number % 20:02d}" / f"{number:08x}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(os.urandom(4000) if number % 3 else b'<form uuid="%d"/>' % number * 200)
    for path in (blobs, *blobs.rglob("*")):
        give(path, user)
    return digest(blobs)


def digest(blobs: Path) -> str:
    """Count the blobs and hash their keys and contents."""
    files = sorted(p for p in blobs.rglob("*") if p.is_file())
    made = hashlib.sha256()
    for path in files:
        made.update(str(path.relative_to(blobs)).encode() + b"\0" + path.read_bytes())
    return f"{len(files)} blobs {made.hexdigest()[:32]}"


def show_page(environment: dict[str, str]) -> None:
    """Serve the history page until Ctrl-C, to a user made for it."""
    say("some more history")
    for _ in range(2):
        hq_backups(environment, "run_backup", "all", "--type", "manual")
    name, password, where = "demo", secrets.token_urlsafe(9), f"{LOOPBACK}:{free_port()}"
    words = ["createsuperuser", "--noinput", "--username", name, "--email", "demo@example.org"]
    subprocess.run([*COMMAND, *words], env=environment | {"DJANGO_SUPERUSER_PASSWORD": password}, check=True)
    page = subprocess.Popen([*COMMAND, "runserver", where], env=environment, stdout=subprocess.DEVNULL)
    say(f"the history page: http://{where}/   user {name}, password {password}   (Ctrl-C ends it)")
    try:
        page.wait()
    except KeyboardInterrupt:
        say("ended")
    finally:
        page.terminate()
        page.wait()


def demo(home: Path, server: PostgresServer, s3: MotoServer, *, page: bool) -> None:
    """Back up, list, verify, lose, restore, count; then show the history's page where it is asked for."""
    backups, state = home / "backups", home / "state"
    place = home / "shared"
    blobs, blob_backups = place / "blobdb", home / "blob-backups"
    for directory in (backups, state, blob_backups):
        directory.mkdir(mode=0o700)
    for directory in (place, blobs):
        directory.mkdir(mode=0o755)
    for directory in (backups, blob_backups, place):
        give(directory, server.os_user)
    environment = {
        **os.environ,
        "HQ_BACKUPS_DEPLOY_ENV": "demo",
        "HQ_BACKUPS_BACKUP_POSTGRES": "plain",
        "HQ_BACKUPS_POSTGRESQL_BACKUP_DIR": str(backups),
        "HQ_BACKUPS_POSTGRESQL_DATA_DIR": str(server.data_dir),
        "HQ_BACKUPS_POSTGRESQL_BIN_DIR": str(server.bin_dir),
        "HQ_BACKUPS_POSTGRESQL_VERSION": str(server.version),
        "HQ_BACKUPS_POSTGRESQL_HOST": str(server.socket_dir),
        "HQ_BACKUPS_POSTGRESQL_PORT": str(server.port),
        "HQ_BACKUPS_POSTGRES_S3": "true",
        "HQ_BACKUPS_AMAZON_S3_ACCESS_KEY": s3.access_key,
        "HQ_BACKUPS_AMAZON_S3_SECRET_KEY": s3.secret_key,
        "HQ_BACKUPS_AWS_ENDPOINT": s3.endpoint,
        "HQ_BACKUPS_BACKUP_STATE_DIR": str(state),
        "HQ_BACKUPS_BACKUP_BLOBDB": "true",
        "HQ_BACKUPS_BLOBDB_S3": "true",
        "HQ_BACKUPS_BLOBDB_DIR_PATH": str(blobs),
        "HQ_BACKUPS_BLOBDB_BACKUP_DIR": str(blob_backups),
        "HQ_BACKUPS_BLOBDB_RESTORE_OWNER": server.os_user or accounts.me(),
    }
    say("a server with made-up data of a health programme")
    fill(server)
    before = server.psql(FINGERPRINT, dbname="commcarehq")
    attached = attach(blobs, server.os_user or accounts.me())
    print(before, attached, sep="\n")
    say("back it up, to disk and bucket")
    hq_backups(environment, "run_backup", "all", "--type", "daily")
    hq_backups(environment, "list_backups")
    hq_backups(environment, "verify_backup", "latest", "--store", "postgres", "--deep")
    say(f"lose everything: the server is killed, {server.data_dir}, {blobs} and all backups are deleted")
    server.kill()
    for directory in (server.data_dir, blobs, backups, blob_backups):
        shutil.rmtree(directory)
    say("restore it from the bucket")
    hq_backups(environment, "restore_backup", "postgres", "latest", "--dry-run")
    began = time.monotonic()
    for store in ("postgres", "blobdb"):
        hq_backups(environment, "restore_backup", store, "latest", "--noinput", "--confirm-env", "demo")
    say(f"restored in {time.monotonic() - began:.1f} s; is everything there?")
    after = server.psql(FINGERPRINT, dbname="commcarehq")
    found = digest(blobs)
    print(after, found, sep="\n")
    if (after, found) != (before, attached):
        raise SystemExit("RESULT failed run=demo exit=1")
    say("the history")
    hq_backups(environment, "list_backups", "--sync")
    if page:
        for directory in (backups, blob_backups):
            directory.mkdir(mode=0o700, exist_ok=True)
            give(directory, server.os_user)
        show_page(environment)


def main() -> None:
    """Run the demo in a directory of its own and clean up."""
    began = time.monotonic()
    with short_directory() as home:
        home.chmod(0o755)
        server_home, s3_home = home / "pg", home / "s3"
        for directory in (server_home, s3_home):
            directory.mkdir(mode=0o755)
        server = PostgresServer(18, server_home)
        give(server_home, server.os_user)
        try:
            with server, MotoServer(s3_home) as s3:
                for bucket in BUCKETS:
                    s3.make_bucket(bucket, versioned=True)
                demo(home, server, s3, page=sys.argv[1:] == ["--page"])
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"RESULT failed run=demo exit={error.returncode}") from None
    print(f"\nRESULT ok run=demo exit=0 ({time.monotonic() - began:.0f} s)")


if __name__ == "__main__":
    main()
