"""fuse() where a program could tell a fused forward from its own: strides, functions replaced, values that look on."""

import contextlib
import copy
import gc
import itertools
import pickle
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from test_conversion_blocks import TOLERANCE, Base, assert_same_outputs, force
from torch import nn
from torch.overrides import TorchFunctionMode

from resnet_fused import fuse, fusion_report, unfuse

# Strides


def layouts(shape):
    """Tensors of one shape in every order of dimensions, sliced, expanded, with gaps, with strides for sizes of 1."""
    for order in itertools.permutations(range(len(shape))):
        inverse = [order.index(dimension) for dimension in range(len(shape))]
        yield torch.randn([shape[dimension] for dimension in order], dtype=torch.float64).permute(inverse)
    larger = torch.randn([size + 1 for size in shape], dtype=torch.float64)
    yield larger[tuple(slice(0, size) for size in shape)]
    yield torch.randn((1, *shape[1:]), dtype=torch.float64).expand(shape)
    yield torch.randn((*shape[:-1], 2 * shape[-1]), dtype=torch.float64)[..., ::2]
    if len(shape) == 4:
        last = larger.contiguous(memory_format=torch.channels_last)
        yield last[tuple(slice(0, size) for size in shape)]


class Alone(nn.Module):
    def __init__(self, bn):
        super().__init__()
        self.bn = bn

    def forward(self, x, y):
        return self.bn(x)


class Rectified(Alone):
    def forward(self, x, y):
        return F.relu(self.bn(x))


class Added(Alone):
    def forward(self, x, y):
        return F.relu(self.bn(x) + y)


class AddedTo(Alone):
    def forward(self, x, y):
        return F.relu(y + self.bn(x))


class AddedInPlace(Alone):
    def forward(self, x, y):
        z = self.bn(x)
        z += y
        return F.relu(z)


class Both(Alone):
    def __init__(self, bn):
        super().__init__(bn)
        self.bn2 = copy.deepcopy(bn)

    def forward(self, x, y):
        return F.relu(self.bn(x) + self.bn2(y))


class Neither(Alone):
    def forward(self, x, y):
        return F.relu(x + y)


NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
SHAPES = [(2, 3, 4, 5), (1, 3, 4, 5), (2, 1, 4, 5), (2, 3, 4, 1), (2, 8, 1, 5), (2, 3, 1, 1), (4, 3), (4, 3, 5)]


@pytest.mark.parametrize("cls", [Alone, Rectified, Added, AddedTo, AddedInPlace, Both, Neither])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_strides_are_those_of_torch(cls, shape):
    fused, reference = (cls(NORMS[len(shape)](shape[1])).double() for _ in range(2))
    force(fuse(fused))
    for training in (True, False):
        fused.train(training)
        reference.train(training)
        seconds = list(layouts(shape))
        # Every layout beside every other, of those that have one.
        for x in layouts(shape):
            for y in seconds if cls not in (Alone, Rectified) else seconds[:1]:
                output, expected = fused(x, y), reference(x, y)
                assert output.stride() == expected.stride(), (x.stride(), y.stride())
                torch.testing.assert_close(output, expected, **TOLERANCE)


@pytest.mark.parametrize("cls", [Rectified, Added, Both])
def test_strides_in_three_dimensions(cls):
    shape = (2, 3, 2, 4, 5)
    fused, reference = (cls(nn.BatchNorm3d(3)).double() for _ in range(2))
    fuse(fused)
    for x in layouts(shape):
        for y in (x, torch.randn(shape, dtype=torch.float64)):
            assert fused(x, y).stride() == reference(x, y).stride(), (x.stride(), y.stride())


class Flattens(Base):
    def forward(self, x):
        return F.relu(x + self.bn1(self.conv1(x))).view(len(x), -1)


def test_a_view_that_torchs_strides_allow():
    block = Flattens().to(memory_format=torch.channels_last)
    reference = copy.deepcopy(block)
    x = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(fuse(block)(x), reference(x))


def test_usual_layouts_are_fused(monkeypatch):
    calls = []
    from resnet_fused import modules

    run = modules.batch_norm_add_relu
    monkeypatch.setattr(modules, "batch_norm_add_relu", lambda *a, **k: calls.append(a[2] is not None) or run(*a, **k))
    block = fuse(Added(nn.BatchNorm2d(3)))
    for shape in ((2, 3, 4, 5), (1, 3, 4, 5)):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(shape).contiguous(memory_format=memory_format)
            block(x, x.clone())
    assert calls == [True] * 4


