"""verify(): runs a model beside its fused copy, and names the first module where the two part."""

import contextlib
import copy
import dataclasses
import functools
import math
import random
import sys
import types
from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd
from torch.utils import _pytree as pytree

from ..bypass import EXCLUDED
from ..example_inputs import Arguments, arguments_of, made_up
from .comparison import Comparison, Tolerance, coarsest, compared, magnitude, tensors_of

SEED = 20240229
# What an attribute is compared as, beside tensors; and those that every module has.
_PLAIN = (bool, int, float, complex, str, bytes, types.NoneType)
_OF_ALL_MODULES = frozenset(vars(nn.Module()))
# An example that amplifies more than most may differ by _MARGIN times what a change of all parameters by _NOISE eps
# makes: as much is rounded by a BatchNorm that computes in another order, and this in all layers. In 16 bits such a
# change is no small one, and says nothing.
_NOISE = 8
_MARGIN = 100
# Where that allows differences of a relative 1e-5 in float64, or 1e-2 in float32, an agreement says nothing.
_MOST = {torch.float64: 1e4, torch.float32: 1e2}
# Modules that a fused operator may stand for, or whose output it knows to be nobody else's. A hook on one has them
# called as they are, and hides what it should show.
_BYPASSED = (_BatchNorm, nn.ReLU, nn.Identity, _DropoutNd, _ConvNd, nn.Linear)


class VerificationError(RuntimeError):
    """A fused copy of a model computes something else than the model.

    Attributes:
        module: the first module that differs, as in ``named_modules()``; empty for the model itself.
        what: what differs of it, such as ``output in train mode``.
    """

    def __init__(self, module: str, what: str, how: str):
        super().__init__(f"{module or 'the model'}: {what} {how} after fuse()")
        self.module = module
        self.what = what


def verify(model: nn.Module, convert: Callable[[nn.Module], object], example_inputs=None) -> None:
    """Compares copies of ``model``, one of them converted, in eval and in train mode.

    That is outputs, gradients, parameters, buffers, and the attributes of modules that the run changes, where these are
    numbers, strings, tensors or containers of those. An attribute that is another one each time is left out.

    The copies run in float64 where the model can, in its own dtype where not; each with the same random numbers, so
    dropout may be part of it. The train run has every module in the mode that it is in, such as a frozen BatchNorm; all
    in train mode if the model is wholly in eval mode. The model itself is not run, and keeps statistics, gradients,
    modes and hooks; random states are what they were. Forward hooks are copied with the model and run with the copies.

    Args:
        model: not converted yet; on a real device, and one that ``copy.deepcopy`` can copy.
        convert: fuses the model given to it in place.
        example_inputs: what the model is called with: a tensor, a tuple or list of positional arguments or a dict of
            keyword arguments. Without it inputs are made up from the first convolution or linear layer.

    Raises:
        VerificationError: the converted copy raises, or gives another output, gradient, buffer or attribute.
        ValueError: the model is on the meta device, cannot be copied, runs on no made-up input (or not on
            ``example_inputs``), returns no tensor, gives different results each time it runs, or on this input
            amplifies rounding so much that nothing can be said.
    """
    if any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()]):
        raise ValueError("the model is on the meta device, where nothing is computed: verify it on a real device")
    with _random_states_kept(), torch.inference_mode(False):
        setting, expected = _reference(model, example_inputs)
        for mode in MODES:
            again = _run(model, setting, mode)
            _leave_out_what_changes(expected[mode], again)
            if _first_difference(expected[mode], again, mode, _Scales()) is not None:
                raise ValueError(
                    f"the model is not deterministic and cannot be verified: it gives different results in {mode.name} "
                    "each time it runs, from the same seed"
                )
            _check(model, convert, setting, mode, expected[mode])


@dataclasses.dataclass(frozen=True)
class _Mode:
    name: str
    training: bool = False
    gradients: bool = True


NO_GRAD = _Mode("eval mode under no_grad", gradients=False)
MODES = (_Mode("eval mode"), NO_GRAD, _Mode("train mode", training=True))


@dataclasses.dataclass(frozen=True, eq=False)
class _Setting:
    """What the runs that are compared have in common."""

    arguments: Arguments
    double: bool
    input_gradients: bool


