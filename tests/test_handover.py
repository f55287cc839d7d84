"""A residual's gradient that goes to the node that made the residual and not through autograd's addition.

Nothing of it may be seen but that the addition is gone: values, bits, and the whole gradient for whoever looks at it.
"""

import gc
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import resnet_fused
from resnet_fused import FusedBottleneck, FusedResidualBlock, functional
from resnet_fused.ops import handover


@pytest.fixture(autouse=True)
def _enabled(monkeypatch):
    """As with RESNET_FUSED_HANDOVER=1."""
    monkeypatch.setattr(handover, "ENABLED", True)


@pytest.fixture
def handed(monkeypatch):
    """How many gradients were handed over so far."""
    counted = []
    give = handover.give

    def counting(*arguments):
        given = give(*arguments)
        counted.append(given)
        return given

    monkeypatch.setattr(handover, "give", counting)
    return lambda: sum(counted)


@pytest.fixture
def off(monkeypatch):
    """Switches it off."""
    return lambda: monkeypatch.setattr(handover, "give", lambda *_: False)


def test_it_is_off_unless_asked_for(monkeypatch, handed):
    monkeypatch.setattr(handover, "ENABLED", False)
    model = nn.Sequential(FusedResidualBlock(4, 4), FusedResidualBlock(4, 4))
    model(torch.randn(2, 4, 6, 6)).sum().backward()
    assert handed() == 0
    monkeypatch.setattr(handover, "ENABLED", True)
    model(torch.randn(2, 4, 6, 6)).sum().backward()
    assert handed() == 1


class Operand:
    """Parameters of one operator of C channels, made the same each time."""

    def __init__(self, seed, dtype=torch.float32, channels=6):
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.rand(channels, generator=generator).add(0.5).to(dtype).requires_grad_()
        self.bias = torch.randn(channels, generator=generator).to(dtype).requires_grad_()

    def __call__(self, input, residual=None, relu=True, training=True):
        running = (None, None) if training else (torch.zeros_like(self.weight), torch.ones_like(self.weight))
        return functional.batch_norm_add_relu(
            input, *[None if r is None else r.detach() for r in running], self.weight, self.bias, residual, training,
            relu=relu,
        )  # fmt: skip


class Chain:
    """first(x) -> y, which the next operator uses through a convolution of its own, and as its residual."""

    def __init__(self, device, dtype=torch.float32, first="add", relu=True, training=True, channels_last=False):
        self.kind, self.relu, self.training = first, relu, training
        self.operators = [Operand(seed, dtype) for seed in range(3)]
        generator = torch.Generator().manual_seed(7)

        def full():
            value = torch.randn(2, 6, 5, 4, generator=generator).to(device, dtype)
            return value.to(memory_format=torch.channels_last) if channels_last else value

        self.x, self.residual, self.grad, self.scale = full().requires_grad_(), full().requires_grad_(), full(), full()
        for operator in self.operators:
            operator.weight, operator.bias = (
                vector.detach().to(device).requires_grad_() for vector in (operator.weight, operator.bias)
            )

    @property
    def leaves(self):
        return [self.x, self.residual, *[v for o in self.operators for v in (o.weight, o.bias)]]

    def block(self):
        """The output of the operator that makes the residual."""
        first, other = self.operators[:2]
        if self.kind == "add":
            return first(self.x, self.residual, self.relu, self.training)
        if self.kind == "plain":
            return first(self.x, None, self.relu, self.training) + 0 * self.residual.sum()
        running = (None, None) if self.training else (torch.zeros_like(first.weight), torch.ones_like(first.weight))
        running = [None if r is None else r.detach() for r in running]
        return functional.dual_batch_norm_add_relu(
            self.x, *running, first.weight, first.bias, self.residual, *running, other.weight, other.bias,
            training=self.training, relu=self.relu,
        )  # fmt: skip

    def after(self, y):
        """What the next block makes of it: its main branch stands for any that uses y."""
        return self.operators[2](torch.tanh(y * self.scale), y, self.relu, self.training)

    def gradients(self, run=None):
        """Of all leaves, from one backward."""
        for leaf in self.leaves:
            leaf.grad = None
        (run or (lambda: self.after(self.block())))().backward(self.grad)
        return [None if leaf.grad is None else leaf.grad.clone() for leaf in self.leaves]


