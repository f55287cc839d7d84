"""cuDNN's own BatchNorm, add and ReLU, where nvidia-cudnn-frontend is installed: 16 bits, channels_last, training.

One graph forward (batch norm, add, ReLU, and the ReLU's mask, a byte an element), one backward (the gradient times the
mask, which is the residual's, and the gradient of batch norm). cuDNN's heuristics for a GPU of compute capability 9.0
have an engine for both.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor


def suits(kind: str, dtype: torch.dtype, layout: str, training: bool) -> bool:
    """Whether cuDNN has a case."""
    return dtype in (torch.bfloat16, torch.float16) and layout == "channels_last" and kind != "dual" and training


class Graph:
    """A graph of cuDNN's and its tensors by name."""

    def __init__(self, dtype: torch.dtype, handle: int | None = None):
        import cudnn

        types = cudnn.data_type
        self.cudnn, self.handle, self.workspace = cudnn, handle, None
        self.types = {torch.bfloat16: types.BFLOAT16, torch.float16: types.HALF, torch.float32: types.FLOAT}
        self.types[torch.bool] = types.BOOLEAN
        given = {} if handle is None else {"handle": handle}
        self.graph = cudnn.pygraph(
            io_data_type=self.types[dtype], intermediate_data_type=types.FLOAT, compute_data_type=types.FLOAT, **given
        )
        self.tensors: dict[str, object] = {}

    def input(self, name: str, like: Tensor, by_value: bool = False):
        """An input with the shape, strides and dtype of ``like``."""
        self.tensors[name] = self.graph.tensor(
            name=name,
            dim=list(like.shape),
            stride=list(like.stride()),
            data_type=self.types[like.dtype],
            is_pass_by_value=by_value,
        )
        return self.tensors[name]

    def output(self, name: str, tensor, dtype: torch.dtype) -> None:
        """A tensor that the graph writes."""
        tensor.set_output(True).set_data_type(self.types[dtype])
        self.tensors[name] = tensor

    def build(self, device: torch.device) -> "Graph":
        """Has cuDNN choose an engine; raises its error where it has none."""
        self.graph.validate()
        self.graph.build_operation_graph()
        self.graph.create_execution_plans([self.cudnn.heur_mode.A, self.cudnn.heur_mode.FALLBACK])
        self.graph.check_support()
        self.graph.build_plans()
        self.workspace = torch.empty(self.graph.get_workspace_size(), dtype=torch.uint8, device=device)
        return self

    def run(self, **tensors: Tensor) -> None:
        """Runs on torch's current stream."""
        self.cudnn.set_stream(handle=self.handle, stream=torch.cuda.current_stream().cuda_stream)
        pack = {self.tensors[name]: tensor for name, tensor in tensors.items()}
        self.graph.execute(pack, self.workspace, handle=self.handle)


def forward_graph(x: Tensor, residual: Tensor | None, vector: Tensor, number: Tensor, handle: int | None) -> Graph:
    """relu(batch_norm(x) + residual); ``vector`` is (1, C, 1, 1) float32, ``number`` a float32 on the CPU."""
    made = Graph(x.dtype, handle)
    statistics = [made.input(name, vector) for name in ("weight", "bias", "running_mean", "running_var")]
    output, mean, invstd, new_mean, new_var = made.graph.batchnorm(
        name="batch_norm",
        input=made.input("x", x),
        scale=statistics[0],
        bias=statistics[1],
        in_running_mean=statistics[2],
        in_running_var=statistics[3],
        epsilon=made.input("eps", number, by_value=True),
        momentum=made.input("momentum", number, by_value=True),
    )
    if residual is not None:
        output = made.graph.add(name="add", a=output, b=made.input("residual", residual))
    output = made.graph.relu(name="relu", input=output)
    mask = made.graph.cmp_gt(name="mask", input=output, comparison=made.input("zero", number.to(x.dtype)))
    made.output("output", output, x.dtype)
    made.output("mask", mask, torch.bool)
    for name, tensor in (("mean", mean), ("invstd", invstd), ("new_mean", new_mean), ("new_var", new_var)):
        made.output(name, tensor, torch.float32)
    return made