# Tensors that are no plain ones


def test_nested_tensors():
    block = Neither(nn.BatchNorm2d(3))
    force(fuse(block))
    for layout in (torch.strided, torch.jagged):
        n = torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(4, 3)], layout=layout)
        outputs, expected = block(n, n).unbind(), F.relu(n + n).unbind()
        for output, value in zip(outputs, expected, strict=True):
            assert torch.equal(output, value)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.to_sparse(),
        lambda x: (x * 10).int(),
        lambda x: x.to_mkldnn(),
        lambda x: torch.view_as_complex(torch.stack([x, x], -1)),
    ],
    ids=["sparse", "int", "mkldnn", "complex"],
)
def test_tensors_of_other_kinds(make):
    block = Neither(nn.BatchNorm2d(3))
    force(fuse(block))
    x = make(torch.randn(2, 3, 4, 5))
    results = []
    for function in (block, lambda x, y: F.relu(x + y)):
        try:
            results.append(function(x, x))
        except Exception as error:
            results.append((type(error), str(error)))
    if isinstance(results[1], torch.Tensor):
        results = [result.to_dense() if result.layout is not torch.strided else result for result in results]
        assert torch.equal(*results)
    else:
        assert results[0] == results[1]


def test_a_tensor_that_is_told_of_functions():
    seen = []

    class Told(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            seen.append(function.__name__)
            return super().__torch_function__(function, types, args, kwargs or {})

    block = Neither(nn.BatchNorm2d(3))
    force(fuse(block))
    x = torch.randn(2, 3).as_subclass(Told)
    block(x, x)
    fused, seen[:] = seen[:], []
    F.relu(x + x)
    assert fused == seen != []


# Functions of torch that somebody replaced


class Spelled(Base):
    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)) + x)
        y = self.relu(self.bn1(self.conv1(y)))
        z = self.bn2(self.conv2(y))
        z += x
        y = torch.add(self.bn1(z), x).relu()
        y = F.dropout(self.bn2(y).add(x).relu_(), 0.5, self.training)
        return nn.functional.relu(self.bn1(y).add_(x), inplace=True)


PLACES = [
    (F, "relu"),
    (torch, "relu"),
    (torch, "relu_"),
    (torch.Tensor, "relu"),
    (torch.Tensor, "relu_"),
    (F, "batch_norm"),
    (torch, "batch_norm"),
    (torch, "add"),
    (torch.Tensor, "add"),
    (torch.Tensor, "add_"),
    (torch.Tensor, "__add__"),
    (torch.Tensor, "__iadd__"),
    (nn.Module, "__call__"),
    (nn.BatchNorm2d, "forward"),
    (nn.ReLU, "forward"),
]


@pytest.mark.parametrize(("home", "name"), PLACES, ids=lambda value: getattr(value, "__name__", value))
@pytest.mark.parametrize("late", [True, False])
def test_a_function_of_torch_that_is_replaced_is_called(home, name, late, monkeypatch):
    original = getattr(home, name)
    seen = []

    def replacement(*arguments, **named):
        seen.append(type(arguments[0]).__name__)
        return original(*arguments, **named)

    block, reference = Spelled(), Spelled()
    block.load_state_dict(reference.state_dict())
    if late:
        fuse(block)
    monkeypatch.setattr(home, name, replacement)
    if not late:
        fuse(block)
    x = torch.randn(2, 8, 5, 5)
    block.train(False)
    reference.train(False)
    output = block(x)
    fused, seen[:] = seen[:], []
    torch.testing.assert_close(output, reference(x))
    assert len(fused) == len(seen) > 0


def test_the_report_says_that_a_function_was_replaced(monkeypatch):
    block = fuse(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()))
    assert fusion_report(block).rows[0].operator == "batch_norm+relu"
    relu = F.relu
    monkeypatch.setattr(F, "relu", lambda *arguments, **named: relu(*arguments, **named))
    row = fusion_report(block).rows[0]
    assert row.operator == "batch_norm"
    assert "which calls torch's relu, which was replaced" in row.reason


