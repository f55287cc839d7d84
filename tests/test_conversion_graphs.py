"""fuse() beside torch.fx, torch.jit and what exports a model: what is fused there, what is not, and what says so."""

import collections
import copy
import pickle
import warnings

import pytest
import torch
from test_conversion_families import ALONE, assert_all_close, compare, images, randomized, tensors
from test_conversion_survives import (
    classes,
    in_a_fresh_process,
    timm_basic,
    timm_preactivation,
    torchvision_basic,
)
from torch import nn

from resnet_fused import (
    BatchNormAddReLU2d,
    FusedBottleneck,
    FusedResidualBlock,
    decompositions,
    fuse,
    fusion_report,
    recompute,
    unfuse,
)

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning"
    ),
]


def warned_of(action, words):
    """What ``action`` gives, and the warnings that have the words."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = action()
    return result, [warning for warning in caught if words in str(warning.message)]


def operators(model):
    return collections.Counter(row.operator for row in fusion_report(model).rows if row.fused)


# torch.fx


def traced(model):
    return torch.fx.symbolic_trace(model)


def extractor(model):
    from torchvision.models.feature_extraction import create_feature_extractor

    return create_feature_extractor(model, {"layer2": "out"})


def same(model):
    return model


def pickled(model):
    return pickle.loads(pickle.dumps(model))


GRAPHS = pytest.mark.parametrize("graph_of", [traced, extractor])


@GRAPHS
@pytest.mark.parametrize("form", [same, copy.deepcopy, copy.copy, pickled])
def test_graph_modules_are_fused_as_their_models(graph_of, form, monkeypatch):
    reference = randomized(torchvision_basic().double())
    model = form(fuse(graph_of(copy.deepcopy(reference))))
    expected = operators(fuse(copy.deepcopy(reference)))
    assert expected.total() == 6
    compare(monkeypatch, model, graph_of(reference), images(64), expected, modes=(True, False, True))


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@GRAPHS
def test_as_many_batch_norms_of_a_graph_as_of_its_model(graph_of, name):
    model = getattr(torchvision.models, name)()
    graph = fuse(graph_of(model))
    part = operators(fuse(model))
    if graph_of is extractor:
        names = {row.name for row in fusion_report(graph).rows}
        part = collections.Counter(row.operator for row in fusion_report(model).rows if row.name in names)
    for training in (True, False):
        assert operators(graph.train(training)) == part


@GRAPHS
def test_graph_modules_unfused_again(graph_of):
    model = graph_of(randomized(torchvision_basic().double()))
    before, x = classes(model), images(64)
    expected = tensors(model.eval()(x))
    fuse(model)
    after = classes(model)
    assert after != before
    assert classes(fuse(model)) == after
    assert classes(unfuse(model)) == before
    assert_all_close(tensors(model(x)), expected, "output")


def test_a_graph_module_loads_fused_in_a_fresh_process(tmp_path):
    model = fuse(traced(randomized(torchvision_basic().double()))).eval()
    x = images(64)
    torch.save(model, tmp_path / "model.pt")
    torch.save((x, model(x).detach()), tmp_path / "expected.pt")
    script = """
        import torch
        torch.set_num_threads(1)
        x, expected = torch.load("expected.pt")
        model = torch.load("model.pt", weights_only=False)
        torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
        from resnet_fused import fusion_report
        print(fusion_report(model).fused)
    """
    assert in_a_fresh_process(script, tmp_path) == "6\n"


def edited(graph):
    """Doubles what the stem's ReLU gives."""
    relu = next(node for node in graph.nodes if node.target == "relu")
    with graph.inserting_after(relu):
        doubled = graph.call_function(torch.mul, (relu, 2.0))
    relu.replace_all_uses_with(doubled, delete_user_cb=lambda user: user is not doubled)


def by_recompile(model):
    edited(model.graph)
    model.recompile()


def by_assignment(model):
    graph = copy.deepcopy(model.graph)
    edited(graph)
    model.graph = graph


def by_a_pass(model):
    """The BatchNorm of the stem goes, as a pass that folds it into the convolution would have it."""
    node = next(node for node in model.graph.nodes if node.target == "bn1")
    node.replace_all_uses_with(node.args[0])
    model.graph.erase_node(node)
    model.delete_all_unused_submodules()
    model.recompile()


