"""The schemas of csrc/ops.cpp as text, for a package that is built without the library that holds them."""

import pathlib
import re

SOURCE = pathlib.Path(__file__).resolve().parent.parent / "csrc" / "ops.cpp"


def read(source: str) -> list[str]:
    """What ``m.def`` is given, one string of C++ literals each."""
    calls = re.findall(r'\bm\.def\(\s*((?:"[^"]*"\s*)+)\);', source)
    return ["".join(re.findall(r'"([^"]*)"', call)) for call in calls]


def write(path: pathlib.Path) -> None:
    """One schema a line."""
    path.write_text("\n".join(read(SOURCE.read_text(encoding="utf-8"))) + "\n", encoding="utf-8")