def test_a_mode_sees_what_it_would_see():
    class Names(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            names.append(getattr(function, "__name__", ""))
            return function(*args, **(kwargs or {}))

    lists = []
    x = torch.randn(2, 8, 5, 5)
    for block in (fuse(Flattens()), Flattens()):
        names = []
        with Names():
            block(x)
        lists.append([name for name in names if name in ("relu", "add", "batch_norm")])
    assert lists[0] == lists[1]
    with torch.device("cpu"):  # sees none
        assert fusion_report(fuse(Flattens())).fused == 1


# Who looks at a BatchNorm while its output waits


class Scaled:
    """Has operators that run code of the user's."""

    def __init__(self, bn):
        self.bn = bn
        self.seen = []

    def look(self, *_):
        self.seen.append(self.bn.num_batches_tracked.item())
        return 1

    __mul__ = __rmul__ = __getitem__ = __neg__ = __len__ = __lt__ = look
    __add__ = __radd__ = look

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        args[1].look()
        return args[0]

    def __eq__(self, other):
        return bool(self.look())

    __hash__ = None

    def __bool__(self):
        return bool(self.look())

    def __contains__(self, item):
        return bool(self.look())

    def __format__(self, spec):
        return str(self.look())

    __str__ = __repr__ = lambda self: str(self.look())

    @property
    def value(self):
        return self.look()

    def __iter__(self):
        yield self.look()
        yield self.look()


class Looks(Base):
    """The parts of Base and an object that looks on."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.scaled = Scaled(self.bn2)

    def __deepcopy__(self, memo):
        twin = type(self)()
        twin.load_state_dict(self.state_dict())
        return twin.double()


LOOKS = [
    "self.scaled * 2",
    "2 * self.scaled",
    "self.scaled + 2",
    "2 + self.scaled",
    "F.relu(torch.add(self.bn1(x), self.scaled)) is None",
    "F.relu(self.bn1(x) + self.scaled) is None",
    "F.relu(self.bn1(x).add(self.scaled)) is None",
    "-self.scaled",
    "self.scaled[0]",
    "len(self.scaled)",
    "self.scaled == 1",
    "self.scaled < 1",
    "1 in self.scaled",
    "not self.scaled",
    "1 if self.scaled else 2",
    "self.scaled and 1",
    "self.scaled.value",
    "f'{self.scaled}'",
    "f'{1:{self.scaled}}'",
    "'%s' % self.scaled",
    "[*self.scaled]",
    "(lambda: self.scaled.value)()",
    "[a for a in self.scaled]",
    "isinstance(self.scaled, int) or self.scaled.value",
    "getattr(self.scaled, 'value')",
    "[self.scaled][0].value",
]
FORMS = [
    "y = self.bn2(self.conv2(x))\n        seen = ({})\n        return F.relu(y), seen",
    "y = self.bn2(self.conv2(x)); z = (y, {})\n        return F.relu(z[0])",
    "y = self.bn2(self.conv2(x))\n        if {}: pass\n        y += x\n        return F.relu(y)",
    "return F.relu(torch.add(self.bn2(self.conv2(x)), x if ({}) else x))",
]


def made(tmp_path, name, text):
    """The class Block of a source."""
    path = tmp_path / f"{name}.py"
    path.write_text(text)
    namespace = {"__name__": name, "Looks": Looks, "F": F, "torch": torch, "Base": Base, "nn": nn}
    exec(compile(text, str(path), "exec"), namespace)
    return namespace["Block"]


@pytest.mark.parametrize("form", range(len(FORMS)))
@pytest.mark.parametrize("look", LOOKS)
def test_operators_of_the_users_classes_see_the_statistics_of_the_step(tmp_path, look, form):
    text = f"class Block(Looks):\n    def forward(self, x):\n        {FORMS[form].format(look)}\n"
    cls = made(tmp_path, "looks", text)
    seen = []
    x = torch.randn(2, 8, 5, 5)
    for block in (cls(), force(fuse(cls()))):
        block(x)
        seen.append(block.scaled.seen)
    assert seen[0] == seen[1]
    assert set(seen[0]) == {1}


def test_a_loop_over_an_object_of_the_users(tmp_path):
    text = """
class Block(Looks):
    def forward(self, x):
        y = x
        for _ in self.scaled:
            y = self.bn2(self.conv2(F.relu(y)))
        return F.relu(y)
"""
    cls = made(tmp_path, "loops", text)
    seen = []
    for block in (cls(), force(fuse(cls()))):
        block(torch.randn(2, 8, 5, 5))
        seen.append(block.scaled.seen)
    assert seen == [[0, 1], [0, 1]]


class ReadsBefore(Base):
    """Aliases of statistics, taken before the BatchNorm runs and used while it would wait."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.register_buffer("mean", self.bn1.running_mean)
        self.other = UsesItsInput()

    def forward(self, x):
        mean, count = self.bn1.running_mean, self.bn1.num_batches_tracked
        var = self.bn1._buffers["running_var"]
        y = self.bn1(self.conv1(x))
        seen = mean * 1, count + 0, var[0] * 1, self.mean * 1
        y = F.relu(y)
        mean = self.bn2.running_mean
        z = self.bn2(self.conv2(y))
        more = self.other(mean)
        z += x
        return F.relu(z), seen, more


class UsesItsInput(nn.Module):
    def forward(self, x):
        return x * 2


class HasTheBuffer(nn.Module):
    """A shortcut with a buffer that is the running mean of a BatchNorm elsewhere, or a view of it."""

    def __init__(self, mean):
        super().__init__()
        self.register_buffer("mean", mean)

    def forward(self, x):
        return x + self.mean.sum()


class WithABuffer(Base):
    view = False

    def __init__(self, *arguments):
        super().__init__(*arguments)
        mean = self.bn2.running_mean
        self.has = HasTheBuffer(mean[2:] if self.view else mean)

    def forward(self, x):
        y = self.bn2(self.conv2(x))
        y += self.has(x)
        return F.relu(y)


class WithAView(WithABuffer):
    view = True


class SharesVariance(Base):
    """Two BatchNorms with one running variance, of which the second has a view."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.bn2.register_buffer("running_var", self.bn1.running_var.view(-1))
        self.branch = nn.Sequential(self.conv2, self.bn2)

    def forward(self, x):
        y = self.bn1(self.conv1(x))
        z = self.branch(x)
        return F.relu(z + y)


class Probe(nn.Module):
    """Sees a BatchNorm that is none of its parts: its class has it."""

    watched: nn.Module

    def forward(self, x):
        return x * (1 + type(self).watched.running_mean.abs().sum())


GLOBALS = {}


class GlobalProbe(nn.Module):
    def forward(self, x):
        return x * (1 + watched().running_mean.abs().sum())


def watched():
    return GLOBALS["bn"]


class Probed(Base):
    """Another module runs between the BatchNorm and the add, which a projection shortcut may do."""

    def __init__(self):
        super().__init__()
        self.probe = Probe()

    def forward(self, x):
        Probe.watched = GLOBALS["bn"] = self.bn2
        y = self.bn2(self.conv1(x))
        z = self.probe(x)
        return F.relu(y + z)


class ProbedByAGlobal(Probed):
    def __init__(self):
        super().__init__()
        self.probe = GlobalProbe()


class ProbedByAClosure(Probed):
    def __init__(self):
        super().__init__()
        bn = (self.bn2,)

        class Closure(nn.Module):
            def forward(self, x):
                return x * (1 + bn[0].running_mean.abs().sum())

        self.probe = Closure()


class WithAParameter(Probed):
    """A parameter of the module beside is the statistic."""

    def __init__(self):
        super().__init__()
        self.probe = nn.Conv2d(8, 8, 1)
        self.probe.bias = nn.Parameter(self.bn2.running_mean, requires_grad=False)


@pytest.mark.parametrize(
    "cls",
    [ReadsBefore, WithABuffer, WithAView, SharesVariance, Probed, ProbedByAGlobal, ProbedByAClosure, WithAParameter],
)
def test_aliases_of_statistics(cls):
    torch.manual_seed(1)
    block = cls().double()
    # Not deepcopy and not double(), after which buffers are shared no more, but the same again.
    reference, fused = cls(), cls()
    for one in (reference, fused):
        one.load_state_dict(block.state_dict())
    force(fuse(fused))
    with torch.no_grad():
        for _ in range(2):
            x = torch.randn(2, 8, 5, 5)
            torch.testing.assert_close(fused(x), reference(x))
    torch.testing.assert_close(dict(fused.named_buffers()), dict(reference.named_buffers()))


# Exceptions


class Boom(Exception):
    pass


class Explodes:
    def __mul__(self, other):
        raise Boom

    __getitem__ = __bool__ = __rmul__ = lambda self, *_: self * 1


class Interrupted(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        raise KeyboardInterrupt


FAILING = [
    "y = self.bn2(self.conv2(x)); z = self.explodes * 2; return F.relu(y)",
    "y = self.bn2(self.conv2(x)); z = [1][self.three]; return F.relu(y)",
    "y = self.bn2(self.conv2(x)); y += self.parts[self.three]; return F.relu(y)",
    "y = self.bn2(self.conv2(x)); y += self.nowhere; return F.relu(y)",
    "y = self.bn2(self.conv2(x)); y += self.interrupted(x); return F.relu(y)",
    "return F.relu(self.bn2(self.conv2(x)) + self.nowhere)",
    "return F.relu(self.bn2(self.conv2(x)) + nowhere)",
    "return F.relu(self.bn2(self.conv2(x)) + [x][self.three])",
    "return F.relu(self.bn2(self.conv2(x)) + x[:, :3])",
    "y = self.bn2(self.conv2(x)); return self.nowhere(y)",
    "y = self.bn2(self.conv2(x)); return F.relu(y + self.interrupted(x))",
    "return F.relu(self.bn2(self.conv2(x)).add_(self.interrupted(x)))",
    "return F.relu(self.part(x) + self.interrupted(x))",
    "return self.fails(x)",
]


@pytest.mark.parametrize("body", FAILING)
@pytest.mark.parametrize("nested", [False, True])
def test_an_exception_leaves_the_statistics_of_the_step(tmp_path, body, nested):
    text = f"""
class Block(Base):
    def fails(self, x):
        y = self.bn2(self.conv2(x))
        if self.nowhere:
            y = y + x
        return F.relu(y)

    def forward(self, x):
        {body}
"""
    cls = made(tmp_path, "fails", text)
    results = []
    for change in (lambda block: block, lambda block: force(fuse(block))):
        block = cls()
        block.explodes, block.three, block.parts, block.interrupted = Explodes(), 3, [1], Interrupted()
        block.part = nn.Sequential(block.conv2, block.bn2)
        model = change(nn.Sequential(block, nn.ReLU()) if nested else block)
        with pytest.raises((Boom, IndexError, AttributeError, NameError, RuntimeError, KeyboardInterrupt)) as caught:
            model(torch.randn(2, 8, 5, 5))
        results.append((caught.type, block.bn2.num_batches_tracked.item()))
    assert results[0] == results[1]
    assert results[0][1] == 1


class Catches(Base):
    """Catches what a fused part raises, in a forward that is rewritten too."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.part = Raising()

    def forward(self, x):
        try:
            x = self.part(x)
        except AttributeError:
            seen = self.part.bn2.num_batches_tracked + 0
        return F.relu(self.bn1(self.conv1(x))), seen


class Raising(Base):
    def forward(self, x):
        y = self.bn2(self.conv2(x))
        y += self.nowhere
        return F.relu(y)


def test_who_catches_an_exception_within_a_fused_forward_sees_the_statistics():
    block = force(fuse(Catches()))
    assert block(torch.randn(2, 8, 5, 5))[1] == 1


# Classes


class AsksItsClass(Base):
    def forward(self, x):
        mine = type(self) is AsksItsClass, self.__class__ is AsksItsClass, type(self).__name__, self.helper()
        return F.relu(self.bn1(self.conv1(x))) * (1 if all(mine) else 2)

    def helper(self):
        return type(self) is AsksItsClass


def test_the_class_of_self_is_what_it_was():
    block = AsksItsClass().double()
    reference = copy.deepcopy(block)
    assert fusion_report(fuse(block)).fused == 1
    assert_same_outputs(block, reference)
    x = torch.randn(2, 8, 5, 5).double()
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), reference(x), **TOLERANCE)


