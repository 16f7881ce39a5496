"""What the packages offer: names that are sorted, complete and really there."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ps_accordion

PACKAGE = Path(ps_accordion.__file__).parent
# Links are followed, so that the three roles are in it: rglob does not do that.
MODULES = sorted({*PACKAGE.rglob("*.py"), *(file for folder in PACKAGE.iterdir() for file in folder.rglob("*.py"))})
IDS = [file.relative_to(PACKAGE).as_posix() for file in MODULES]


def _offered(tree: ast.Module) -> list[str] | None:
    for node in tree.body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]:
            return list(ast.literal_eval(node.value))
    return None


def _sorted(names: list[str]) -> list[str]:
    """Sort as ruff does: constants, classes, the rest; numbers within a name by their value."""

    def place(name: str) -> tuple[int, list[tuple[int, str]]]:
        kind = 0 if name.isupper() and len(name) > 1 else 1 if name[:1].isupper() else 2
        return kind, [(int(part or 0) if part.isdigit() else -1, part) for part in re.split(r"(\d+)", name)]

    return sorted(names, key=place)


def _defined(tree: ast.Module) -> set[str]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return {node.name for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")}


def _imported(tree: ast.Module) -> set[str]:
    """Return the names that a package takes from its own modules, but not whole modules."""
    return {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.level and node.module
        for alias in node.names
        if not alias.name.startswith("_")
    }


def test_all_rooms_are_looked_at() -> None:
    """The links are followed: each role is among the modules."""
    assert {"config.py", "server/__init__.py", "worker/__init__.py", "launcher/__init__.py"} <= set(IDS)


@pytest.mark.parametrize("file", MODULES, ids=IDS)
def test_public_names_are_sorted_and_complete(file: Path) -> None:
    """`__all__` lists every public class and function of a module, and all that a package takes from its modules."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    offered = _offered(tree)
    expected = _defined(tree) | (_imported(tree) if file.name == "__init__.py" else set())
    if offered is None:
        # A program is run, not imported; a package that only holds modules offers nothing.
        assert file.name == "__main__.py" or not expected
        return
    assert offered == _sorted(offered)
    assert len(offered) == len(set(offered))
    assert expected <= set(offered)


def test_offered_names_exist() -> None:
    """`from module import *` works for every module: in a process of its own, since it loads everything that we have."""
    names = [".".join(("ps_accordion", *Path(each).with_suffix("").parts)).removesuffix(".__init__") for each in IDS]
    names = [name for name in names if not name.endswith("__main__")]
    program = f"import importlib\nfor name in {names!r}:\n    exec(f'from {{name}} import *', {{}})\n"
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def test_the_package_offers_its_errors() -> None:
    """Errors are what users catch; everything else is in its room."""
    from ps_accordion import errors

    assert set(ps_accordion.__all__) == {*errors.__all__, "__version__"}


def test_importing_the_package_is_light() -> None:
    """`ps-accordion status` must not wait for torch: the core loads none of the heavy libraries."""
    program = "import sys, ps_accordion, ps_accordion.errors; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert not {"torch", "numba", "zmq", "numpy", "msgspec", "sklearn"} & set(done.stdout.split())


def test_importing_the_settings_is_light() -> None:
    """The command line reads settings before it knows which role it starts."""
    program = "import sys, ps_accordion.config; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert not {"torch", "numba", "zmq", "numpy", "sklearn"} & set(done.stdout.split())
