"""What docs/architecture.md shows of the code is what the code does."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "architecture.md"
if not DOCUMENT.is_file():
    pytest.skip("needs the checkout", allow_module_level=True)
TEXT = DOCUMENT.read_text(encoding="utf-8")


def test_the_bottleneck_is_the_one_that_is_written():
    bottleneck = pytest.importorskip("torchvision").models.resnet.Bottleneck
    from resnet_fused.conversion.rewriting import rewritten

    code = re.search(r"```python\n(def forward.*?)```", TEXT, re.DOTALL)[1]
    column = code.index("def forward", 1)
    shown = [
        ast.parse("\n".join(part))
        for part in zip(*[(line[:column], line[column:]) for line in code.splitlines()], strict=True)
    ]
    before, after = ("\n".join(map(ast.unparse, tree.body[0].body)) for tree in shown)
    method = rewritten(bottleneck.forward)
    assert after == "\n".join(map(ast.unparse, method.body)).replace("_resnet_fused_", "")
    # The original differs from the document's column in type annotations alone.
    assert before == "\n".join(map(ast.unparse, method.tree.body))


def test_every_file_that_it_names_is_there():
    named = set(re.findall(r"`((?:csrc|resnet_fused)/[\w/]+\.(?:py|cpp|cu|h|cuh))`", TEXT))
    assert len(named) >= 10
    assert not [name for name in sorted(named) if not (ROOT / name).is_file()]
    # In the map a folder stands first, then its files.
    names = {path.name for folder in ("csrc", "resnet_fused", "tools") for path in (ROOT / folder).rglob("*")}
    assert not set(re.findall(r"[\w]+\.(?:py|cpp|cuh?|h)\b", TEXT)) - names


def test_the_path_to_the_kernel_is_of_eight_files_and_the_words_are_ten_at_most():
    steps = re.findall(r"^\| (\d) \|", TEXT, re.MULTILINE)
    assert steps == list("12345678")
    words = TEXT[TEXT.index("## Words") : TEXT.index("## A Bottleneck")]
    assert len(re.findall(r"^\| \w+ \|", words, re.MULTILINE)) - 1 <= 10