@pytest.mark.parametrize("edit", [by_recompile, by_assignment, by_a_pass])
@pytest.mark.parametrize("recomputing", [False, True])
def test_a_graph_edited_after_fuse(edit, recomputing, monkeypatch):
    """The edit takes effect, and what it leaves is fused."""
    reference = traced(randomized(torchvision_basic().double()))
    model = fuse(copy.deepcopy(reference), recompute=recomputing)
    x = images(64)
    before = model.eval()(x)
    for m in (model, reference):
        edit(m)
    assert (model(x) - before).abs().max() > 1e-3
    compare(monkeypatch, model, reference, images(64), operators(fuse(copy.deepcopy(reference))), modes=(True, False))
    assert operators(model).total() == (5 if edit is by_a_pass else 6)
    assert all(row.recompute == recomputing for row in fusion_report(model).rows)
    assert_all_close([unfuse(model)(x)], [reference(x)], "unfused")


def test_a_graph_that_uses_an_output_twice_is_right(monkeypatch):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.other = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x):
            x = self.bn(self.conv(x))
            y = x
            y += 1
            return torch.relu(x) + torch.relu(self.other(y).add_(x))

    reference = traced(randomized(Twice().double()))
    compare(monkeypatch, fuse(copy.deepcopy(reference)), reference, images(9), {ALONE: 1, "batch_norm+add+relu": 1})


def test_compiled_graph_modules_call_the_operators():
    reference = traced(randomized(torchvision_basic().double()))
    model = fuse(copy.deepcopy(reference))
    called = []

    def backend(graph, _):
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    x = images(64)
    output = torch.compile(model, backend=backend, fullgraph=True)(x)
    assert_all_close([output], [reference(x)], "output")
    assert sum("resnet_fused" in name and "update" not in name for name in called) == 5  # one for two BatchNorms


@pytest.mark.parametrize("graph_of", [traced, extractor])
def test_tracing_a_fused_model_says_once_that_fusion_is_dropped(graph_of):
    model = fuse(torchvision_basic())
    graph, caught = warned_of(lambda: [graph_of(model), graph_of(model)][1], "trace first")
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert {row.reason for row in fusion_report(graph).rows} == {"fuse() has not been applied"}
    _, caught = warned_of(lambda: graph_of(torchvision_basic()), "trace first")
    assert not caught


# torch.jit


SCRIPTED = {
    **{name: getattr(torchvision.models, name) for name in ("resnet18", "resnet50")},
    "DenseNet": lambda: torchvision.models.DenseNet(8, (2, 2), 16),
    **{
        f"timm {name}": lambda name=name: timm.create_model(name)
        for name in ("resnet10t", "resnet18d", "ecaresnet26t", "dla34", "resnetv2_50", "regnetx_002")
    },
    "FusedResidualBlock": lambda: FusedResidualBlock(3, 8, 2),
    "FusedResidualBlock without a projection": lambda: FusedResidualBlock(3, 3),
    "FusedResidualBlock of the tutorial": lambda: FusedResidualBlock(3, 8, bn2_before_conv2=True),
    "FusedBottleneck": lambda: FusedBottleneck(3, 8),
    "BatchNormAddReLU2d": lambda: BatchNormAddReLU2d(3),
    "a fused part": lambda: nn.Sequential(nn.Conv2d(3, 64, 1), fuse(torchvision.models.resnet18().layer1)),
}


@pytest.mark.parametrize("recomputing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", SCRIPTED)
def test_scripting_compiles_the_unfused_model_and_says_so_once(name, recomputing):
    reference = randomized(SCRIPTED[name]())
    model = fuse(copy.deepcopy(reference), recompute=recomputing)
    before, parts = classes(model), list(model.modules())
    scripted, caught = warned_of(lambda: torch.jit.script(model), "compiles the unfused model")
    assert [warning.filename for warning in caught] == [__file__]
    # Nothing of the model is changed.
    assert classes(model) == before
    assert all(mine is its for mine, its in zip(model.modules(), parts, strict=True))
    assert "resnet_fused::" not in str(scripted.inlined_graph)
    unfused = unfuse(copy.deepcopy(model))
    if "Fused" not in name and "BatchNorm" not in name:
        again, caught = warned_of(lambda: torch.jit.script(unfused), "compiles the unfused model")
        assert not caught
        kinds = [collections.Counter(node.kind() for node in s.inlined_graph.nodes()) for s in (scripted, again)]
        assert kinds[0] == kinds[1]
    x = images(64).float()
    for training in (True, False):
        outputs = [m.train(training)(x.clone()) for m in (scripted, reference)]
        # Both run the same float32 operations; those blocks that are fused as they stand, their own.
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    for mine, its in zip(scripted.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)


