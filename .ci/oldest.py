"""Fail unless every requirement of pyproject.toml is installed at its lower bound: what is promised is tested."""

import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

EXTRAS = ("test", "bench", "gguf", "peft", "trl")


def lower_bounds(project: dict) -> dict[str, str]:
    """The lowest version that each requirement admits, of the library and of the extras that the tests install."""
    lines = [*project["dependencies"], *(line for extra in EXTRAS for line in project["optional-dependencies"][extra])]
    bounds = {}
    for requirement in map(Requirement, lines):
        lowest = [part.version for part in requirement.specifier if part.operator in (">=", "==")]
        if requirement.name != project["name"] and lowest:
            bounds[requirement.name] = lowest[0]
    return bounds


def main() -> int:
    """Print what is off."""
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    bounds = lower_bounds(project)
    # A bound without patch level means its first release.
    off = {
        name: (bound, version(name))
        for name, bound in bounds.items()
        if Version(version(name)).base_version.split(".")[: bound.count(".") + 1] != bound.split(".")
    }
    for name, (bound, found) in off.items():
        print(f"{name}: pyproject.toml admits {bound}, the oldest that can be installed is {found}: raise the bound")
    print(f"{len(bounds) - len(off)} of {len(bounds)} requirements are at their lower bounds")
    return 1 if off else 0


if __name__ == "__main__":
    sys.exit(main())
