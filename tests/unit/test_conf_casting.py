from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hq_backups.conf.casting import KINDS, cast
from hq_backups.setting import Setting
from hq_backups.settings_table import SETTINGS


def value_of(kind: str, raw: Any, **more: Any) -> Any:
    return cast(Setting("x", kind, **more), raw)


GOOD: list[tuple[str, Any, Any]] = [
    ("bool", "yes", True),
    ("bool", "On", True),
    ("bool", 1, True),
    ("bool", "False", False),
    ("bool", "0", False),
    ("int", " 16 ", 16),
    ("int", "08", 8),
    ("text", 14, "14"),
    ("name", "softlayer.2-x_y", "softlayer.2-x_y"),
    ("version", 14, "14"),
    ("version", 9.6, "9.6"),
    ("dir", "/opt//data/./x/", "/opt/data/x"),
    ("list", "a, b,,c", ("a", "b", "c")),
    ("list", '["a", "b"]', ("a", "b")),
    ("emails", "a@example.com,b@example.com", ("a@example.com", "b@example.com")),
    ("words", "systemctl stop 'my pg'", ("systemctl", "stop", "my pg")),
    ("words", ["systemctl", "stop", "pg"], ("systemctl", "stop", "pg")),
    ("words", '["monit", "stop pg"]', ("monit", "stop pg")),
    ("size", "50MB", 50_000_000),
    ("size", "50 MiB/s", 50 * 1024**2),
    ("size", "1.5k", 1500),
    ("size", 4096, 4096),
    ("url", "minio:9000", "https://minio:9000"),
    ("url", "http://10.0.0.5:9000/", "http://10.0.0.5:9000"),
    ("urls", "http://a:9200,http://b:9200", ("http://a:9200", "http://b:9200")),
    ("timezone", "Africa/Nairobi", "Africa/Nairobi"),
    ("hosts", {"pg0": ["postgres"], "c0": "couchdb"}, {"pg0": ("postgres",), "c0": ("couch",)}),
    ("hosts", '{"pg0": ["postgres", "blobdb"]}', {"pg0": ("postgres", "blobdb")}),
    ("hosts", "pg0=postgres,couch0=couch", {"pg0": ("postgres",), "couch0": ("couch",)}),
    ("text_or_off", "False", None),
    ("text_or_off", "pg1", "pg1"),
    ("remote", "False", None),
    ("remote", "backup0.example.com", "backup0.example.com"),
    ("remote", "couchdb@[fd00::1]", "couchdb@[fd00::1]"),
    ("remote", "couchdb@10.0.0.9:/srv/mirrors/couch0", "couchdb@10.0.0.9:/srv/mirrors/couch0"),
]

BAD: list[tuple[str, Any]] = [
    ("bool", "ture"),
    ("remote", "-oProxyCommand=evil"),
    ("remote", "host:"),
    ("remote", "host:/"),
    ("remote", "host:relative"),
    ("remote", "host::module"),
    ("remote", "host:/srv/../etc"),
    ("remote", "two hosts"),
    ("remote", True),
    ("bool", 2),
    ("bool", []),
    ("int", True),
    ("int", "1.5"),
    ("int", 2.0),
    ("int", "٣"),
    ("int", "9" * 400),
    ("text", False),
    ("text", ["a"]),
    ("text", "a\nb"),
    ("name", "a/b"),
    ("name", "-rf"),
    ("name", "a b"),
    ("version", "latest"),
    ("dir", "relative"),
    ("dir", "/"),
    ("dir", "/a/../etc"),
    ("dir", "/a\0b"),
    ("list", 5),
    ("list", "[1"),
    ("emails", "not an address"),
    ("emails", "a@example.com\nBcc: b@example.com"),
    ("emails", ["a@example.com", "x"]),
    ("words", []),
    ("words", "echo 'open"),
    ("words", 5),
    ("size", "fast"),
    ("size", "0"),
    ("size", True),
    ("size", "-5MB"),
    ("url", "ftp://x"),
    ("url", "https://"),
    ("url", "http://host:99999"),
    ("url", "http://host:port"),
    ("urls", []),
    ("timezone", "Mars/Olympus"),
    ("timezone", "../../etc/passwd"),
    ("timezone", "Africa"),
    ("hosts", ["pg0"]),
    ("hosts", {"pg0": ["postgers"]}),
    ("hosts", "pg0=postgres,pg0=couch"),
]


@pytest.mark.parametrize(("kind", "raw", "value"), GOOD)
def test_a_value_that_fits_is_read(kind: str, raw: Any, value: Any) -> None:
    assert value_of(kind, raw) == value


@pytest.mark.parametrize(("kind", "raw"), BAD)
def test_a_value_that_does_not_fit_says_what_it_must_be(kind: str, raw: Any) -> None:
    with pytest.raises(ValueError, match="must "):
        value_of(kind, raw)


def test_choices_are_read_without_regard_to_case() -> None:
    codec = SETTINGS["backup_compression"]
    assert [cast(codec, raw) for raw in ("GZIP", "none", False, "off")] == ["gzip", "none", "none", "none"]
    with pytest.raises(ValueError, match="gzip, zstd or none"):
        cast(codec, "bzip2")


def test_the_mode_is_a_word_or_off() -> None:
    mode = SETTINGS["backup_postgres"]
    assert [cast(mode, raw) for raw in ("Dump", "plain", False, "no")] == ["dump", "plain", False, False]
    for wrong in (True, "pgdump"):
        with pytest.raises(ValueError, match="plain, dump or False"):
            cast(mode, wrong)


def test_numbers_keep_their_bounds() -> None:
    assert value_of("int", 23, low=0, high=23) == 23
    for number in (-1, 24):
        with pytest.raises(ValueError, match="must be at"):
            value_of("int", number, low=0, high=23)


JSONABLE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from(sorted(KINDS)), JSONABLE)
def test_nothing_but_a_misfit_comes_of_nonsense(kind: str, raw: Any) -> None:
    message = "must fit"
    try:
        value_of(kind, raw, choices=("plain", "dump"))
    except ValueError as error:
        message = str(error)
    assert message.startswith("must ")


@given(st.integers(1, 10**6), st.sampled_from(["", "k", "M", "G", "T"]), st.sampled_from(["", "B", "B/s"]))
def test_sizes_grow_with_their_unit(number: int, unit: str, tail: str) -> None:
    size = value_of("size", f"{number}{unit}{tail}")
    assert size == number * 1000 ** " kMGT".index(unit or " ")
    if unit:
        assert value_of("size", f"{number}{unit}i{tail}") > size