class _Watch:
    """Hooks on the modules of one run.

    Attributes:
        order: names of modules as they completed.
        running: those that have not completed.
        largest: the largest magnitude in any output.
        dtypes: the dtypes of outputs.
        kept: the outputs of each call of a module, where they are to be kept.
        first: the module whose output was the first to differ from what another watch kept, and how.
    """

    def __init__(
        self,
        names: Collection[str] | None = None,
        keep: bool = False,
        expected: "_Watch | None" = None,
        scale: float = 1.0,
    ):
        self.order: list[str] = []
        self.running: list[str] = []
        self.largest = 0.0
        self.dtypes: set[torch.dtype] = set()
        self.kept: dict[str, list[list[Tensor]]] = {}
        self.first: tuple[str, str] | None = None
        self._names, self._keep, self._expected, self._scale = names, keep, expected, scale

    def attach(self, model: nn.Module) -> None:
        for name, module in model.named_modules():
            if (self._names is None or name in self._names) and not isinstance(module, torch.jit.ScriptModule):
                module.register_forward_pre_hook(functools.partial(self._entered, name))
                module.register_forward_hook(functools.partial(self._completed, name))

    def _entered(self, name: str, *_) -> None:
        self.running.append(name)

    def _completed(self, name: str, module: nn.Module, arguments, output) -> None:
        # A module that raised, caught by one around it, is still in the list.
        while self.running and self.running.pop() != name:
            pass
        tensors = [tensor.detach() for tensor in tensors_of(output)]
        if self._expected is not None and self.first is None:
            how = self._expected._why_different(name, self.order.count(name), tensors, self._scale)
            self.first = None if how is None else (name, how)
        self.order.append(name)
        self.dtypes.update(tensor.dtype for tensor in tensors if tensor.is_floating_point())
        self.largest = max([self.largest, *map(magnitude, tensors)])
        if self._keep:
            self.kept.setdefault(name, []).append([tensor.clone() for tensor in tensors])

    def _why_different(self, name: str, call: int, tensors: list[Tensor], scale: float) -> str | None:
        calls = self.kept.get(name, [])
        if call >= len(calls):
            return "is new"
        tolerance = Tolerance(coarsest(self.dtypes), self.largest, scale=scale)
        comparison = compared(calls[call], tensors, tolerance)
        return comparison.how if comparison.ratio > 1 else None


@dataclasses.dataclass(frozen=True)
class _Scales:
    """How many times the usual difference is allowed."""

    forward: float = 1.0
    gradients: float = 1.0


@dataclasses.dataclass(frozen=True)
class _Compared:
    """One comparison: of the module's buffer, attribute or gradient; module is None for outputs, which locate nothing.

    ``rounds``: whether it is a value that rounding changes.
    """

    module: str | None
    what: str
    how: str
    ratio: float
    gradients: bool = False
    rounds: bool = True


@dataclasses.dataclass
class _Results:
    """What is compared of a run; ``inputs`` are the arguments after the call, which may have changed them."""

    watch: _Watch
    outputs: list[Tensor]
    inputs: list[Tensor]
    gradients: dict[str, Tensor | None]
    input_gradients: list[Tensor | None]
    buffers: dict[str, Tensor]
    parameters: dict[str, Tensor]
    attributes: dict[str, list]
    changed: set[str]
    unsure: set[str] = dataclasses.field(default_factory=set)


def _reference(model: nn.Module, example_inputs) -> tuple[_Setting, dict[_Mode, _Results]]:
    """A setting in which the unconverted model runs in all modes, and what it gives."""
    error = None
    for arguments in made_up(model) if example_inputs is None else [arguments_of(example_inputs)]:
        # After the best, the plainest: where that fails too, the input does not fit.
        results = {}
        for double, input_gradients in ((True, True), (False, False), (True, False), (False, True)):
            setting = _Setting(arguments, double, input_gradients)
            try:
                results[setting] = {mode: _run(model, setting, mode) for mode in MODES}
            except Exception as raised:
                error = raised
                if not results and not double:
                    break
                continue
            if not any(run.outputs for run in results[setting].values()):
                raise ValueError("the model returns no tensor: there is nothing to verify")
            if double or input_gradients:
                return setting, results[setting]
        if results:
            return results.popitem()
    last = f": {type(error).__name__}: {error}" if error is not None else ""
    if example_inputs is None:
        raise ValueError(f"no made-up input suits the model, give example_inputs; the last error was{last}") from error
    raise ValueError(f"the model, not fused, does not run on example_inputs{last}") from error


