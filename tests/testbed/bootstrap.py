"""Make the virtual environment of this checkout, quick when it is there, and run a program in it.

    python3 tests/testbed/bootstrap.py [--clean | PROGRAM [ARGUMENT...]]

As root the tests become other users, who must be able to run the interpreter and read the code.
So root's environment is made from an interpreter that everybody may run, in a place that everybody
may reach, and a checkout that others cannot read is copied beside it and used there.
Standard library only, any Python 3.9: it runs before anything is installed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
IS_ROOT = os.geteuid() == 0
PYTHONS = ("python3.13", "python3.12", "python3.11", "python3")
NEEDED = (3, 11)
NOT_COPIED = {".git", ".venv", ".tox", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache"}
PROBE = """
import os, sys, ensurepip, venv
print(*sys.version_info[:2])
print(os.path.realpath(sys.executable))
print(os.path.dirname(os.path.realpath(os.__file__)))
"""


def say(text: str) -> None:
    """Print to standard error: standard output is the program's."""
    print(f"bootstrap: {text}", file=sys.stderr, flush=True)


def reachable(path: Path) -> bool:
    """Tell whether every user may pass down to a path and read it."""
    path = path.resolve()
    mode = path.stat().st_mode
    wanted = stat.S_IROTH | (stat.S_IXOTH if path.is_dir() else 0)
    return mode & wanted == wanted and all(parent.stat().st_mode & stat.S_IXOTH for parent in path.parents)


def interpreter() -> Path:
    """Return the newest suitable Python of those on the path."""
    places = [*os.environ.get("PATH", os.defpath).split(os.pathsep), "/usr/local/bin", "/usr/bin"]
    for name in PYTHONS:
        for place in dict.fromkeys(places):
            found = shutil.which(name, path=place)
            real = suitable(found) if found else None
            if real:
                return real
    raise SystemExit(
        f"no Python {NEEDED[0]}.{NEEDED[1]} or newer with venv"
        + (" that other users can run" if IS_ROOT else "")
        + ": install python3 and python3-venv"
    )


def suitable(found: str) -> Path | None:
    """Return an interpreter's real path when it is new enough, can make environments and may be run."""
    answer = subprocess.run(
        [found, "-I", "-c", PROBE], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if answer.returncode:
        return None
    version, executable, library = answer.stdout.splitlines()
    if tuple(map(int, version.split())) < NEEDED:
        return None
    if IS_ROOT and not (reachable(Path(executable)) and reachable(Path(library))):
        return None
    return Path(executable)


def state_dir() -> Path:
    """Return root's directory for this checkout, refusing one that somebody else made."""
    digest = hashlib.sha256(os.fsencode(CHECKOUT)).hexdigest()[:10]
    path = Path("/var/tmp") / f"hq_backups-{digest}"
    path.mkdir(mode=0o755, exist_ok=True)
    if path.is_symlink() or path.stat().st_uid != os.geteuid():
        raise SystemExit(f"{path} belongs to somebody else")
    return path


def files() -> list[str]:
    """Return the checkout's files: tracked, and untracked but not ignored."""
    git = ["git", "-C", str(CHECKOUT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        listed = subprocess.run(git, capture_output=True, check=True).stdout
        return sorted({os.fsdecode(name) for name in listed.split(b"\0") if name})
    names = []
    for directory, inside, here in os.walk(CHECKOUT):
        inside[:] = [name for name in inside if name not in NOT_COPIED]
        names += [os.path.relpath(os.path.join(directory, name), CHECKOUT) for name in here]
    return sorted(names)


def same(one: os.stat_result, other: os.stat_result) -> bool:
    """Tell whether a file needs no copying."""
    return (one.st_size, one.st_mtime_ns) == (other.st_size, other.st_mtime_ns)


def mirror(target: Path) -> Path:
    """Bring a copy of the checkout up to date where everybody may read it."""
    listing = target.with_suffix(".files")
    before = set(listing.read_text().split("\0")) if listing.exists() else set()
    names = [name for name in files() if (CHECKOUT / name).is_file()]
    for gone in before - set(names):
        (target / gone).unlink(missing_ok=True)
    for name in names:
        source, copy = CHECKOUT / name, target / name
        facts = source.stat()
        if copy.exists() and same(facts, copy.stat()):
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, copy)
        copy.chmod(facts.st_mode & 0o777 | (0o555 if facts.st_mode & stat.S_IXUSR else 0o444))
    listing.write_text("\0".join(names))
    return target


def working_tree() -> Path:
    """Return the checkout, or its copy where other users could not read it."""
    if not IS_ROOT or all(map(reachable, (CHECKOUT, CHECKOUT / "hq_backups", CHECKOUT / "setup.py"))):
        return CHECKOUT
    tree = state_dir() / "checkout"
    say(f"other users cannot read {CHECKOUT}: working in {tree}")
    return mirror(tree)


def environment(tree: Path) -> Path:
    """Make or update the virtual environment and return it."""
    link = CHECKOUT / ".venv"
    venv = state_dir() / "venv" if IS_ROOT else link
    if not IS_ROOT and link.is_symlink():
        link.unlink()
    python = venv / "bin" / "python"
    stamp = venv / ".installed"
    wanted = hashlib.sha256((tree / "setup.py").read_bytes() + os.fsencode(tree)).hexdigest()
    if not (python.exists() and stamp.exists() and stamp.read_text() == wanted):
        if not python.exists():
            base = interpreter()
            say(f"making {venv} with {base}")
            subprocess.run([base, "-m", "venv", "--clear", venv], check=True, stdout=sys.stderr)
        say("installing the package and its development tools")
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, "--editable", f"{tree}[dev]"], check=True, stdout=sys.stderr)
        stamp.write_text(wanted)
    if IS_ROOT and (link.is_symlink() or not link.exists()) and link.resolve() != venv.resolve():
        link.unlink(missing_ok=True)
        link.symlink_to(venv)
    return venv


def compile_package(tree: Path, venv: Path) -> None:
    """Compile the package, as an installation does: hundreds of processes of the tests need not do it each.

    Most could not keep it, for they run as other users or where PYTHONDONTWRITEBYTECODE is set.
    """
    compile_ = [venv / "bin" / "python", "-m", "compileall", "-q", tree / "hq_backups"]
    # What does not compile is told by whoever needs it.
    subprocess.run(compile_, check=False, stdout=sys.stderr)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Keep other bootstraps of this checkout waiting."""
    descriptor = os.open(CHECKOUT, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def clean() -> None:
    """Remove the environment and the copy."""
    if IS_ROOT:
        shutil.rmtree(state_dir())
    link = CHECKOUT / ".venv"
    if link.is_symlink():
        link.unlink()
    elif (link / ".installed").exists():
        shutil.rmtree(link)


def main(arguments: list[str]) -> int:
    """Set up, then become the program."""
    os.umask(0o022)
    if arguments == ["--clean"]:
        clean()
        return 0
    with alone():
        tree = working_tree()
        venv = environment(tree)
        compile_package(tree, venv)
    if not arguments:
        return 0
    path = f"{venv / 'bin'}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    os.environ.update(PATH=path, VIRTUAL_ENV=str(venv))
    os.environ.pop("PYTHONHOME", None)
    os.chdir(tree)
    os.execvp(arguments[0], arguments)  # noqa: S606 - no shell is the point


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