class AsksInAComprehension(Base):
    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        return y * all(type(self) is AsksInAComprehension for _ in range(1))


class AsksInALambda(Base):
    def forward(self, x):
        asks = lambda: self.__class__ is AsksInALambda  # noqa: E731
        return F.relu(self.bn1(self.conv1(x))) * asks()


class AsksByAnotherName(Base):
    def forward(self, x):
        me = self
        return F.relu(self.bn1(self.conv1(x))) * (type(me) is AsksByAnotherName)


class AsksOfAPart(Base):
    """Of a part that would be fused, and not in a comparison."""

    def __init__(self):
        super().__init__()
        self.part = AsksItsClass()

    def forward(self, x):
        kinds = {AsksItsClass: 1}
        return self.part(x) * kinds.get(type(self.part), 0)


@pytest.mark.parametrize("cls", [AsksInAComprehension, AsksInALambda, AsksByAnotherName, AsksOfAPart])
def test_a_class_that_is_asked_for_unseen_is_not_changed(cls):
    block = cls().double()
    reference = copy.deepcopy(block)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where nothing is left to fuse
        fuse(block)
    assert_same_outputs(block, reference)


def test_what_is_remembered_is_not_pickled():
    """cloudpickle takes the attributes of classes and functions along, to where this package may not be."""
    block = Probed()
    fusion_report(block)
    remembered = [
        value
        for owner in (Probed, Probed.forward, Probe, Probe.forward)
        for name, value in vars(owner).items()
        if name.startswith("_resnet_fused")
    ]
    assert len(remembered) >= 4
    assert pickle.loads(pickle.dumps(remembered)) == [None] * len(remembered)


