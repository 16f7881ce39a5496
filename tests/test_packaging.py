"""The project as a user gets it: built from every kind of source, installed away from the checkout, and run there."""

import ast
import email
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from ps_accordion import __version__

ROOT = Path(__file__).resolve().parent.parent
ROLES = ("launcher", "server", "worker")
OFFLINE = ("--no-index", "--no-deps", "--no-build-isolation", "--no-cache-dir", "--quiet", "--disable-pip-version-check")
"""Builds use the setuptools of this environment, and dependencies are there already: nothing is downloaded."""


def run(*command: str | Path, cwd: Path, code: int = 0) -> str:
    """Run a command that must end with `code`; return what it printed, both streams together."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "GIT_"))}
    environment |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=110,
    )
    assert done.returncode == code, f"{command}\n{done.stdout}"
    return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the checkout as it is on the disk, links as links, without what git ignores; commit it there."""
    tree = tmp_path_factory.mktemp("source") / "ps-accordion"
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", cwd=ROOT)
    for name in listed.split("\0"):
        source = ROOT / name
        if name and (source.is_symlink() or source.is_file()):
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, tree / name, follow_symlinks=False)
    run("git", "init", "--quiet", cwd=tree)
    run("git", "add", "--all", cwd=tree)
    run("git", "-c", "user.name=test", "-c", "user.email=test@localhost", "commit", "--quiet", "--message=tree", cwd=tree)
    return tree


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", *OFFLINE, "--wheel-dir", folder, tree, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture
def install(tmp_path: Path) -> Callable[..., str]:
    """Return a function that installs into an environment that holds nothing but sees our dependencies."""
    venv = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=tmp_path)
    # A line in a .pth file adds a folder, but none of the .pth files in it: an editable install there stays out of sight.
    (site,) = venv.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def install(source: Path | str, *, code: int = 0) -> str:
        pip = (sys.executable, "-m", "pip", "--python", venv / "bin" / "python", "install")
        return run(*pip, *OFFLINE, source, cwd=tmp_path, code=code)

    return install


def check_installed(folder: Path) -> None:
    """Run what a user runs first, away from the checkout."""
    away = folder / "away"
    away.mkdir()
    binaries = folder / "venv" / "bin"
    assert "launch" in run(binaries / "ps-accordion", "--help", cwd=away)
    program = "import ps_accordion.server, ps_accordion.worker, ps_accordion.launcher as last; print(last.__file__)"
    (found,) = run(binaries / "python", "-c", program, cwd=away).splitlines()
    assert Path(found).is_relative_to(folder / "venv")
    assert list(away.iterdir()) == []


