"""What tools/static_checks.py makes of machine code, and the table that it wrote."""

import dataclasses
import importlib
import pathlib
import re
import struct
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
if not (ROOT / "tools").is_dir():
    pytest.skip("needs the checkout", allow_module_level=True)
sys.path.insert(0, str(ROOT / "tools"))
static = importlib.import_module("static_checks")

GOOD = static.Kernel("forward_kernel<float, 4, true>", "9.0", 64, 0, 0, 1024, 256, 16, 16, 32)


def _faults(**changes):
    return [fault.partition(": ")[2] for fault in dataclasses.replace(GOOD, **changes).faults()]


def test_a_good_kernel_has_no_fault():
    assert _faults() == []


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"spills": 3}, "3 instructions go to local memory"),
        ({"stack": 8}, "has 8 bytes of stack"),
        ({"shared": 20480}, "has 20480 bytes of shared memory, more than kOwnShared of csrc/cuda/device.h"),
        ({"registers": 72, "under_way": 48}, "72 registers leave an SM 768 threads, fewer than 1024"),
        ({"load": 8}, "reads no more than 8 bytes at once"),
        ({"store": 4}, "writes no more than 4 bytes at once"),
        ({"under_way": 16}, "has 16 bytes of loads under way a thread, of 1024 threads"),
    ],
)
def test_faults(changes, fault):
    assert _faults(**changes) == [fault]


def test_fewer_threads_may_have_more_loads_under_way():
    assert _faults(registers=72, under_way=64) == []


def test_own_shared_memory_is_what_launches_count_with():
    (kibibytes,) = re.findall(r"kOwnShared = (\d+) \* 1024;", (ROOT / "csrc" / "cuda" / "device.h").read_text())
    assert int(kibibytes) << 10 == static.OWN_SHARED


def test_a_kernel_that_reduces_stores_no_tensor():
    assert _faults(name="statistics_kernel<float, 4>", store=4) == []


def test_a_kernel_for_other_tensors_need_not_be_wide():
    assert _faults(name="forward_kernel<float, 1, true>", load=4, store=4) == []


@pytest.mark.parametrize(
    ("name", "access"),
    [
        ("kernel<float, 4, true>", 16),
        ("kernel<double, 2, (Second)1>", 16),
        ("kernel<__nv_bfloat16, 8>", 16),
        ("kernel<__half, 4, false>", 8),
        ("kernel<__half, (int)8, false>", 16),
        ("update_kernel", None),
    ],
)
def test_what_a_kernel_means_to_access(name, access):
    assert dataclasses.replace(GOOD, name=name).access == access


@pytest.mark.parametrize(
    ("architecture", "registers", "block", "shared", "threads"),
    [
        ("9.0", 32, 256, 0, 2048),
        ("9.0", 64, 256, 0, 1024),
        ("9.0", 65, 256, 0, 768),
        ("12.0", 80, 256, 0, 768),
        ("12.0", 32, 256, 0, 1536),
        ("9.0", 32, 32, 0, 1024),  # 32 blocks an SM
        ("8.0", 32, 1024, 0, 2048),
        ("8.0", 33, 1024, 0, 1024),
        ("8.0", 32, 256, 40 << 10, 1024),
    ],
)
def test_threads_of_an_sm(architecture, registers, block, shared, threads):
    kernel = dataclasses.replace(GOOD, architecture=architecture, registers=registers, block=block, shared=shared)
    assert kernel.threads == threads


def test_an_architecture_that_is_missing_is_a_fault():
    assert static.faults([GOOD]) == [f"the library has no code for {a}" for a in ("8.0", "10.0", "12.0")]


USAGE = """
Fatbin elf code:
================
arch = sm_90

Resource usage:
 Common:
  GLOBAL:28 CONSTANT[4]:224
 Function _Z4copyPf:
  REG:18 STACK:8 SHARED:1040 LOCAL:0 CONSTANT[0]:376 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def test_resource_usage():
    assert static.resource_usage(USAGE) == {"_Z4copyPf": {"REG": 18, "STACK": 8, "SHARED": 1040, "LOCAL": 0}}


SASS = """
\t\tFunction : _Z4copyPf
\t.headerflags\t@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                     /* 0x00000a00ff017b82 */
                                                                              /* 0x000fe20000000800 */
        /*0010*/                   LDG.E.U16.CONSTANT R2, desc[UR4][R2.64] ;  /* 0x0 */
        /*0020*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;           /* 0x0 */
        /*0030*/                   STG.E.64 desc[UR4][R8.64], R4 ;            /* 0x0 */
        /*0040*/                   STL [R1], R2 ;                             /* 0x0 */
        /*0050*/                   LDL.64 R2, [R1] ;                          /* 0x0 */
        /*0060*/                   LDS.128 R2, [R1] ;                         /* 0x0 */
