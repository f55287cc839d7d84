"""Fails where files of a package import each other in a circle, at the top or inside functions: ``make lint``.

``from . import name`` counts as an import of that file, or of the package itself where ``name`` is none.
"""

import argparse
import ast
import pathlib
import sys
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parent.parent


def imports(file: pathlib.Path) -> Iterator[pathlib.Path]:
    """The files of the same package that ``file`` imports."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), str(file))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _found(ROOT, alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            home = file.parents[node.level - 1] if node.level else ROOT
            path = node.module.split(".") if node.module else []
            for alias in node.names:
                yield from _found(home, [*path, alias.name]) or _found(home, path)


def _found(home: pathlib.Path, path: list[str]) -> list[pathlib.Path]:
    place = home.joinpath(*path)
    return [file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()][:1]


def circles(graph: dict[pathlib.Path, set[pathlib.Path]]) -> list[list[pathlib.Path]]:
    """The groups of more than one file in which each reaches each other."""
    reached = {file: _reach(graph, file) for file in graph}
    groups = {
        frozenset(other for other in reached[file] if file in reached.get(other, ()))
        for file in graph
        if file in reached[file]
    }
    return sorted(sorted(group) for group in groups)


def _reach(graph: dict[pathlib.Path, set[pathlib.Path]], start: pathlib.Path) -> set[pathlib.Path]:
    found, waiting = set(), [start]
    while waiting:
        for file in graph.get(waiting.pop(), ()):
            if file not in found:
                found.add(file)
                waiting.append(file)
    return found


def main() -> int:
    """Returns 1 where there is a circle, and prints its files with what each imports of the others."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("packages", nargs="+", help="folders beside setup.py")
    files = [file for name in parser.parse_args().packages for file in sorted((ROOT / name).rglob("*.py"))]
    graph = {file: set(imports(file)) - {file} for file in files}
    found = circles(graph)
    for circle in found:
        print("a circle of imports:", file=sys.stderr)
        for file in circle:
            others = sorted(str(other.relative_to(ROOT)) for other in graph[file] & set(circle))
            print(f"  {file.relative_to(ROOT)} imports {', '.join(others)}", file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