def backward_graph(x: Tensor, has_residual: bool, vector: Tensor, handle: int | None) -> Graph:
    """The gradients of x, weight and bias, and of a residual."""
    made = Graph(x.dtype, handle)
    passed = made.graph.scale(
        name="relu", input=made.input("grad_output", x), scale=made.input("mask", torch.empty_like(x, dtype=torch.bool))
    )
    passed.set_data_type(made.types[x.dtype])
    if has_residual:
        made.output("grad_residual", passed, x.dtype)
    weight, mean, invstd = (made.input(name, vector) for name in ("weight", "mean", "invstd"))
    gradients = made.graph.batchnorm_backward(
        name="batch_norm", grad=passed, input=made.input("x", x), scale=weight, mean=mean, inv_variance=invstd
    )
    for name, tensor, dtype in zip(
        ("grad_x", "grad_weight", "grad_bias"), gradients, (x.dtype, torch.float32, torch.float32), strict=True
    ):
        made.output(name, tensor, dtype)
    return made


@functools.cache
def _handle() -> int:
    import cudnn

    return cudnn.create_handle()


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: "_Call", x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
        output, mask = torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)
        mean, invstd = torch.empty_like(call.running_mean), torch.empty_like(call.running_mean)
        given = {} if residual is None else {"residual": residual}
        call.forward.run(
            x=x,
            weight=weight.view_as(mean),
            bias=bias.view_as(mean),
            running_mean=call.running_mean,
            running_var=call.running_var,
            new_mean=call.running_mean,
            new_var=call.running_var,
            eps=call.eps,
            momentum=call.momentum,
            zero=call.zero,
            output=output,
            mask=mask,
            mean=mean,
            invstd=invstd,
            **given,
        )
        ctx.call, ctx.has_residual = call, residual is not None
        ctx.save_for_backward(x, weight, mean, invstd, mask)
        return output

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, invstd, mask = ctx.saved_tensors
        gradients = {
            "grad_x": torch.empty_like(x),
            "grad_weight": torch.empty_like(mean),
            "grad_bias": torch.empty_like(mean),
        }
        if ctx.has_residual:
            gradients["grad_residual"] = torch.empty_like(x)
        ctx.call.backward.run(
            grad_output=grad_output, x=x, weight=weight.view_as(mean), mean=mean, invstd=invstd, mask=mask, **gradients
        )
        grad_weight, grad_bias = gradients["grad_weight"].flatten(), gradients["grad_bias"].flatten()
        return None, gradients["grad_x"], grad_weight, grad_bias, gradients.get("grad_residual")


class _Call:
    """The graphs of a case, and what does not change from call to call."""

    def __init__(self, main: tuple[Tensor, ...], residual: Tensor | None, momentum: float, eps: float):
        x, running_mean, running_var, *_ = main
        self.running_mean, self.running_var = (v.view(1, -1, 1, 1) for v in (running_mean, running_var))
        self.eps, self.momentum = torch.full((1, 1, 1, 1), eps), torch.full((1, 1, 1, 1), momentum)
        self.zero = torch.zeros(1, 1, 1, 1, dtype=x.dtype, device=x.device)
        self.forward = forward_graph(x, residual, self.running_mean, self.eps, _handle()).build(x.device)
        self.backward = backward_graph(x, residual is not None, self.running_mean, _handle()).build(x.device)


def forward(main: tuple[Tensor, ...], residual: Tensor | None, momentum: float, eps: float) -> Callable[[], Tensor]:
    """The forward on an operator's own tensors, with a gradient."""
    call = _Call(main, residual, momentum, eps)
    x, _, _, weight, bias = main
    return lambda: _Function.apply(call, x, weight, bias, residual)
