"""Gives packages that are run from the source tree the metadata of an installed distribution.

    python3 distribution.py FOLDER

writes name, version and entry points, as pyproject.toml states them, into FOLDER, which has to be on the path:
`octavo` asks the metadata for its version and for its subcommands.
"""

import sys
import tomllib
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[3]


def write_metadata(folder: Path) -> None:
    """Write FOLDER/octavo-VERSION.dist-info."""
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]
    target = folder / f"{project['name']}-{project['version']}.dist-info"
    target.mkdir(parents=True, exist_ok=True)
    metadata = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    (target / "METADATA").write_text(metadata)
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in points.items())]
    (target / "entry_points.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    write_metadata(Path(sys.argv[1]))