def _run(
    model: nn.Module,
    setting: _Setting,
    mode: _Mode,
    convert=None,
    watch: _Watch | None = None,
    noise: torch.Generator | None = None,
) -> _Results:
    twin = _twin(model, mode, setting.double)
    if convert is None:
        _unfuse(twin)
        watch = watch or _Watch()
    else:
        convert(twin)
    if watch is not None:
        watch.attach(twin)
    leaves, (arguments, named) = _fresh(setting, mode)
    if noise is not None:
        with torch.no_grad():
            for parameter in twin.parameters():
                _shake(parameter, noise)
    _seed()
    before = _attributes(twin)
    with torch.set_grad_enabled(mode.gradients):
        outputs = tensors_of(twin(*arguments, **named))
        if mode.gradients:
            _backward(outputs)
    after = _attributes(twin)
    return _Results(
        watch,
        [output.detach() for output in outputs],
        [input.detach() for input in tensors_of((arguments, named))],
        {name: parameter.grad for name, parameter in twin.named_parameters()},
        [leaf.grad for leaf in leaves],
        dict(twin.named_buffers()),
        {name: parameter.detach() for name, parameter in twin.named_parameters()},
        after,
        {name for name in before.keys() | after.keys() if _differing(before.get(name), after.get(name)).ratio > 1},
    )


def _attributes(model: nn.Module) -> dict[str, list]:
    """By name, the leaves of the attributes of all modules, beside what every module has."""
    found = {}
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            leaves = pytree.tree_leaves(value)
            known = all(isinstance(leaf, (Tensor, *_PLAIN)) for leaf in leaves)
            if known and (attribute == "training" or attribute not in _OF_ALL_MODULES) and attribute != EXCLUDED:
                leaves = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
                found[f"{name}.{attribute}"] = [*leaves, str(pytree.tree_structure(value))]
    return found


# Two runs of one model give the same bits.
_ALIKE = Tolerance(torch.float64, 1.0)


def _leave_out_what_changes(expected: _Results, again: _Results) -> None:
    """Leaves out of a comparison the attributes that differ between two runs of one model, such as a time."""
    for name in expected.changed | again.changed:
        if _differing(expected.attributes.get(name), again.attributes.get(name)).ratio > 1:
            expected.changed.discard(name)
            expected.unsure.add(name)


def _differing(expected: list | None, actual: list | None, tolerance: Tolerance = _ALIKE) -> Comparison:
    """How much the leaves of two attributes differ."""
    if expected is None or actual is None or len(expected) != len(actual):
        return Comparison(0.0 if expected == actual else math.inf, f"is {_shown(actual)}, and was {_shown(expected)},")
    for pair in zip(expected, actual, strict=True):
        numbers = all(type(one) is float for one in pair)
        tensors = [torch.tensor(one, dtype=torch.float64) for one in pair] if numbers else list(pair)
        if all(isinstance(one, Tensor) for one in tensors):
            comparison = compared(tensors[:1], tensors[1:], tolerance)
            if comparison.ratio > 1:
                return comparison
        elif any(isinstance(one, Tensor) for one in pair) or pair[0] != pair[1]:
            return Comparison(math.inf, f"is {_shown(actual)}, and was {_shown(expected)},")
    return Comparison(0.0, "agrees")


def _shown(leaves: list | None) -> str:
    shown = "missing" if leaves is None else ", ".join(map(str, leaves[:-1]))
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def _twin(model: nn.Module, mode: _Mode, double: bool) -> nn.Module:
    try:
        twin = copy.deepcopy(model)
    except Exception as error:
        raise ValueError(f"the model cannot be copied, and so not verified: {error}") from error
    if double:
        twin.double()
    if not mode.training:
        twin.eval()
    elif not any(module.training for module in twin.modules()):
        twin.train()
    for parameter in twin.parameters():
        parameter.grad = None
    return twin


def _unfuse(model: nn.Module) -> None:
    for module in model.modules():
        if _is_fused(module):
            module.__class__ = type(module)._fusion_base


def _is_fused(module: nn.Module) -> bool:
    return hasattr(type(module), "_fusion_base")


def _fresh(setting: _Setting, mode: _Mode) -> tuple[list[Tensor], Arguments]:
    """Leaves of the graph, and arguments made from them, which unlike leaves may be modified in place."""
    leaves = []

    def fresh(value):
        if not isinstance(value, Tensor):
            return value
        value = value.detach()
        if not value.is_floating_point():
            return value.clone()
        leaf = value.to(torch.float64 if setting.double else value.dtype, copy=True)
        if setting.input_gradients and mode.gradients:
            leaves.append(leaf.requires_grad_())
        return leaf.clone()

    with torch.set_grad_enabled(mode.gradients):
        return leaves, pytree.tree_map(fresh, setting.arguments)