def test_scripting_sees_names_and_exports_of_the_original(tmp_path):
    import math  # a name that only the closure has

    class Block(nn.Module):
        factor: float

        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.factor = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), 2

        def forward(self, x, shift: float = 0.5):
            return torch.relu(self.bn(self.conv(x))) * math.pi * self.factor + shift

        @torch.jit.export
        def forward_twice(self, x):
            return torch.relu(self.bn(self.conv(x))) * 2

    reference = randomized(Block().double()).eval()
    for setting in (False, True):
        model = fuse(copy.deepcopy(reference), recompute=setting)
        scripted = torch.jit.script(model)
        scripted.save(tmp_path / "scripted.pt")
        loaded, x = torch.jit.load(tmp_path / "scripted.pt"), images(9)
        assert_all_close([loaded(x), loaded.forward_twice(x)], [reference(x), reference.forward_twice(x)], "output")


@pytest.mark.parametrize("setting", [True, "convolutions"])
@pytest.mark.parametrize("make", [timm_basic, lambda **_: FusedBottleneck(3, 8), lambda **_: FusedResidualBlock(3, 8)])
def test_tracing_with_recomputation(make, setting):
    """torch.jit.trace runs a model twice, and compares what it recorded."""
    reference = randomized(make()).eval()
    x = images(64).float()
    for inside in (False, True):
        model = copy.deepcopy(reference)
        if not inside:
            fuse(model, recompute=setting)
            for module in model.modules():
                if hasattr(module, "recompute"):
                    module.recompute = setting
        with recompute(inside, convolutions=inside and setting == "convolutions"):
            recorded = torch.jit.trace(model, x)
        torch.testing.assert_close(recorded(x), reference(x), rtol=1e-4, atol=1e-5)
        assert "resnet_fused::" not in str(recorded.inlined_graph)


# Nothing to fuse


class Sigmoid(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.bn(self.conv(x)).sigmoid()


NOTHING = {
    "no BatchNorm": (nn.Linear, (3, 3), "in Linear: it has no BatchNorm"),
    "no ReLU": (Sigmoid, (), "in Sigmoid: of bn its output goes to other code than a ReLU or an add"),
    "a BatchNorm": (nn.BatchNorm2d, (3,), "in BatchNorm2d: "),
}


@pytest.mark.parametrize("name", NOTHING)
def test_fuse_says_where_there_is_nothing_to_fuse(name):
    cls, arguments, words = NOTHING[name]
    model = cls(*arguments)
    result, caught = warned_of(lambda: fuse(model), "found nothing to fuse")
    assert result is model
    assert len(caught) == 1
    assert words in str(caught[0].message)
    assert caught[0].filename == __file__
    for other in (FusedBottleneck(3, 8), timm_preactivation()):
        assert not warned_of(lambda other=other: fuse(fuse(other)), "found nothing to fuse")[1]
    _, caught = warned_of(lambda: fuse(timm_basic(), exclude="*"), "found nothing to fuse")
    assert "was excluded from fuse()" in str(caught[0].message)


# Export to places without the package


def packaged(model, x, directory):
    """A saved program with the operators, and one without."""
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("n")},))
    torch.export.save(program, directory / "fused.pt2")
    plain = program.run_decompositions(decompositions())
    torch.export.save(plain, directory / "plain.pt2")
    return program, plain


