"""Refuse to build from a tree that has lost its links. Everything else is in pyproject.toml.

`ps_accordion/server`, `worker` and `launcher` are committed symbolic links to the folders at the top.
A zip of the repository, unpacked by a tool that does not know links, has small text files in their place, and would install
without the three roles and without a word.
"""

from pathlib import Path

from setuptools import setup

ROLES = ("launcher", "server", "worker")

package = Path(__file__).resolve().parent / "ps_accordion"
lost = [role for role in ROLES if not (package / role / "__init__.py").is_file()]
if lost:
    found = "a file with the text of a link" if (package / lost[0]).is_file() else "nothing that can be imported"
    raise SystemExit(
        f"ps-accordion cannot be built from {package.parent}: expected ps_accordion/{lost[0]} to be a symbolic link to "
        f"../{lost[0]}, found {found} (so with: {', '.join(lost)}). "
        "A zip of the repository or a checkout without symbolic links loses them. "
        "Install from a git clone, from git+https, from a tar.gz or from the wheel; or put the links back: "
        f"cd ps_accordion && rm -f {' '.join(lost)} && ln -s {' '.join('../' + role for role in lost)} ."
    )

setup()
