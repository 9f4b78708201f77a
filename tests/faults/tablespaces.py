"""A server with tablespaces as a victim: half of its data lie outside the data directory."""

from __future__ import annotations

from pathlib import Path

from tests.faults.victim import PostgresVictim
from tests.testbed.process import give


class TablespacesVictim(PostgresVictim):
    """PostgreSQL, mode plain, with two tablespaces."""

    @property
    def disks(self) -> Path:
        return self.server.workdir / "disks"

    def make_data(self, megabytes: int) -> None:
        """Fill a table that lies in one tablespace, and its index in another."""
        if not self.disks.exists():
            places = [self.disks, self.disks / "one disk", self.disks / "two"]
            for place in places:
                place.mkdir(mode=0o700)
                give(place, self.server.os_user)
            for name, place in zip(("one", "two"), places[1:], strict=True):
                self.server.psql(f"CREATE TABLESPACE {name} LOCATION '{place}'")
            self.server.psql(
                "CREATE TABLE victim (id bigserial PRIMARY KEY USING INDEX TABLESPACE two, body bytea) TABLESPACE one"
            )
        super().make_data(megabytes)

    def locations(self) -> list[str]:
        """Return where the tablespaces of the running server lie."""
        return self.server.psql(
            "SELECT pg_tablespace_location(oid) FROM pg_tablespace WHERE oid >= 16384 ORDER BY spcname"
        ).splitlines()

    def beside(self) -> list[str]:
        """Return what lies beside the data directory, and beside the tablespaces."""
        return super().beside() + self.outside()

    def outside(self) -> list[str]:
        """Return what lies beside the tablespaces that the server began with."""
        return sorted(path.name for path in self.disks.iterdir())