def _shake(tensor: Tensor, noise: torch.Generator) -> None:
    if tensor.is_floating_point() and tensor.layout == torch.strided:
        signs = torch.randint(0, 2, tensor.shape, generator=noise).to(tensor) * 2 - 1
        tensor += tensor * (signs * (_NOISE * torch.finfo(tensor.dtype).eps))


def _backward(outputs: list[Tensor]) -> None:
    """The backward of the sum of all outputs, each value times a random number that is the same in all runs."""
    generator = torch.Generator().manual_seed(SEED)
    outputs = [output for output in outputs if output.is_floating_point() and output.requires_grad]
    weights = [torch.randn(output.shape, generator=generator).to(output) for output in outputs]
    if outputs:
        torch.autograd.backward(outputs, weights)


def _check(model: nn.Module, convert, setting: _Setting, mode: _Mode, expected: _Results) -> None:
    try:
        actual = _run(model, setting, mode, convert)
    except Exception as error:
        module, _ = _first(model, convert, setting, mode, _Scales())
        what = f"{mode.name} raises {type(error).__name__} ({error})"
        raise VerificationError(module, what, "that it did not raise") from error
    if _first_difference(expected, actual, mode, _Scales()) is None:
        return
    scales = _scales(model, setting, mode, expected)
    difference = _first_difference(expected, actual, mode, scales)
    if difference is None:
        if max(scales.forward, scales.gradients) > _MOST.get(_dtype(expected), math.inf):
            raise ValueError(
                f"the results in {mode.name} depend on the rounding of single values too much to be compared: give "
                "example_inputs that are larger or more"
            )
        return
    module, what, how = difference.module, difference.what, difference.how
    if module is None:
        module, first_how = _first(model, convert, setting, mode, scales)
        if first_how is not None:
            what, how = f"output in {mode.name}", first_how
    raise VerificationError(module, what, how)


def _scales(model: nn.Module, setting: _Setting, mode: _Mode, expected: _Results) -> _Scales:
    """What the unconverted model makes of rounding, where that is more than usual for this example."""
    if _dtype(expected) not in _MOST:
        return _Scales()
    noise = torch.Generator().manual_seed(SEED)
    shaken = [_run(model, setting, mode, noise=noise) for _ in range(2)]
    comparisons = [one for run in shaken for one in _comparisons(expected, run, mode) if one.rounds]
    largest = [
        max((comparison.ratio for comparison in comparisons if comparison.gradients == gradients), default=0.0)
        for gradients in (False, True)
    ]
    return _Scales(*(max(1.0, ratio * _MARGIN) for ratio in largest))


def _dtype(results: _Results) -> torch.dtype:
    return coarsest(results.watch.dtypes | {output.dtype for output in results.outputs})


def _first_difference(expected: _Results, actual: _Results, mode: _Mode, scales: _Scales) -> _Compared | None:
    for comparison in _comparisons(expected, actual, mode):
        if comparison.ratio > (scales.gradients if comparison.gradients else scales.forward):
            return comparison
    return None