class Unchangeable(type):
    def __setattr__(cls, name, value):
        raise TypeError("a class that takes no attributes")


class OfUnchangeableClass(nn.Module, metaclass=Unchangeable):
    def forward(self, x):
        return x


def test_a_class_that_takes_no_attributes():
    model = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), OfUnchangeableClass()).double()
    reference = copy.deepcopy(model)
    assert fusion_report(fuse(model)).fused == 1
    assert_same_outputs(model, reference)


class Replaced(Base):
    def forward(self, x):
        return self.inner(x)

    def inner(self, x):
        return F.relu(self.bn1(self.conv1(x)))


def twice(self, x):
    return 2 * F.relu(self.bn1(self.conv1(x)))


def unreadable():
    namespace = {"F": F}
    exec("def forward(self, x):\n    return 2 * F.relu(self.bn1(self.conv1(x)))", namespace)
    return namespace["forward"]


@pytest.mark.parametrize("name", ["forward", "inner"])
@pytest.mark.parametrize("readable", [True, False])
@pytest.mark.parametrize("within", [True, False])
def test_a_method_put_into_the_class_after_fuse(name, readable, within, monkeypatch):
    block = Replaced()
    model = nn.Sequential(block, nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU()) if within else block
    reference = copy.deepcopy(model)
    fuse(model)
    x = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(model(x), reference(x))
    monkeypatch.setattr(Replaced, name, twice if readable else unreadable())
    torch.testing.assert_close(model(x), reference(x))
    assert fusion_report(model).rows[0].reason is not None
    fuse(model)
    assert (fusion_report(model).rows[0].reason is None) is readable
    torch.testing.assert_close(model(x), reference(x))
    monkeypatch.undo()
    torch.testing.assert_close(model(x), reference(x))
    fuse(model)
    assert fusion_report(model).rows[0].reason is None
    torch.testing.assert_close(model(x), reference(x))