def assert_same_bits(ours, theirs):
    for mine, its in zip(ours, theirs, strict=True):
        assert (mine is None) == (its is None)
        assert mine is None or torch.equal(mine, its)


@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("first", ["add", "dual"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_same_bits(dtype, first, training, relu, channels_last, device, handed, off):
    chain = Chain(device, dtype, first, relu, training, channels_last)
    ours = chain.gradients()
    assert handed() == 1
    off()
    assert_same_bits(ours, chain.gradients())


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("first", ["add", "dual"])
def test_values(first, training, device, handed):
    """Against the unfused operations in float64; ours are in float64, too, and differ by sums in another order: of 40
    values each, through three operators and a few products, by less than 1e3 roundings of 1.1e-16 of values below 1e2.
    """
    chain = Chain(device, torch.float64, first, True, training)
    ours = chain.gradients()
    assert handed() == 1

    def unfused():
        a, b, c = chain.operators

        def norm(o, x):
            if chain.training:
                return F.batch_norm(x, None, None, o.weight, o.bias, True)
            zeros = torch.zeros_like(o.weight).detach()
            return F.batch_norm(x, zeros, zeros + 1, o.weight, o.bias, False)

        second = chain.residual if first == "add" else norm(b, chain.residual)
        y = F.relu(norm(a, chain.x) + second)
        return F.relu(norm(c, torch.tanh(y * chain.scale)) + y)

    for mine, its in zip(ours, chain.gradients(unfused), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-11, atol=1e-11)


# Whoever looks sees the whole gradient. -------------------------------------------------------------------------------


def whole_gradient(chain):
    """Of y, from operators that hand nothing over."""
    y = chain.block().detach().requires_grad_()
    return torch.autograd.grad(chain.after(y), y, chain.grad)[0]


def _tensor_hook(y, seen):
    y.register_hook(seen.append)


def _removed_hook_and_another(y, seen):
    y.register_hook(seen.append).remove()
    y.register_hook(seen.append)


def _retain(y, seen):
    y.retain_grad()
    seen.append(y)


def _prehook(y, seen):
    y.grad_fn.register_prehook(lambda gradients: seen.append(gradients[0]))


def _posthook(y, seen):
    y.grad_fn.register_hook(lambda inputs, outputs: seen.append(outputs[0]))


def _multi_grad_hook(y, seen):
    torch.autograd.graph.register_multi_grad_hook([y], lambda gradients: seen.append(gradients[0]))


def _multi_grad_hook_any(y, seen):
    torch.autograd.graph.register_multi_grad_hook([y], seen.append, mode="any")


LOOKS = [
    _tensor_hook, _removed_hook_and_another, _retain, _prehook, _posthook, _multi_grad_hook, _multi_grad_hook_any
]  # fmt: skip


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "dropped"])
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("look", LOOKS)
def test_who_looks_sees_all(look, late, kept, device, handed, off):
    """Whether it was before the next block's forward or after it, and whether the tensor lives on or not."""
    chain = Chain(device)
    seen = []
    y = chain.block()
    if not late:
        look(y, seen)
    result = chain.after(y)
    if late:
        look(y, seen)
    if not kept:
        del y
    result.backward(chain.grad)
    assert handed() == 0
    (grad,) = seen
    grad = grad.grad if look is _retain else grad
    assert torch.equal(grad, whole_gradient(chain))
    ours = [leaf.grad for leaf in chain.leaves]
    off()
    assert_same_bits(ours, chain.gradients())


def test_a_dropped_tensor_is_handed_over_for(device, handed):
    """With nobody there to look."""
    chain = Chain(device)
    chain.gradients()
    with resnet_fused.recompute():
        y = chain.block()
        gone = weakref.ref(y)
        result = chain.after(y)
    del y
    result.backward(chain.grad)
    gc.collect()
    assert gone() is None
    assert handed() == 2


def test_a_hook_on_the_next_operator(device, handed):
    """It is given the gradients of the operands, that of the residual among them."""
    chain = Chain(device)
    result = chain.after(chain.block())
    seen = []
    result.grad_fn.register_hook(lambda inputs, outputs: seen.append(inputs))
    result.backward(chain.grad)
    assert handed() == 0
    assert all(gradient is not None for gradient in seen[0][:4])


