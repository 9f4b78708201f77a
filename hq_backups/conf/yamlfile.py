"""Read a public.yml without Ansible: safely, with encrypted values passed over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TextIO

import yaml


@dataclass(frozen=True)
class Tagged:
    """A value that only Ansible could read."""

    tag: str

    @property
    def encrypted(self) -> bool:
        """Return whether it is one of the vault's."""
        return self.tag in ("!vault", "!vault-encrypted")


class Unreadable(Exception):
    """Raised for a file that cannot be read; the message holds nothing of its content."""


class _Loader(yaml.SafeLoader):
    """SafeLoader that keeps Ansible's own tags as marks and remembers names that stand twice."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self.twice: set[str] = set()

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build the map as ever, and look for names that stand twice."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    self.twice.add(str(key.value))
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _tagged(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> Any:
    if suffix == "unsafe" and isinstance(node, yaml.ScalarNode):
        return loader.construct_scalar(node)
    return Tagged("!" + suffix)


_Loader.add_multi_constructor("!", _tagged)


def load(path: str) -> tuple[dict[Any, Any], set[str]]:
    """Return the file's map and the names that stand twice in it; raises Unreadable."""
    try:
        with open(path, encoding="utf-8") as stream:
            start = stream.read(14)
            stream.seek(0)
            if start.startswith("$ANSIBLE_VAULT"):
                raise Unreadable("it is encrypted by ansible-vault as a whole")
            loader = _Loader(stream)
            try:
                data = loader.get_single_data()
            finally:
                loader.dispose()
    except OSError as error:
        raise Unreadable(error.strerror or type(error).__name__) from None
    except UnicodeDecodeError:
        raise Unreadable("it is not text in UTF-8") from None
    except yaml.YAMLError as error:
        # The error's own words may quote the line, and with it a secret.
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise Unreadable(f"it is not YAML that can be read safely{where}") from None
    except (RecursionError, TypeError, ValueError):
        raise Unreadable("it is not YAML that can be read safely") from None
    if data is None:
        return {}, loader.twice
    if not isinstance(data, dict):
        raise Unreadable("it is not a map of names and values")
    return data, loader.twice
