"""What one wheel for every torch and Python rests on: includes, symbols and the files of the package."""

import importlib.util
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
LIBRARIES = sorted((ROOT / "resnet_fused").glob("*.so"))


def tool(name):
    """A script of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check_includes = tool("check_includes")
check_wheel = tool("check_wheel")


def test_the_sources_include_nothing_of_torch_but_its_stable_abi():
    sources = check_includes.sources()
    assert {path.name for path in sources} >= {"ops.cpp"}
    assert list(check_includes.offences(sources)) == []


@pytest.mark.parametrize(
    "header",
    [
        "torch/extension.h",
        "torch/torch.h",
        "torch/library.h",
        "torch/csrc/autograd/variable.h",
        "torch/csrc/stableish/tensor.h",
        "ATen/ATen.h",
        "c10/util/Half.h",
        "Python.h",
        "pybind11/pybind11.h",
    ],
)
@pytest.mark.parametrize("form", ["#include <{}>", '#include "{}"', "  #  include<{}>"])
def test_an_unstable_include_is_found(tmp_path, header, form):
    source = tmp_path / "kernel.cpp"
    source.write_text(f"#include <vector>\n{form.format(header)}\n")
    assert list(check_includes.offences([source])) == [f"{source}:2: {header}"]


@pytest.mark.parametrize(
    "header",
    [
        "torch/csrc/stable/library.h",
        "torch/headeronly/util/Half.h",
        "torch/csrc/inductor/aoti_torch/c/shim.h",
        "cpu/vector.h",
        "layout.h",
    ],
)
def test_a_stable_include_passes(tmp_path, header):
    source = tmp_path / "kernel.cu"
    source.write_text(f"#include <{header}>\n")
    assert list(check_includes.offences([source])) == []


def test_both_libraries_are_built():
    assert {path.name for path in LIBRARIES} >= {"_ops.abi3.so", "_cpu.abi3.so"}


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_a_library_needs_no_symbol_of_python_and_none_of_torch_s_cxx(library):
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("needs nm, of binutils")
    output = subprocess.run([nm, "-D", "--undefined-only", library], capture_output=True, text=True, check=True).stdout
    symbols = [line.split()[-1] for line in output.splitlines()]
    assert any(symbol.startswith("aoti_torch_") for symbol in symbols)
    assert [s for s in symbols if re.match(r"_?Py[A-Z_]", s)] == []
    # Mangled names with a namespace of torch: std's templates over torch's types would have them too.
    assert [s for s in symbols if re.match(r"_Z.*(2at|3c10|5torch|6caffe2)\d", s)] == []


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_the_auditor_of_torch_s_stable_abi_is_content(library):
    if importlib.util.find_spec("torch_abi_audit") is None:
        pytest.skip("needs torch-abi-audit")
    program = "import sys; from torch_abi_audit.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "--check", "torch", library]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_check_of_wheels_finds_tag_missing_and_foreign_files(tmp_path):
    import zipfile

    names = [str(path.relative_to(ROOT)) for path in (ROOT / "resnet_fused").rglob("*.py")]
    names += [str(path.relative_to(ROOT)) for path in LIBRARIES]
    good = tmp_path / "resnet_fused-0.1.0-cp310-abi3-linux_x86_64.whl"
    with zipfile.ZipFile(good, "w") as archive:
        for name in [*names, "resnet_fused-0.1.0.dist-info/RECORD"]:
            archive.writestr(name, "")
    assert check_wheel.faults(good) == []

    bad = tmp_path / "resnet_fused-0.1.0-cp311-cp311-linux_x86_64.whl"
    with zipfile.ZipFile(bad, "w") as archive:
        for name in [n for n in names if not n.endswith("functional.py")] + ["tests/test_cli.py"]:
            archive.writestr(name, "")
    assert check_wheel.faults(bad) == [
        "its tag is cp311-cp311, not cp310-abi3",
        "it lacks resnet_fused/functional.py",
        "it carries tests/test_cli.py",
    ]


def test_every_package_is_named_in_pyproject():
    requirements = tool("requirements")
    project = requirements.tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "resnet_fused").rglob("*.py")}
    assert set(project["tool"]["setuptools"]["packages"]) == packages


def test_private_names_of_torch_stand_in_one_file():
    private = re.compile(
        r"torch\._C\b|from torch\._(?!dynamo|subclasses|library)[\w.]+ import|torch\.utils\._(?!pytree)"
    )
    files = (ROOT / "resnet_fused").rglob("*.py")
    found = {file.name for file in files if private.search(file.read_text(encoding="utf-8"))}
    assert found == {"torch_private.py"}


def test_a_circle_of_imports_is_found_inside_functions_too(tmp_path):
    check_imports = tool("check_imports")
    sources = {
        "a": "from . import b",
        "b": "def f():\n    from .c import g",
        "c": "from .a import x",
        "d": "from . import a",
    }
    for name, source in sources.items():
        (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
    graph = {file: set(check_imports.imports(file)) for file in tmp_path.glob("*.py")}
    assert [[file.stem for file in circle] for circle in check_imports.circles(graph)] == [["a", "b", "c"]]
    (tmp_path / "c.py").write_text("from .d import x", encoding="utf-8")
    graph[tmp_path / "c.py"] = set()
    assert not check_imports.circles(graph)