def _comparisons(expected: _Results, actual: _Results, mode: _Mode) -> Iterator[_Compared]:
    """Outputs, inputs, and buffers in order of execution, then gradients in reverse."""
    dtype = _dtype(expected)
    largest = max([expected.watch.largest, *map(magnitude, expected.outputs)])
    tolerance = Tolerance(dtype, largest)

    def comparison(module, what, before, after, gradients=False):
        result = compared(before, after, tolerance)
        return _Compared(module, f"{what} in {mode.name}", result.how, result.ratio, gradients)

    yield comparison(None, "output", expected.outputs, actual.outputs)
    yield comparison(None, "input after the call", expected.inputs, actual.inputs)
    order = {name: index for index, name in enumerate(expected.watch.order)}
    for name in sorted(expected.buffers | actual.buffers, key=lambda name: _rank(name, order)):
        owner, _, short = name.rpartition(".")
        yield comparison(owner, f"buffer {short}", [expected.buffers.get(name)], [actual.buffers.get(name)])
    for name in sorted(expected.parameters, key=lambda name: _rank(name, order)):
        owner, _, short = name.rpartition(".")
        pair = [expected.parameters[name]], [actual.parameters.get(name)]
        result = compared(*pair, tolerance)
        yield _Compared(owner, f"parameter {short} in {mode.name}", result.how, result.ratio, rounds=False)
    changed = (expected.changed | actual.changed) - expected.unsure
    for name in sorted(changed, key=lambda name: (_rank(name, order), name)):
        owner, _, short = name.rpartition(".")
        result = _differing(expected.attributes.get(name), actual.attributes.get(name), tolerance)
        yield _Compared(owner, f"attribute {short} in {mode.name}", result.how, result.ratio, rounds=False)
    gradients = [*expected.gradients.values(), *expected.input_gradients]
    largest = max((magnitude(gradient) for gradient in gradients if gradient is not None), default=0.0)
    tolerance = Tolerance(dtype, largest, gradients=True)
    for name in sorted(expected.gradients, key=lambda name: _rank(name, order), reverse=True):
        owner, _, short = name.rpartition(".")
        pair = [expected.gradients[name]], [actual.gradients.get(name)]
        yield comparison(owner, f"gradient of parameter {short}", *pair, gradients=True)
    yield comparison("", "gradient of the input", expected.input_gradients, actual.input_gradients, gradients=True)


def _rank(name: str, order: dict[str, int]) -> int:
    """When the module that owns a parameter or buffer completed, or the first around it that was called."""
    while name:
        name = name.rpartition(".")[0]
        if name in order:
            return order[name]
    return len(order)


def _first(model: nn.Module, convert, setting: _Setting, mode: _Mode, scales: _Scales) -> tuple[str, str | None]:
    """The first module to complete with another output, and how it differs; or the innermost that raises."""
    converted = _twin(model, mode, setting.double)
    convert(converted)
    fused = [name for name, module in converted.named_modules() if _is_fused(module)]
    inside = tuple(f"{name}." if name else "" for name in fused)
    unfused = [
        name
        for name, module in converted.named_modules()
        if name not in fused and not (name.startswith(inside) and _may_be_bypassed(module))
    ]
    # A fused module in a fused one may itself be part of an operator of the outer: those last are tried without it.
    outermost = [name for name in fused if not any(name.startswith(f"{other}.") for other in fused if other != name)]
    for names in ({*fused, *unfused}, {*outermost, *unfused}):
        reference = _Watch(keep=True)
        _run(model, setting, mode, watch=reference)
        watch = _Watch(names, expected=reference, scale=scales.forward)
        try:
            _run(model, setting, mode, convert, watch)
        except Exception:
            return (watch.running[-1] if watch.running else ""), None
        if watch.first is not None:
            name, how = watch.first
            around = [other for other in fused if name.startswith(f"{other}." if other else "")]
            if name in fused or not around:
                return name, how
            # This module is the model's own, and what came before it in the fused one differs.
            outer = max(around, key=len)
            return outer, f"(first that of its {name.removeprefix(f'{outer}.')}) {how}"
    return "", None


def _may_be_bypassed(module: nn.Module) -> bool:
    return any(isinstance(part, _BYPASSED) for part in module.modules())


def _seed() -> None:
    torch.default_generator.manual_seed(SEED)
    for accelerator in _accelerators():
        getattr(accelerator, "manual_seed_all", accelerator.manual_seed)(SEED)
    random.seed(SEED)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(SEED)


@contextlib.contextmanager
def _random_states_kept() -> Iterator[None]:
    cpu, python = torch.default_generator.get_state(), random.getstate()
    numpy = sys.modules.get("numpy")
    legacy = None if numpy is None else numpy.random.get_state()
    accelerators = [(accelerator, _states(accelerator)) for accelerator in _accelerators()]
    try:
        yield
    finally:
        torch.default_generator.set_state(cpu)
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(legacy)
        for accelerator, states in accelerators:
            for state in states:
                accelerator.set_rng_state(*state)


def _accelerators() -> list:
    """The modules of torch for kinds of device whose random state is in use: asking others would start them."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return []
    module = torch.get_device_module(accelerator)
    return [module] if getattr(module, "is_initialized", lambda: True)() else []


def _states(accelerator) -> list[tuple]:
    """Arguments for set_rng_state, of each device."""
    if hasattr(accelerator, "get_rng_state_all"):
        return [(state, index) for index, state in enumerate(accelerator.get_rng_state_all())]
    return [(accelerator.get_rng_state(),)]