def test_gradients_of_chosen_tensors(device, handed):
    chain = Chain(device)
    expected = whole_gradient(chain)
    for others in ([], [chain.operators[2].weight], chain.leaves):
        y = chain.block()
        grads = torch.autograd.grad(chain.after(y), [y, *others], chain.grad, allow_unused=True)
        assert torch.equal(grads[0], expected)
    edge = torch.autograd.graph.get_gradient_edge(y := chain.block())
    (grad,) = torch.autograd.grad(chain.after(y), [edge], chain.grad)
    assert torch.equal(grad, expected)
    assert handed() == 0


def test_inputs_of_backward(device, handed):
    chain = Chain(device)
    expected = whole_gradient(chain)
    for others in ([], [chain.operators[2].weight], [chain.operators[2].weight, chain.x]):
        y = chain.block()
        chain.after(y).backward(chain.grad, inputs=[y, *others])
        assert torch.equal(y.grad, expected)
    assert handed() == 0


def test_inputs_of_backward_that_leave_the_tensor_out(device, off):
    """All below it or all above it: what was handed over reaches whom it should, and is not missed by anybody."""
    chain = Chain(device)
    below, above = chain.x, chain.operators[2].weight
    results = []
    for _ in range(2):
        for chosen in ([below], [above], [below, above]):
            below.grad = above.grad = None
            chain.after(chain.block()).backward(chain.grad, inputs=chosen)
            results.append([None if t.grad is None else t.grad.clone() for t in (below, above)])
        off()
    for ours, theirs in zip(results[:3], results[3:], strict=True):
        assert_same_bits(ours, theirs)


class _During(torch.autograd.Function):
    """Runs something in backward, between the next operator and the one that made its residual."""

    @staticmethod
    def forward(ctx, x, run):
        ctx.run = run
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.run()
        return grad, None


@pytest.mark.parametrize("look", LOOKS[:5])
def test_looks_that_begin_in_the_midst_of_a_backward(look, device, handed):
    chain = Chain(device)
    expected = whole_gradient(chain)
    seen = []
    y = chain.block()
    main = _During.apply(y, lambda: look(y, seen))
    result = chain.operators[2](torch.tanh(main * chain.scale), y)
    result.backward(chain.grad)
    assert handed() == 1
    (grad,) = seen
    assert torch.equal(grad.grad if look is _retain else grad, expected)
    ours = [leaf.grad for leaf in chain.leaves]
    assert_same_bits(ours, chain.gradients())


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
def test_double_backward(device, handed):
    chain = Chain(device, torch.float64)
    inputs = [chain.x, chain.residual]

    def run(x, residual):
        chain.x, chain.residual = x, residual
        return chain.after(chain.block())

    assert torch.autograd.gradgradcheck(run, inputs)
    y = run(*inputs)
    y.backward(chain.grad, create_graph=True)
    assert handed() == 0
    assert inputs[0].grad.requires_grad


# Other ways through the graph. ----------------------------------------------------------------------------------------


def test_several_uses(device, handed):
    """Used thrice, its third gradient is part of the first; as the residual of two, one goes through autograd."""
    chain = Chain(device, torch.float64)
    uses = {
        "third": lambda y: chain.after(y) + y.sin(),
        "two residuals": lambda y: chain.after(y) + chain.operators[1](y.cos(), y),
        "a view": lambda y: chain.after(y) * y.view(-1)[3],
        "itself": lambda y: chain.operators[2](y, y),
        "a residual alone": lambda y: chain.operators[2](chain.scale, y),
    }
    for name, use in uses.items():
        before = handed()
        ours = chain.gradients(lambda use=use: use(chain.block()))
        assert handed() == before + 1, name
        y = chain.block().detach().requires_grad_()
        (grad,) = torch.autograd.grad(use(y), y, chain.grad)
        # Three terms are added in another order: a rounding of 1.1e-16 each, in sums of 40 values below 1e2.
        theirs = torch.autograd.grad(chain.block(), chain.leaves[:4], grad)
        for mine, its in zip(ours[:4], theirs, strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-11, atol=1e-11, msg=name)


def test_other_residuals_are_autograds(device, handed):
    chain = Chain(device)

    def changed():
        y = chain.block()
        return chain.after(y.mul_(2))

    def view():
        y = chain.block()
        return chain.operators[2](torch.tanh(y * chain.scale), y.view_as(y))

    for run in (changed, view, lambda: chain.after(chain.block().detach() + chain.x)):
        chain.gradients(run)
    with torch.no_grad():
        y = chain.block()
    chain.gradients(lambda: chain.operators[2](torch.tanh(chain.x), y))
    assert handed() == 0


