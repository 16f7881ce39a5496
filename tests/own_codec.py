"""The codec of docs/own-codecs.md, installed: its files in a folder, and the metadata that an installer would leave there."""

import re
import tomllib
from pathlib import Path

import ps_accordion

__all__ = ["distribution", "install"]

PAGE = Path(__file__).resolve().parents[1] / "docs" / "own-codecs.md"
GROUPS = "ps_accordion.codecs", "ps_accordion.device_codecs"


def install(folder):
    """Write the distribution of the page to a folder, which then belongs on the path; return the folder."""
    assert ps_accordion.__file__
    page = PAGE.read_text(encoding="utf-8")
    files = dict(re.findall(r"^```\w+\n# ([\w.]+)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL))
    project = tomllib.loads(files.pop("pyproject.toml"))["project"]
    assert set(project["entry-points"]) == set(GROUPS)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    points = {group: project["entry-points"][group] for group in GROUPS}
    distribution(folder, points, name=project["name"], version=project["version"])
    return folder


def distribution(folder, points, *, name="other", version="2.0"):
    """Write the metadata of a distribution with these entry points, by group and name, to a folder."""
    metadata = folder / f"{name}-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")
    lines = [line for group, named in points.items() for line in (f"[{group}]", *(f"{key} = {named[key]}" for key in named))]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
