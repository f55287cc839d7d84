"""Prints the requirements that pyproject.toml names: those to build, to run, and of the extras given as arguments.

The Makefile installs them before it builds the package itself, which needs torch at build time.
"""

import pathlib
import sys

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib

PROJECT = pathlib.Path(__file__).resolve().parent.parent / "pyproject.toml"


def requirements(extras: list[str]) -> list[str]:
    """Requirement specifiers, each once."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))
    found = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    for extra in extras:
        found += project["project"]["optional-dependencies"][extra]
    return list(dict.fromkeys(found))


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1:])))
