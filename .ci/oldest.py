"""Fail unless every requirement of pyproject.toml is installed at its lower bound: what is promised is tested."""

import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

EXTRAS = ("test", "bench", "by-hand", "gguf", "peft", "trl")


def lower_bounds(project: dict) -> dict[str, str]:
    """The lowest version that each requirement admits, of the library and of the extras that the tests install."""
    lines = [*project["dependencies"], *(line for extra in EXTRAS for line in project["optional-dependencies"][extra])]
    bounds = {}
    for requirement in map(Requirement, lines):
        if requirement.name != project["name"]:
            lowest = [part.version for part in requirement.specifier if part.operator in (">=", "==")]
            bounds[requirement.name] = lowest[0] if lowest else "no lower bound"
    return bounds


def main() -> int:
    """Print what is off."""
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    bounds = lower_bounds(project)
    # A local part ("+cu130") names a build, not a version.
    installed = {name: Version(version(name)).public for name in bounds}
    off = {
        name: bound
        for name, bound in bounds.items()
        if bound == "no lower bound" or Version(installed[name]) != Version(bound)
    }
    for name, bound in off.items():
        print(
            f"{name}: {bound} in pyproject.toml, {installed[name]} installed: raise the bound to what can be installed"
        )
    print(f"{len(bounds) - len(off)} of {len(bounds)} requirements are at their lower bounds")
    return 1 if off else 0


if __name__ == "__main__":
    sys.exit(main())