def test_changed_in_place_after_its_use(device, handed, off):
    chain = Chain(device)

    def run():
        y = chain.block()
        result = chain.operators[2](chain.scale * chain.x, y)
        return result + y.add_(1)

    ours = chain.gradients(run)
    assert handed() == 1
    off()
    assert_same_bits(ours, chain.gradients(run))


def test_again_and_again(device, handed, off):
    """retain_graph: what was handed over is used once in each backward."""
    chain = Chain(device)
    results = []
    for _ in range(2):
        result = chain.after(chain.block())
        for leaf in chain.leaves:
            leaf.grad = None
        for _ in range(3):
            result.backward(chain.grad, retain_graph=True)
        assert handed() == 3
        results.append([None if leaf.grad is None else leaf.grad.clone() for leaf in chain.leaves])
        off()
    assert_same_bits(*results)


def test_a_backward_that_fails(device, handed):
    """What it left is not taken for a part of a later one."""
    chain = Chain(device)
    failing = [True]

    def fail():
        if failing[0]:
            raise ValueError("on purpose")

    def run():
        y = chain.block()
        return chain.operators[2](torch.tanh(_During.apply(y, fail) * chain.scale), y)

    result = run()
    with pytest.raises(ValueError, match="on purpose"):
        result.backward(chain.grad, retain_graph=True)
    assert handed() == 1
    failing[0] = False
    ours = chain.gradients(lambda: result)
    assert handed() == 1
    assert_same_bits(ours, chain.gradients(run))


def test_no_gradient_at_all(device):
    """An operator whose output has none gives none, as torch's own."""

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    for first in ("add", "dual"):
        for training in (True, False):
            chain = Chain(device, first=first, training=training)
            assert chain.gradients(lambda chain=chain: Nothing.apply(chain.block())) == [None] * len(chain.leaves)


