"""``python -m resnet_fused``: exit codes and what a person reads."""

import dataclasses
import io
import json
import subprocess
import sys

import pytest
import torch
from torch import nn

import resnet_fused
from resnet_fused import __main__ as cli
from resnet_fused import measure, tables
from resnet_fused.cli import doctor, model_names


def run(capsys, *arguments):
    """Exit code, standard output and standard error of a command."""
    try:
        code = cli.main(list(arguments))
    except SystemExit as error:  # argparse
        code = error.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_module_runs_as_a_program():
    result = subprocess.run(
        [sys.executable, "-m", "resnet_fused", "--version"], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == f"resnet_fused {resnet_fused.__version__}"


def test_without_a_command_usage_is_shown(capsys):
    code, _, err = run(capsys)
    assert code == 2
    assert "usage: python -m resnet_fused" in err


def test_doctor_names_versions_libraries_and_backends(capsys):
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    for text in (
        torch.__version__,
        resnet_fused.__version__,
        "_ops.abi3.so",
        "_cpu.abi3.so",
        "Fused kernels serve the CPU",
    ):
        assert text in out


def test_doctor_json(capsys):
    code, out, _ = run(capsys, "doctor", "--json")
    findings = json.loads(out)
    cpu = findings["devices"][0]
    assert code == 0
    assert (cpu["device"], cpu["backend"], cpu["fused"]) == ("cpu", "compiled", True)
    loaded = {library["name"]: library["loaded"] for library in findings["libraries"]}
    assert loaded["_ops"]
    assert loaded["_cpu"]
    assert loaded["_cuda"] == bool(findings["cuda_architectures"])
    assert all(library["loaded"] or library["reason"] for library in findings["libraries"])


def test_doctor_tells_when_the_reference_serves(capsys):
    with resnet_fused.backend("reference"):
        code, out, _ = run(capsys, "doctor")
    assert code == 1
    assert "asks for the unfused torch operations" in out
    assert "do not serve the CPU" in out


def test_doctor_does_not_take_the_backend_s_word_where_kernels_are_missing(monkeypatch):
    monkeypatch.setattr(doctor, "missing_kernels", lambda device: ["add_relu"])
    served_by, reason = doctor.serves(torch.device("cpu"))
    assert served_by == "reference"
    assert "add_relu" in reason


def test_doctor_knows_that_meta_tensors_have_no_kernels():
    assert set(doctor.missing_kernels(torch.device("meta"))) == set(resnet_fused.ops.OPERATORS)


def test_report_lists_every_batch_norm(capsys):
    torchvision = pytest.importorskip("torchvision")
    code, out, _ = run(capsys, "report", "resnet18")
    names = [n for n, m in torchvision.models.resnet18().named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert code == 0
    assert [name for name in names if name not in out] == []
    assert f"{len(names)} of {len(names)}" in out


def test_report_takes_a_callable_of_any_module(capsys, tmp_path, monkeypatch):
    (tmp_path / "my_model.py").write_text(
        "from torch import nn\nclass Zoo:\n    build = staticmethod(lambda: nn.Sequential(nn.BatchNorm2d(3)))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    code, out, _ = run(capsys, "report", "my_model:Zoo.build")
    assert code == 0
    assert "BatchNorm2d" in out


def test_report_leaves_a_model_that_its_callable_shares(capsys, tmp_path, monkeypatch):
    (tmp_path / "shared_model.py").write_text(
        "from torchvision.models import resnet18\nMODEL = resnet18()\nBEFORE = repr(MODEL)\nbuild = lambda: MODEL\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert run(capsys, "report", "shared_model:build")[0] == 0
    module = sys.modules["shared_model"]
    assert repr(module.MODEL) == module.BEFORE


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("resnett50", "did you mean resnet50"),
        ("???", "give module:callable"),
        ("torchvision:resnett50", "did you mean resnet50"),
        ("no_such_module:build", "module 'no_such_module' cannot be imported"),
        ("torch.nn:Nothing", "module 'torch.nn' has no 'Nothing'"),
        ("torch.nn:", "module 'torch.nn' has no ''"),
        ("math:pi", "is a float, which cannot be called"),
        ("platform:node", "returned str, which is no torch.nn.Module"),
        ("torch.nn:Linear", "torch.nn:Linear could not be built: TypeError"),
    ],
)
def test_report_refuses_in_one_sentence(capsys, name, sentence):
    code, out, err = run(capsys, "report", name)
    assert code == 2
    assert out == ""
    assert sentence in err
    assert err.count("\n") == 1


PREFIXED = [
    ("torchvision", "torchvision:resnet18", "layer1.0.bn1"),
    ("timm", "timm:resnet10t", "layer1.0.bn1"),
    ("transformers", "transformers:ResNetBackbone", "encoder.stages.0.layers.0.layer.0.normalization"),
    ("segmentation_models_pytorch", "smp:Unet/resnet18", "decoder.blocks.0.conv1.1"),
    ("segmentation_models_pytorch", "smp:FPN", "encoder.layer1.0.bn1"),
    ("monai", "monai:resnet10", "layer1.0.bn1"),
    ("monai", "monai:SEResNet50", "layer1.0.conv1.adn.N"),
    ("monai", "monai:UNet", None),
]


@pytest.mark.parametrize(("module", "name", "batch_norm"), PREFIXED, ids=[name for _, name, _ in PREFIXED])
def test_report_takes_models_of_other_packages(capsys, module, name, batch_norm):
    pytest.importorskip(module)
    code, out, err = run(capsys, "report", name, "--json")
    assert (code, err) == (0, "")
    names = [row["name"] for row in json.loads(out)["rows"]]
    assert names == [] if batch_norm is None else batch_norm in names


@pytest.mark.parametrize(
    ("module", "name", "sentence"),
    [
        ("timm", "timm:resnet50dd", "did you mean resnet50d"),
        ("timm", "timm:???", "timm has no model called '???'; timm.list_models() has them all"),
        ("transformers", "transformers:ResNetModl", "did you mean ResNetModel"),
        ("transformers", "transformers:AutoTokenizer", "has no model called 'AutoTokenizer'"),
        ("segmentation_models_pytorch", "smp:Une/resnet34", "did you mean Unet?"),
        ("segmentation_models_pytorch", "smp:Unet/resnt34", "no encoder called 'resnt34'; did you mean resnet34"),
        ("segmentation_models_pytorch", "smp:Unet/tu-nothing", "smp:Unet/tu-nothing could not be built"),
        ("monai", "monai:resnt18", "did you mean resnet18"),
        ("monai", "monai:ResNet", "monai:ResNet could not be built: TypeError"),
    ],
)
def test_report_refuses_unknown_models_of_other_packages(capsys, module, name, sentence):
    pytest.importorskip(module)
    code, out, err = run(capsys, "report", name)
    assert (code, out) == (2, "")
    assert sentence in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("prefix", model_names.PACKAGES)
def test_report_names_what_to_install(capsys, monkeypatch, prefix):
    package = dataclasses.replace(model_names.PACKAGES[prefix], module="no_such_package")
    monkeypatch.setitem(model_names.PACKAGES, prefix, package)
    code, out, err = run(capsys, "report", f"{prefix}:resnet18")
    assert (code, out) == (2, "")
    assert f"pip install {package.pip}\n" in err


def test_report_help_has_an_example_of_each_package(capsys):
    code, out, _ = run(capsys, "report", "--help")
    assert code == 0
    # argparse may break a line at any space, and at hyphens.
    words = out.split()
    assert [p.example for p in model_names.PACKAGES.values() if f"{p.example}," not in words] == []


SOME_FUSED = """
from torch import nn
from torchvision.models.resnet import BasicBlock
build = lambda: nn.Sequential(BasicBlock(4, 4), nn.BatchNorm2d(4), nn.Sigmoid(), nn.BatchNorm2d(4), nn.Sigmoid())
"""


def test_report_why_counts_the_batch_norms_of_each_reason(capsys, tmp_path, monkeypatch):
    pytest.importorskip("torchvision")
    (tmp_path / "some_fused.py").write_text(SOME_FUSED)
    monkeypatch.syspath_prepend(tmp_path)
    found = json.loads(run(capsys, "report", "some_fused:build", "--json")[1])
    code, out, _ = run(capsys, "report", "some_fused:build", "--why")
    lines = out.splitlines()
    counts = [int(line.split()[0]) for line in lines if line[:1].isdigit() and "BatchNorms" not in line]
    assert code == 0
    assert 0 < found["fused"] < found["total"]
    assert sum(counts) == found["total"] - found["fused"]
    assert lines[-1].startswith(f"{found['fused']} of {found['total']} BatchNorms fused")


def test_report_why_of_a_fused_model_is_its_summary(capsys):
    pytest.importorskip("torchvision")
    code, out, _ = run(capsys, "report", "resnet18", "--why")
    assert (code, out) == (
        0,
        "20 of 20 BatchNorms fused, 100.0% of the normalized elements with an add or a ReLU\n",
    )


@pytest.mark.usefixtures("one_thread")
def test_demo_trains_both_networks_and_writes_the_plot(capsys, tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    output = tmp_path / "plots" / "demo.png"
    code, out, _ = run(capsys, "demo", "--epochs", "1", "--images", "40", "--batch-size", "16", "--output", str(output))
    assert code == 0
    for text in (
        "test accuracy",
        "time per step, median",
        "saved activations per image",
        str(output),
        "runs fused kernels",
    ):
        assert text in out
    assert output.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--epochs", "0"), "at least 1, got '0'"),
        (("--images", "40", "--batch-size", "33"), "--batch-size must be at most 32"),
        (("--model", "resnett18"), "did you mean resnet18"),
    ],
)
def test_demo_refuses_in_one_sentence(capsys, arguments, sentence):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    code, _, err = run(capsys, "demo", *arguments)
    assert code == 2
    assert sentence in err


def test_saved_activations_count_each_storage_once_and_no_parameter():
    linear = nn.Linear(4, 8)
    x = torch.randn(2, 4)
    with measure.SavedActivations(linear) as saved:
        hidden = linear(x)  # keeps x and the weight
        output = hidden[:1] * hidden[1:]  # keeps two views of hidden
    assert saved.bytes == (x.numel() + hidden.numel()) * 4
    output.sum().backward()
    assert linear.weight.grad is not None


def test_saved_activations_count_the_bits_of_the_mask():
    n, c, h, w = 2, 16, 4, 4
    bn = resnet_fused.BatchNormAddReLU2d(c)
    x, residual = (torch.randn(n, c, h, w, requires_grad=True) for _ in range(2))
    with measure.SavedActivations(bn) as saved:
        bn(x, residual)
    statistics = 2 * c * 4
    assert saved.bytes == x.numel() * 4 + statistics + x.numel() // 8


def test_alternatives_are_called_in_turn():
    calls = []
    samples = measure.in_turn([lambda: calls.append("a"), lambda: calls.append("b")], rounds=3, calls=2)
    assert [len(times) for times in samples] == [3, 3]
    # Warm-up: each once and then for as many calls as are timed; then the rounds.
    assert "".join(calls) == "ab" + "aabb" + 3 * "aabb"


# Tables --------------------------------------------------------------------------------------------------------------

ROWS = [
    ("layer1.0.downsample.1", "batch_norm+batch_norm+add+relu", 3.5, None),
    ("bn1", "its output goes to an add into another tensor", 12, "/a/path/of/some/length/resnet_fused/_cpu.abi3.so"),
]
HEADERS = ("BatchNorm", "why", "MB", "where it is on the disk")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_table_is_whole_where_nobody_sees_it_on_a_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    assert tables.table(ROWS, HEADERS, right=(2,)).splitlines() == [
        f"BatchNorm              {'why':45}   MB  where it is on the disk",
        f"{'-' * 21}  {'-' * 45}  ---  {'-' * len(ROWS[1][3])}",
        f"layer1.0.downsample.1  {'batch_norm+batch_norm+add+relu':45}  3.5",
        f"bn1                    its output goes to an add into another tensor   12  {ROWS[1][3]}",
    ]
    assert tables.table([("a", 1)]).splitlines() == ["-  -", "a  1", "-  -"]


@pytest.mark.parametrize("columns", [40, 64, 80, 100, 120, 200])
def test_a_table_fits_the_terminal_and_loses_nothing(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys, "stdout", Terminal())
    lines = tables.table(ROWS, HEADERS).splitlines()
    assert max(map(len, lines)) <= columns
    rule = next(i for i, line in enumerate(lines) if line.startswith("--"))
    ends = [len(part) for part in lines[rule].split("  ")]
    starts = [sum(ends[:i]) + 2 * i for i in range(len(ends))]
    for i, header in enumerate(HEADERS):
        cells = [line[starts[i] : starts[i] + ends[i]] for line in lines]
        assert "".join(cells[:rule]).replace(" ", "") == header.replace(" ", "")
        whole = "".join(str(row[i]) for row in ROWS if row[i] is not None)
        assert "".join(cells[rule + 1 :]).replace(" ", "") == whole.replace(" ", "")
    if columns == 80:
        assert any("batch_norm+ " in line for line in lines)  # broken where one reads on
    if columns == 200:
        assert len(lines) == 4


def test_the_tables_of_the_commands_fit(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "stdout", Terminal())
    doctors = doctor.render(doctor.examine())
    report = str(resnet_fused.fusion_report(nn.Sequential(nn.BatchNorm2d(3))))
    for text in (doctors, report):
        assert "---" in text
        assert max(len(line) for line in text.splitlines() if "  " in line) <= 80
