"""The report for machines with a GPU, as far as it can be had without one."""

import importlib
import pathlib
import subprocess
import sys

import pytest
import torch

TOOLS = pathlib.Path(__file__).resolve().parent.parent / "tools"
if not TOOLS.is_dir():
    pytest.skip("needs the checkout", allow_module_level=True)
sys.path.insert(0, str(TOOLS))
gpu_check = importlib.import_module("gpu_check")


@pytest.mark.skipif("__import__('torch').cuda.is_available()", reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_fails(tmp_path):
    command = [sys.executable, str(TOOLS / "gpu_check.py"), "--report", str(tmp_path / "report.md")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "torch finds no GPU" in done.stderr or torch.version.cuda is None
    assert not (tmp_path / "report.md").exists()


def test_what_failed_is_told(tmp_path):
    report = gpu_check.Report(tmp_path / "report.md")
    report.add("Tests", "all passed")
    assert not report.failed
    report.add("Benchmarks", "one failed", True)
    assert report.failed
    text = report.path.read_text()
    assert "## Tests\n" in text
    assert "## Benchmarks: FAILED\n" in text


def test_the_table_has_the_gpu_s_own_times():
    result = {
        "group": "bn",
        "params": {"variant": "fused"},
        "extra_info": {"GPU seconds": [1e-3, 2e-3, 3e-3], "bytes per call": 4_000_000},
    }
    hosts = {"group": "bn", "params": {"variant": "eager"}, "extra_info": {}}
    table = gpu_check.table({"benchmarks": [result, hosts]}, 4e9)
    assert table.splitlines()[2:] == ["| bn | fused | 2.0000 | 2 | 0.50 |"]