def test_a_forward_put_into_sequential_after_fuse(monkeypatch):
    model = fuse(nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU()))
    monkeypatch.setattr(nn.Sequential, "forward", lambda self, x: x)
    assert model(3) == 3


def test_a_bound_method_outlives_unfuse():
    block = fuse(Replaced())
    forward = block.forward
    unfuse(block)
    x = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(forward(x), Replaced.forward(block, x))


def local_class():
    class Local(Base):
        def forward(self, x):
            return super().__repr__() and F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.part(x))

    class Part(nn.Conv2d):
        pass

    class Chain(nn.Sequential):
        pass

    block = Local()
    block.part = Chain(Part(8, 8, 1), nn.BatchNorm2d(8))
    return block


def test_classes_are_gone_when_nobody_has_them():
    references = []
    for _ in range(5):
        block = local_class()
        references += [weakref.ref(cls) for cls in (type(block), type(block.part), type(block.part[0]))]
        fuse(block, recompute=True)
        fuse(block)
        references.append(weakref.ref(type(block)))
        assert fusion_report(block).fused == 3
        block(torch.randn(2, 8, 5, 5)).sum().backward()
        copy.deepcopy(block)
        del block
    gc.collect()
    assert [reference() for reference in references] == [None] * 20


def test_a_class_has_one_fused_class():
    block = fuse(Replaced())
    cls = type(block)
    assert type(fuse(Replaced())) is type(copy.deepcopy(block)) is type(pickle.loads(pickle.dumps(block))) is cls
    assert type(fuse(Replaced(), recompute=True)) is not cls
    unfuse(block)
    assert type(fuse(block)) is cls


def test_a_context_manager_of_the_users_sees_the_statistics(tmp_path):
    text = """
class Block(Looks):
    def forward(self, x):
        y = self.bn2(self.conv2(x))
        with self.context():
            y = F.relu(y)
        return y

    def context(self):
        self.scaled.look()
        return nullcontext()
""".replace("nullcontext", "self.null")
    cls = made(tmp_path, "contexts", text)
    cls.null = staticmethod(contextlib.nullcontext)
    block = force(fuse(cls()))
    block(torch.randn(2, 8, 5, 5))
    assert block.scaled.seen == [1]