def test_the_wheel_holds_every_file_of_the_package(tree: Path, wheel: Path) -> None:
    """A new module, folder or data file reaches users; the roles are in it as files, and nothing else is."""
    expected = {
        file.relative_to(tree).as_posix()
        for folder in (tree / "ps_accordion", *(tree / "ps_accordion" / role for role in ROLES))
        for file in folder.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert not any(info.external_attr >> 28 == 0xA for info in archive.infolist()), "a link in a wheel"
    assert held == expected


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    """Name, version, licence, command and extras are in its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        said = email.message_from_bytes(archive.read(metadata))
        commands = archive.read(metadata.replace("METADATA", "entry_points.txt")).decode()
        assert archive.read(metadata.replace("METADATA", "licenses/LICENSE")) == (ROOT / "LICENSE").read_bytes()
    assert (said["Name"], said["Version"], said["License-Expression"]) == ("ps-accordion", __version__, "Apache-2.0")
    assert "[console_scripts]\nps-accordion = ps_accordion.launcher.cli:main\n" in commands
    assert said.get_all("Provides-Extra") == ["demo"]


def test_an_installed_wheel_works_away_from_the_checkout(wheel: Path, install: Callable[..., str], tmp_path: Path) -> None:
    """`pip install` of the wheel gives the command and the three roles."""
    install(wheel)
    check_installed(tmp_path)


def _archive(tree: Path, folder: Path) -> Path:
    run("git", "archive", "--prefix=ps-accordion/", f"--output={folder / 'tree.tar.gz'}", "HEAD", cwd=tree)
    return folder / "tree.tar.gz"


def _sdist(tree: Path, folder: Path) -> Path:
    program = "import sys, setuptools.build_meta as backend; backend.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", program, folder, cwd=tree)
    (sdist,) = folder.glob("ps_accordion-*.tar.gz")
    return sdist


def _zip_of_files(tree: Path, folder: Path) -> Path:
    resolved = folder / "resolved" / "ps-accordion"
    shutil.copytree(tree, resolved, symlinks=False, ignore=shutil.ignore_patterns(".git"))
    return Path(shutil.make_archive(str(folder / "tree"), "zip", folder / "resolved"))


def _clone(tree: Path, folder: Path) -> str:
    run("git", "clone", "--quiet", tree, folder / "clone", cwd=folder)
    return f"git+file://{folder / 'clone'}"


@pytest.mark.full
@pytest.mark.parametrize("source", [_archive, _sdist, _zip_of_files, _clone])
def test_it_installs_from(
    source: Callable[[Path, Path], Path | str], tree: Path, install: Callable[..., str], tmp_path: Path
) -> None:
    """A tar.gz of the repository, the sdist, a zip with files in place of the links, and git+file give the same."""
    install(source(tree, tmp_path))
    check_installed(tmp_path)


def test_a_zip_that_lost_the_links_is_refused(tree: Path, install: Callable[..., str], tmp_path: Path) -> None:
    """Installers unpack links in a zip as small text files: the build stops, says so, and says what to do."""
    run("git", "archive", "--format=zip", "--prefix=ps-accordion/", f"--output={tmp_path / 'tree.zip'}", "HEAD", cwd=tree)
    said = " ".join(install(tmp_path / "tree.zip", code=1).split())
    assert "expected ps_accordion/launcher to be a symbolic link to ../launcher, found a file with the text of a link" in said
    assert "Install from a git clone" in said


def test_the_advice_for_lost_links_works(tree: Path, tmp_path: Path) -> None:
    """The command in the refusal repairs the tree."""
    copy = tmp_path / "copy"
    shutil.copytree(tree, copy, symlinks=True, ignore=shutil.ignore_patterns(".git"))
    for role in ROLES:
        (copy / "ps_accordion" / role).unlink()
        (copy / "ps_accordion" / role).write_text(f"../{role}")
    said = run(sys.executable, "setup.py", "--version", cwd=copy, code=1)
    advice = re.search(r"put the links back: (cd .*)", said)
    assert advice, said
    run("sh", "-c", advice[1], cwd=copy)
    run(sys.executable, "setup.py", "--version", cwd=copy)
    assert [(copy / "ps_accordion" / role).readlink() for role in ROLES] == [Path("..", role) for role in ROLES]


def test_the_links_are_committed_as_links() -> None:
    """The roles are real folders at the top, and links in the package."""
    for role in ROLES:
        assert (ROOT / "ps_accordion" / role).readlink() == Path("..", role)
        assert (ROOT / role / "__init__.py").is_file()


def test_every_declared_dependency_is_imported_and_every_import_declared() -> None:
    """Nothing is installed for nothing, and nothing works only because something else brings it along."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    imported = set()
    for folder in (ROOT / "ps_accordion", *(ROOT / role for role in ROLES)):
        for file in folder.rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    imported.add(node.module.partition(".")[0])
    imported -= {*sys.stdlib_module_names, "ps_accordion"}
    declared = [*project["dependencies"], *(row for extra in project["optional-dependencies"].values() for row in extra)]
    modules = {"pyzmq": "zmq", "scikit-learn": "sklearn"}
    names = [re.split(r"[<>=!~\[ ]", row)[0] for row in declared]
    assert imported == {modules.get(name, name.replace("-", "_")) for name in names}


def test_every_direct_dependency_is_pinned_once() -> None:
    """`constraints.txt` holds one exact version of everything that pyproject.toml names, within its bounds."""
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text())
    groups = [row for group in tables["dependency-groups"].values() for row in group if isinstance(row, str)]
    extras = [row for extra in tables["project"]["optional-dependencies"].values() for row in extra]
    bounds = dict(row.split(">=") for row in (*tables["project"]["dependencies"], *extras, *groups))
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)
    assert len(pins) == len(lines)
    assert pins.keys() == bounds.keys() | {"pip"}
    for name, bound in bounds.items():
        assert [*map(int, pins[name].split("."))] >= [*map(int, bound.split("."))], name