def test_threads(device):
    """Two backwards through one graph at once: each has its own gradients."""
    chain = Chain(device, torch.float64)
    expected = chain.gradients()
    for _ in range(20):
        for leaf in chain.leaves:
            leaf.grad = None
        y = chain.block()
        results = [chain.after(y) for _ in range(2)]
        threads = [
            threading.Thread(target=r.backward, args=(chain.grad,), kwargs={"retain_graph": True}) for r in results
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for leaf, its in zip(chain.leaves, expected, strict=True):
            if its is not None:
                torch.testing.assert_close(leaf.grad, 2 * its, rtol=1e-12, atol=1e-12)


def test_the_graph_is_freed(device):
    chain = Chain(device)
    gc.disable()
    try:
        y = chain.block()
        node = weakref.ref(y.grad_fn)
        chain.after(y).backward(chain.grad)
        del y
        assert node() is None
    finally:
        gc.enable()


# Networks. ------------------------------------------------------------------------------------------------------------


class _Additions(TorchDispatchMode):
    """Counts the elements that autograd adds in backward."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor):
            self.elements += args[0].numel()
        return func(*args, **(kwargs or {}))


def _blocks(kind):
    torch.manual_seed(0)
    if kind == "basic":
        return nn.Sequential(FusedResidualBlock(4, 8), FusedResidualBlock(8, 8), FusedResidualBlock(8, 8))
    return nn.Sequential(FusedBottleneck(4, 2), FusedBottleneck(8, 2), FusedBottleneck(8, 2))


def _step(model, x, wrap=lambda model, x: model(x)):
    for leaf in (x, *model.parameters()):
        leaf.grad = None
    output = wrap(model, x)
    generator = torch.Generator().manual_seed(5)
    grad = torch.randn(output.shape, generator=generator).to(output)
    with _Additions() as additions:
        output.backward(grad)
    return [parameter.grad.clone() for parameter in model.parameters()], additions.elements


WRAPS = {
    "plain": lambda model, x: model(x),
    "recompute": lambda model, x: resnet_fused.recompute()(model)(x),
    "convolutions": lambda model, x: resnet_fused.recompute(convolutions=True)(model)(x),
    "checkpoint": lambda model, x: checkpoint(model, x, use_reentrant=False),
    "reentrant": lambda model, x: checkpoint(model, x, use_reentrant=True),
}


@pytest.mark.parametrize("wrap", sorted(WRAPS))
@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_a_network(kind, wrap, device, handed, off):
    """The two identity blocks' additions are gone, and nothing else."""
    model = _blocks(kind).to(device)
    x = torch.randn(2, 4, 6, 6, device=device, requires_grad=True)
    ours, added = _step(model, x, WRAPS[wrap])
    assert handed() == 2
    off()
    theirs, all_added = _step(model, x, WRAPS[wrap])
    assert_same_bits(ours, theirs)
    assert all_added - added == 2 * 2 * 8 * 6 * 6


def test_hooks_of_modules_see_all(device):
    """Forward hooks that look at outputs, and both kinds of backward hooks."""
    for register in ("register_full_backward_hook", "register_backward_hook", "register_forward_hook"):
        ours = _seen_by_hooks(register, device)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(handover, "give", lambda *_: False)
            theirs = _seen_by_hooks(register, device)
        assert_same_bits(ours, theirs)


def _seen_by_hooks(register, device):
    model, seen = _blocks("basic").to(device), []

    def forward_hook(module, inputs, output):
        output.register_hook(seen.append)

    def backward_hook(module, inputs, outputs):
        seen.extend([*inputs, *outputs])

    getattr(model[0], register)(forward_hook if "forward" in register else backward_hook)
    gradients, _ = _step(model, torch.ones(2, 4, 6, 6, device=device, requires_grad=True))
    assert seen
    return seen + gradients


def test_torchvision(device, handed, off):
    """Of a ResNet-18's eight blocks five add their input, and four of these the output of a block."""
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = resnet_fused.fuse(torchvision.models.resnet18(num_classes=3).to(device))
    x = torch.randn(2, 3, 64, 64, device=device)
    ours, _ = _step(model, x)
    assert handed() == 4
    off()
    assert_same_bits(ours, _step(model, x)[0])


def test_distributed_data_parallel(device, handed, off):
    from torch import distributed

    model = _blocks("bottleneck").to(device)
    x = torch.randn(2, 4, 6, 6, device=device, requires_grad=True)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        ours, _ = _step(model, x, lambda _, x: wrapped(x))
    finally:
        distributed.destroy_process_group()
    assert handed() == 2
    off()
    assert_same_bits(ours, _step(model, x)[0])


@pytest.mark.parametrize("compiler", [lambda graph: graph, lambda graph: torch.compile(graph, backend="eager")])
def test_a_backward_that_is_compiled(compiler, device, handed):
    """torch.compile runs nodes in its own order, and no engine is there to ask."""
    from torch._dynamo import compiled_autograd

    chain = Chain(device)
    expected = chain.gradients()
    assert handed() == 1
    for leaf in chain.leaves:
        leaf.grad = None
    result = chain.after(chain.block())
    with compiled_autograd._enable(compiler):
        result.backward(chain.grad)
    assert handed() == 1
    assert_same_bits([leaf.grad for leaf in chain.leaves], expected)


def test_a_compiled_forward(device, handed):
    chain = Chain(device)
    expected = chain.gradients()
    x, residual = chain.x, chain.residual

    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(x, residual):
        chain.x, chain.residual = x, residual
        return chain.after(chain.block())

    before = handed()
    for leaf in chain.leaves:
        leaf.grad = None
    run(x, residual).backward(chain.grad)
    assert handed() == before
    assert_same_bits([leaf.grad for leaf in (x, residual, *chain.leaves[2:])], expected)


@pytest.mark.parametrize("change", [torch.Tensor.detach, lambda weight: None, lambda weight: weight * 1])
def test_without_a_weight_that_is_a_leaf(change, device, handed, off):
    """Where none wants a gradient nobody knows what the backward is for, and autograd adds."""
    chain = Chain(device)
    last = chain.operators[2]
    last.weight = change(last.weight)
    leaves = [leaf for leaf in chain.leaves if leaf is not None and leaf.is_leaf]
    results = []
    for _ in range(2):
        for leaf in leaves:
            leaf.grad = None
        chain.after(chain.block()).backward(chain.grad, retain_graph=True)
        results.append([leaf.grad for leaf in leaves])
        assert handed() == 0
        off()
    assert_same_bits(*results)
