"""What only a GPU can show: streams, graphs, several devices, and tensors of more than 2^31 elements."""

import oracle
import pytest
import torch

import resnet_fused
from resnet_fused import functional
from resnet_fused.ops import backend

CUDA = torch.device("cuda")
WHY_NOT = backend.why_not_compiled(CUDA)
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"needs a GPU: {WHY_NOT}")


def _assert_equal(results, expected):
    for name, value in results.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("form", oracle.FORMS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_graph_gives_the_bits_of_eager(training, form, layout):
    """Captured: no launch waits for the host, and memory is torch's."""
    case = oracle.owned(oracle.make_case((4, 64, 28, 28), torch.bfloat16, CUDA, form, training, layout))
    expected = oracle.fused(case)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        oracle.fused(case)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = oracle.fused(case)
    for name, value in captured.items():
        if not name.startswith("running"):
            value.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    for name, value in captured.items():
        if not name.startswith("running"):
            assert torch.equal(value, expected[name]), name


def test_the_current_stream_is_used():
    """Work on another stream is neither waited for nor overtaken."""
    case = oracle.make_case((8, 64, 56, 56), torch.float32, CUDA, "bn_add_relu")
    expected = oracle.fused(case)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        delayed = oracle.like(case, lambda tensor: torch.full_like(tensor, float("nan")))
        torch.cuda._sleep(50_000_000)
        for mine, its in zip(delayed.branches, case.branches, strict=True):
            for name in ("input", "weight", "bias", "running_mean", "running_var"):
                getattr(mine, name).copy_(getattr(its, name))
        delayed.residual.copy_(case.residual)
        delayed.grad_output.copy_(case.grad_output)
        results = oracle.fused(delayed)
    side.synchronize()
    _assert_equal(results, expected)


@pytest.mark.skipif("torch.cuda.device_count() < 2", reason="needs two GPUs")
def test_a_tensor_s_device_need_not_be_the_current_one():
    case = oracle.make_case((4, 16, 14, 14), torch.float32, torch.device("cuda", 1), "dual_relu")
    assert torch.cuda.current_device() == 0
    oracle.check(case)
    assert torch.cuda.current_device() == 0
    with pytest.raises(RuntimeError, match="device"):
        functional.batch_norm_add_relu(case.branches[0].input, None, None, weight=torch.ones(16, device="cuda:0"))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_more_than_two_to_the_31_elements(layout):
    """The end of the tensor has what a small tensor of the same values has, and statistics are those of all of it."""
    free, _ = torch.cuda.mem_get_info()
    shape = (3, 64, 3400, 3400)
    size = 2 * torch.Size(shape).numel()
    if free < 6 * size:
        pytest.skip(f"needs {6 * size >> 30} GiB of free GPU memory")
    assert torch.Size(shape).numel() > 2**31
    x = torch.empty(shape, dtype=torch.bfloat16, device=CUDA).to(memory_format=layout)
    x.copy_(torch.randn(1, 64, 1, 3400, device=CUDA))
    residual = torch.ones_like(x)
    mean, var = torch.randn(64, device=CUDA), torch.rand(64, device=CUDA) + 0.5
    small = functional.batch_norm_add_relu(x[-1:, :, -1:], mean, var, residual=residual[-1:, :, -1:])
    output = functional.batch_norm_add_relu(x, mean, var, residual=residual)
    assert torch.equal(output[-1:, :, -1:], small)
    assert torch.equal(output[:1, :, :1], small)
    del output
    x.requires_grad_()
    output = functional.batch_norm_add_relu(x, None, None, residual=residual, training=True)
    output.backward(residual)
    assert torch.equal(output[-1, :, -1], output[0, :, 0])
    assert torch.equal(x.grad[-1, :, -1], x.grad[0, :, 0])


@pytest.mark.parametrize("dtype", oracle.HALVES, ids=oracle.dtype_name)
def test_autocast(dtype):
    block = resnet_fused.FusedBottleneck(64, 16).cuda().to(memory_format=torch.channels_last)
    x = torch.randn(2, 64, 8, 8, device=CUDA).to(memory_format=torch.channels_last)
    with torch.autocast("cuda", dtype=dtype):
        assert block(x).dtype == dtype