\t\tFunction : _Z5otherPf
        /*0010*/                   STG.E.U8 desc[UR4][R8.64], R4 ;            /* 0x0 */
"""


def test_widest_accesses():
    assert dict(static.widest_accesses(SASS)) == {"_Z4copyPf": (16, 8, 2), "_Z5otherPf": (0, 1, 0)}


LOOP = """
\t\tFunction : _Z4loopPf
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;            /* 0x0 */
        /*0010*/                   LDG.E.128 R8, desc[UR4][R2.64] ;            /* 0x0 */
        /*0020*/              @!P0 LDG.E.128.CONSTANT R12, desc[UR4][R2.64] ;  /* 0x0 */
        /*0030*/                   LDG.E.U8 R16, desc[UR4][R2.64] ;            /* 0x0 */
        /*0040*/                   FADD R20, R6, R21 ;                         /* 0x0 */
        /*0050*/                   LDG.E.64 R4, desc[UR4][R2.64] ;             /* 0x0 */
        /*0060*/                   STG.E.64 desc[UR4][R8.64], R4 ;             /* 0x0 */
        /*0070*/               @P1 BRA 0x10 ;                                  /* 0x0 */
        /*0080*/                   LDG.E.128 R4, desc[UR4][R2.64] ;            /* 0x0 */
\t\tFunction : _Z5otherPf
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;            /* 0x0 */
"""


def test_loads_under_way():
    """In the loop two wide ones, a byte and a narrower one; the store waits for the last, and R6 was there before."""
    assert static.loads_under_way(LOOP) == {"_Z4loopPf": 16 + 16 + 1 + 8, "_Z5otherPf": 0}


def test_launch_bounds():
    """An ELF of three sections: none, names, and one kernel's attributes."""
    names = b"\0.shstrtab\0.nv.info.kernel\0"
    info = struct.pack("<BBH", 4, 0x2F, 8) + b"\0" * 8 + struct.pack("<BBHIII", 4, 5, 12, 256, 2, 1)
    info += struct.pack("<BBH", 3, 0x1B, 255)
    header = bytearray(64)
    struct.pack_into("<Q", header, 0x28, 64 + len(names) + len(info))
    struct.pack_into("<HHH", header, 0x3A, 64, 3, 1)
    sections = [bytes(64)]
    for name, at, size in ((1, 64, len(names)), (11, 64 + len(names), len(info))):
        sections.append(struct.pack("<IIQQQQIIQQ", name, 1, 0, 0, at, size, 0, 0, 0, 0))
    assert static.launch_bounds(bytes(header) + names + info + b"".join(sections)) == {"kernel": 512}


def test_names_are_short():
    space = "resnet_fused::cuda::(anonymous namespace)"
    name = f"void {space}::f_kernel<__half, 8, true, ({space}::S)1>(resnet_fused::A, int)"
    assert static._short(name) == "f_kernel<__half, 8, true, (S)1>"


def test_the_document_has_a_table():
    text = static.TABLE.read_text(encoding="utf-8")
    assert text.count(static.BEGIN) == text.count(static.END) == 1
    assert static.with_table(static.with_table(text, "x"), "y") == static.with_table(text, "y")
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    for architecture in static.ARCHITECTURES:
        assert any(f"| {architecture} |" in row for row in rows), architecture


def test_the_table_names_the_kernels_of_the_sources():
    """Cheap, where a look at the library is not: a kernel that came or went shows; `make static` writes the rest."""
    sources = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu*")))
    defined = set(re.findall(r"__global__[^;{]*?\b(\w+_kernel)\s*\(", sources))
    rows = re.findall(r"^\| `(\w+)` \|", static.TABLE.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(rows) == defined