BLOCKS = {
    "a model": torchvision_basic,
    "FusedBottleneck": lambda: FusedBottleneck(3, 8),
    "FusedResidualBlock of the tutorial": lambda: FusedResidualBlock(3, 3, bn2_before_conv2=True),
    "without affine": lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, affine=False), nn.ReLU()),
}
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def targets(program):
    return [str(node.target) for node in program.graph.nodes]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_decomposed_programs_have_torchs_operators_alone(name, gradients, layout, tmp_path):
    reference = randomized(BLOCKS[name]()).eval().to(memory_format=layout)
    model = fuse(copy.deepcopy(reference))
    x = images(64).float().contiguous(memory_format=layout)
    with torch.set_grad_enabled(gradients):  # where a backward may follow the operators save a mask
        program, plain = packaged(model, x, tmp_path)
    assert any("resnet_fused" in target for target in targets(program))
    assert not any("resnet_fused" in target for target in targets(plain))
    more = torch.cat([x, -x])
    expected = unfuse(reference)(more)
    output = plain.module()(more)
    # The same float32 operations in another order.
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    assert output.stride() == program.module()(more).stride()


def test_torchs_own_table_leaves_the_operators():
    program = torch.export.export(fuse(torchvision_basic()).eval(), (images(64).float(),))
    assert sum("resnet_fused" in target for target in targets(program.run_decompositions())) == 5


def test_compiled_graphs_call_the_operators_with_sizes_unknown():
    """The decompositions must not reach torch.compile."""
    import torch._inductor.lowering  # which Inductor's decompositions need
    from functorch.compile import make_boxed_func
    from torch._functorch.aot_autograd import aot_module_simplified
    from torch._inductor.decomposition import select_decomp_table

    called = []

    def backend(graph, inputs):
        def compiled(graph, _):
            called.extend(str(node.target) for node in graph.graph.nodes)
            return make_boxed_func(graph.forward)

        return aot_module_simplified(graph, inputs, fw_compiler=compiled, decompositions=select_decomp_table())

    reference = randomized(torchvision_basic().double()).eval()
    model = torch.compile(fuse(copy.deepcopy(reference)), backend=backend, fullgraph=True, dynamic=True)
    x = images(64)
    with torch.no_grad():
        assert_all_close([model(x)], [reference(x)], "output")
    assert sum("resnet_fused" in target for target in called) == 5
    assert not any("native_batch_norm" in target for target in called)


def test_a_decomposed_program_runs_without_the_package(tmp_path):
    model = fuse(randomized(torchvision_basic().double())).eval()
    x = images(64)
    packaged(model, x, tmp_path)
    torch.save((x, model(x).detach()), tmp_path / "expected.pt")
    script = """
        import sys, torch
        torch.set_num_threads(1)
        x, expected = torch.load("expected.pt")
        torch.testing.assert_close(torch.export.load("plain.pt2").module()(x), expected, rtol=1e-9, atol=1e-9)
        try:
            torch.export.load("fused.pt2")
        except RuntimeError:
            print("refused")
        print("resnet_fused" in sys.modules)
        import resnet_fused
        torch.testing.assert_close(torch.export.load("fused.pt2").module()(x), expected, rtol=1e-9, atol=1e-9)
    """
    assert in_a_fresh_process(script, tmp_path) == "refused\nFalse\n"


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", ["resnet18", "FusedBottleneck", "FusedResidualBlock of the tutorial"])
@pytest.mark.parametrize("exported", [False, True])
def test_onnx_export_needs_nothing(exported, name, layout, tmp_path):
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    make = BLOCKS.get(name) or torchvision.models.resnet18
    model = fuse(randomized(make())).eval().to(memory_format=layout)
    x = images(64).float().contiguous(memory_format=layout)
    shapes = ({0: torch.export.Dim("n")},)
    if exported:
        program = torch.export.export(model, (x,), dynamic_shapes=shapes)
        torch.onnx.export(program, dynamo=True, verbose=False).save(tmp_path / "model.onnx")
    else:
        torch.onnx.export(model, (x,), dynamo=True, dynamic_shapes=shapes, verbose=False).save(tmp_path / "model.onnx")
    nodes = onnx.load(tmp_path / "model.onnx").graph.node
    assert {node.domain for node in nodes} == {""}
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    more = torch.cat([x, -x])
    output = session.run(None, {session.get_inputs()[0].name: more.contiguous().numpy()})[0]
    # Convolutions of another library, with BatchNorms folded into them: some roundings of 6e-8 a layer.
    torch.testing.assert_close(torch.from_numpy(output), unfuse(model)(more), rtol=1e-3, atol=1e-4)
