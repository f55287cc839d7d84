"""Recomputation of normalized activations: a graph keeps how the output of a fused operator is made, not the output.

A convolution saves its input for its backward. Where that is the output of a fused operator, it can be made again, to
the bit, from tensors that the backward of the operator keeps anyway: its own input and the statistics. Inside
:class:`recompute` torch's saved-tensor hooks see everything that is saved; what they recognize as such an output
becomes a use of its recipe.

    Kept     a tensor that stays, and the version it had: torch checks versions only where there are no hooks
    Packed   what the hooks around ours made of a tensor (``save_on_cpu``, activation checkpointing)
    Recipe   the operator, its operands (each of the three), and its vectors of channels
    _Use     one who will ask for the value of a Packed or a Recipe: a node of the graph, or a recipe above
    _Owner   what keeps a recipe until somebody uses it: among the tensors that the operator itself saved

A value is made when the first use asks for it, stays while others have yet to ask, and at most until the backward
ends: each of them holds it, and the last to let go frees it. Nothing here refers to an output or to a node, so that a
graph is freed by reference counts alone. What is known of a tensor is found on its storage, by weak references. So
there is no finalizer, and no callback of a weak reference: Python would print an interrupt that comes in one of these,
and go on.
"""

import collections
import contextlib
import functools
import math
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from . import layout, streams
from .torch_private import (
    NO_TASK,
    below_autograd,
    graph_task,
    pop_saved_hooks,
    push_saved_hooks,
    saved_hooks_enabled,
    set_tracing_state,
    top_saved_hooks,
    tracing_state,
)

_LIBRARY = torch.ops.resnet_fused

# A chain of recipes no longer than this is made at once and held. Of a longer one the nearest stretch is held, of about
# the square root of its length, and as many anchors to make the others from: each is made twice at most.
HELD_CHAIN = 8

# What ``recompute`` may be beside True and False: that, and convolutions.
CONVOLUTIONS = "convolutions"

COMPILED = "torch.compile decides what is kept and what is made again"


class Kept:
    """A tensor that stays for the backward, with the version that it must still have then."""

    __slots__ = ("__weakref__", "tensor", "version")

    def __init__(self, tensor: Tensor):
        self.tensor = tensor
        self.version = tensor._version

    def take(self) -> Tensor:
        """The tensor.

        Raises:
            RuntimeError: it was changed in place; torch's own error, in its words.
        """
        version = self.tensor._version
        if version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"[{self.tensor.type()} {list(self.tensor.shape)}] is at version {version}; expected version "
                f"{self.version} instead. Hint: enable anomaly detection to find the operation that failed to compute "
                "its gradient, with torch.autograd.set_detect_anomaly(True)."
            )
        return self.tensor


class _Use:
    """One who asks for a value, in each backward once; ``view`` is size, stride and offset of a part of it."""

    __slots__ = ("__weakref__", "held", "source", "view")

    def __init__(self, source: "_Shared", view: tuple | None = None):
        self.source = source
        self.view = view
        self.held: _Held | None = None
        source.uses.add(weakref.ref(self))

    def take(self) -> Tensor:
        """The value."""
        return self.viewed(self.source.value())

    def viewed(self, value: Tensor) -> Tensor:
        """The use's part of the value, which it holds no longer."""
        self.held = None
        return value if self.view is None else value.as_strided(*self.view)


class _Held:
    """A value that was made, for the uses that hold this; and behind which stream."""

    __slots__ = ("__weakref__", "stream", "value")

    def __init__(self, value: Tensor):
        self.value: Tensor | None = value
        self.stream = streams.current(value)


class _Shared:
    """A value with several uses, made for the first of them."""

    __slots__ = ("__weakref__", "held", "outer", "uses")

    def __init__(self, outer: tuple[Callable, Callable] | None):
        self.outer = outer
        self.uses: set[weakref.ref[_Use]] = set()
        self.held: weakref.ref[_Held] | None = None

    def value(self) -> Tensor:
        raise NotImplementedError

    def at_hand(self) -> Tensor | None:
        """The value where it need not be made."""
        held = None if self.held is None else self.held()
        value = None if held is None else held.value
        return None if value is None else streams.handed(value, held.stream)

    def hold(self, value: Tensor) -> None:
        """Keeps a value until all present uses are served, outside of a backward not at all."""
        uses = []
        for reference in tuple(self.uses):  # another thread may add some
            use = reference()
            if use is None:
                self.uses.discard(reference)
            else:
                uses.append(use)
        if len(uses) <= 1 or graph_task() == NO_TASK:
            return  # the one who asked has it
        held = _Held(value)
        reference = self.held = weakref.ref(held)

        def end_of_backward():
            held = reference()
            if held is not None:
                held.value = None

        # A backward of a part of the graph serves a part of the uses.
        torch.autograd.Variable._execution_engine.queue_callback(end_of_backward)
        for use in uses:
            use.held = held


class Packed(_Shared):
    """What the hooks around ours made of a tensor. A backward asks them for it once: checkpointing insists on that."""

    __slots__ = ("packed",)

    def __init__(self, tensor: Tensor, outer: tuple[Callable, Callable]):
        super().__init__(outer)
        self.packed = outer[0](tensor)

    def value(self) -> Tensor:
        """The tensor, from the hooks or from the last time they were asked."""
        value = self.at_hand()
        if value is None:
            value = self.outer[1](self.packed)
            self.hold(value)
        return value


class Recipe(_Shared):
    """How the output of a fused operator is made.

    Attributes:
        run: makes it from the operands and the vectors; ``is_large`` where it is made once more for its own use rather
            than held since it was made for a value above.
        operands, vectors: what it is made of, each None, a Kept or a use of something else.
        strides: of the first operand, whose layout the output takes over, and of the output.
        stream: that it ran on, as those who made the operands and the vectors, or behind them.
        version: of the output, when it is what the recipe makes.
        thinned: whether it was made for a long chain and not held, so that it stands between two anchors.
    """

    __slots__ = ("dtype", "operands", "output", "run", "stream", "strides", "thinned", "vectors", "version")

    def __init__(self, output: Tensor, outer, run: Callable, operands: tuple, vectors: tuple, strides: tuple[int, ...]):
        super().__init__(outer)
        self.run, self.operands, self.vectors, self.strides = run, operands, vectors, (strides, output.stride())
        self.dtype, self.version = output.dtype, output._version
        self.stream = streams.current(output)
        self.thinned = False
        self.output = weakref.ref(output)
        output.untyped_storage()._resnet_fused_recipe = weakref.ref(self)

    def at_hand(self) -> Tensor | None:
        """The value where it need not be made: held, or the output itself, which somebody else keeps."""
        value = super().at_hand()
        if value is not None:
            return value
        output = self.output()
        if output is None:
            return None
        output._fix_weakref()
        return streams.handed(output.detach(), self.stream) if output._version == self.version else None

    def value(self) -> Tensor:
        """The value, at hand or made."""
        value = self.at_hand()
        return _make(self) if value is None else value

    def below(self):
        """The recipes that this one is made of, the residual first: of a chain of blocks, each main branch is then made
        when the block below it is there, and not all of them on the way down.
        """
        for operand in reversed(self.operands):
            if type(operand) is _Use and type(operand.source) is Recipe:
                yield operand.source

    def make(self, made: dict["Recipe", Tensor]) -> Tensor:
        """The value, of operands among those ``made`` where they are recipes."""
        operands = []
        for operand in self.operands:
            if type(operand) is _Use and operand.source in made:
                operands.append(operand.viewed(made[operand.source]))
            else:
                operands.append(self._taken(operand))
        operands[0] = layout.restored(operands[0], self.strides[0])
        vectors = [self._taken(vector) for vector in self.vectors]
        with torch.no_grad(), below_autograd():
            # A weight that hooks gave back in another layout may give a convolution's output another.
            return layout.restored(self.run(operands, vectors), self.strides[1])

    def _taken(self, link: Kept | _Use | None) -> Tensor | None:
        return None if link is None else streams.handed(link.take(), self.stream)


def _make(target: Recipe) -> Tensor:
    """Makes a recipe and what it is made of, from the bottom up: a network may have hundreds of blocks in a row."""
    stack, made = [target], {}
    longest, all_held = 0, target.thinned
    while True:
        recipe = stack[-1]
        for below in recipe.below():
            if below not in made:
                value = below.at_hand()
                if value is None:
                    stack.append(below)
                    break
                made[below] = value
        else:
            longest = max(longest, len(stack))
            stack.pop()
            value = recipe.make(made)
            for below in recipe.below():
                made.pop(below, None)
            # What is unpacked twice in a backward, checkpointing refuses.
            recipe.thinned = not (all_held or recipe.outer is not None or _is_held(len(stack), longest))
            # Large ones straight after one another would be made for each above, so that their number is squared.
            made_once_more = recipe.run.is_large and stack and not stack[-1].run.is_large and recipe.outer is None
            if not (recipe.thinned or made_once_more):
                recipe.hold(value)
            if not stack:
                return value
            made[recipe] = value


def _is_held(above: int, longest: int) -> bool:
    """Whether others find a value of a chain, or make it again; ``above`` are yet to be made of it."""
    stretch = 1 if longest <= HELD_CHAIN else math.isqrt(longest)
    return above < stretch or above % stretch == 0


class _Owner:
    """A tensor that an operator saves for its own backward, and the recipe of its output.

    So the recipe lives as long as the operator can run backward, and no longer for an output that somebody keeps.
    """

    __slots__ = ("kept", "recipe")

    def __init__(self, kept: Kept | _Use, recipe: Recipe):
        self.kept = kept
        self.recipe = recipe

    def take(self) -> Tensor:
        """The tensor."""
        return self.kept.take()


def recipe_of(tensor: Tensor, outer: tuple[Callable, Callable] | None) -> Recipe | None:
    """The recipe of the output that ``tensor`` is or is a view of, unless somebody has written to it."""
    reference = getattr(tensor.untyped_storage(), "_resnet_fused_recipe", None)
    recipe = None if reference is None else reference()
    if recipe is None or recipe.version != tensor._version or recipe.dtype != tensor.dtype:
        return None
    if tensor.is_conj() or tensor.is_neg():
        return None  # its values are not those in memory
    # What was packed inside checkpointing, say, is not asked for outside of it.
    return recipe if _identity(recipe.outer) == _identity(outer) else None


def _identity(outer) -> int:
    """Of hooks, as long as they are there: whoever holds what they packed holds them."""
    return 0 if outer is None else id(outer[0])


def _key(tensor: Tensor, outer) -> tuple:
    view = tensor.size(), tensor.stride(), tensor.storage_offset()
    return _identity(outer), tensor._version, tensor.dtype, tensor.is_conj(), tensor.is_neg(), view


def _link(tensor: Tensor | None, outer, keep: bool = True):
    """What stands for a tensor in a graph; without ``keep`` None for one that nothing else keeps."""
    if tensor is None:
        return None
    recipe = recipe_of(tensor, outer)
    if recipe is not None:
        return _Use(recipe, (tensor.size(), tensor.stride(), tensor.storage_offset()))
    # What stands for the tensors of a storage; of a weight's, of each step anew.
    known = tensor.untyped_storage().__dict__.setdefault("_resnet_fused_kept", {})
    key = _key(tensor, outer)
    reference = known.get(key)
    kept = None if reference is None else reference()
    if kept is None:
        if not keep:
            return None
        # Detached: it may be the output of the node that saves it, whose graph would then keep itself.
        tensor = tensor.detach()
        kept = Kept(tensor) if outer is None else Packed(tensor, outer)
        for other, reference in tuple(known.items()):
            if reference() is None:
                known.pop(other, None)
        known[key] = weakref.ref(kept)
    return kept if type(kept) is Kept else _Use(kept)


def _source(link: Kept | _Use):
    return link.source if type(link) is _Use else link


class Scope:
    """Our hooks inside one :class:`recompute`; ``outer`` are those around it, who pack what stays.

    ``pending`` is what an operator is about to save for itself, and the recipe that it shall own. ``convolutions`` are
    the recipes of the last ones, which live on with whoever saves their outputs.
    """

    __slots__ = ("convolutions", "outer", "pending", "watches_convolutions")

    def __init__(self, outer: tuple[Callable, Callable] | None):
        self.outer = outer
        self.pending: tuple[Kept | Packed, Recipe] | None = None
        # Of a block's end and of its projection shortcut, before an operator takes both.
        self.convolutions: collections.deque[Recipe] = collections.deque(maxlen=4)
        self.watches_convolutions = False

    def pack(self, tensor: Tensor):
        """What stands in a graph for a tensor that is saved."""
        tracing = tracing_state()
        if tracing is not None:
            # torch.jit.trace would record what is done with the tensor here.
            set_tracing_state(None)
            try:
                return self.pack(tensor)
            finally:
                set_tracing_state(tracing)
        try:
            link = _link(tensor, self.outer)
            if self.pending is None or _source(link) is not self.pending[0]:
                return link
            (_, recipe), self.pending = self.pending, None
            return _Owner(link, recipe)
        except (NotImplementedError, RuntimeError):
            if _has_storage(tensor):
                raise
        tensor = tensor.detach()
        return Kept(tensor) if self.outer is None else _Use(_Opaque(tensor, self.outer))


class _Opaque(Packed):
    """A tensor that has no storage of its own, for the hooks around ours."""

    __slots__ = ()

    def __init__(self, tensor: Tensor, outer: tuple[Callable, Callable]):
        _Shared.__init__(self, outer)
        self.packed = outer[0](tensor)


def _has_storage(tensor: Tensor) -> bool:
    """Not so a sparse tensor, nor one of functorch's."""
    try:
        tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return False
    return True


def _unpack(packed) -> Tensor:
    return packed.take()


def _scope() -> Scope | None:
    """The innermost hooks of this thread, where they are ours."""
    hooks = top_saved_hooks(False)
    scope = None if hooks is None else getattr(hooks[0], "__self__", None)
    return scope if type(scope) is Scope else None


def is_on() -> bool:
    """Whether the output of a fused operator that runs here and now is recomputed. Inside other hooks it is not."""
    return not torch.compiler.is_compiling() and _scope() is not None


def why_not() -> str | None:
    """Why nothing is recomputed of what runs here and now; None where it is, or would be inside :class:`recompute`."""
    if torch.compiler.is_compiling():
        return COMPILED
    if tracing_state() is not None:
        return "torch.jit.trace records"
    if not saved_hooks_enabled():
        return "saved-tensor hooks are disabled here"
    return None


def checked(recompute: bool | str) -> bool | str:
    """What blocks and :func:`resnet_fused.fuse` take.

    Raises:
        ValueError: it is something else.
    """
    if recompute not in (True, False, CONVOLUTIONS):
        raise ValueError(f"recompute must be True, False or {CONVOLUTIONS!r}, got {recompute!r}")
    return recompute


class recompute(contextlib.ContextDecorator):
    """Inside, the outputs of fused operators are not kept for the backward of who uses them, but made again there.

    For a forward of your own with :class:`~resnet_fused.BatchNormAddReLU2d` or the functional operators. The results
    and gradients are the same to the bit; of a residual network about half of the activations are no longer kept. The
    convolutions that use an output must run inside too. Applies to the thread it is entered in; may be nested and
    repeated, and does nothing under torch.compile, which decides on its own.

    Args:
        enabled: False for a context that changes nothing.
        convolutions: whether 1x1 convolutions whose output is larger than their input run again too, such as the last
            one of a bottleneck. Their outputs are two thirds of what a bottleneck keeps otherwise. Each runs again
            twice in a chain of up to 6 blocks, and three times at most in a longer one. Its weight must not change
            before the backward, also where autocast made a cast of it. Where convolutions are not deterministic (some
            of cuDNN's are not), neither is what they make again.

    Example:
        >>> with resnet_fused.recompute():
        ...     loss = model(images).sum()
        >>> loss.backward()
    """

    def __init__(self, enabled: bool = True, *, convolutions: bool = False):
        self.enabled = enabled
        self.convolutions = convolutions
        self._entered: list[tuple[bool, contextlib.AbstractContextManager | None]] = []

    @classmethod
    def as_asked(cls, recompute: bool | str) -> "recompute":
        """The context for the ``recompute`` of a block or of :func:`resnet_fused.fuse`."""
        return cls(bool(checked(recompute)), convolutions=recompute == CONVOLUTIONS)

    def _recreate_cm(self) -> "recompute":
        # A decorated function may be called in several threads at once.
        return recompute(self.enabled, convolutions=self.convolutions)

    def __enter__(self) -> "recompute":
        if torch.compiler.is_compiling():
            return self
        wanted = self.enabled and why_not() is None and _scope() is None
        if wanted:
            push_saved_hooks(Scope(top_saved_hooks(False)).pack, _unpack)
        self._entered.append((wanted, self._watched_convolutions()))
        return self

    def _watched_convolutions(self) -> contextlib.AbstractContextManager | None:
        scope = _scope()
        if not (self.enabled and self.convolutions) or scope is None or scope.watches_convolutions:
            return None
        from .recomputed_convolutions import RecomputedConvolutions

        watching = contextlib.ExitStack()
        watching.enter_context(RecomputedConvolutions(functools.partial(note_convolution, scope)))
        watching.callback(scope.convolutions.clear)
        watching.callback(setattr, scope, "watches_convolutions", False)
        scope.watches_convolutions = True
        return watching

    def __exit__(self, *exception) -> None:
        if torch.compiler.is_compiling():
            return
        hooks, watching = self._entered.pop()
        if watching is not None:
            watching.__exit__(*exception)
        if hooks:
            pop_saved_hooks()


# The recipes. Each of these is called by the operator of its name, before autograd saves the tensors given to it. ----


def _note(output: Tensor, operands: tuple, vectors: tuple, run: Callable) -> None:
    scope = _scope()
    if scope is None:
        return
    outer = scope.outer
    input, second = operands
    links = [_link(input, outer), None]
    if second is not None:
        # The operator keeps no residual. Where nobody else does either, its recipe saves nothing.
        links[1] = _link(second, outer, keep=run.keeps_both)
        if links[1] is None:
            return
    # Copies of weights: a later block may make this output when FSDP has freed the parameters of this one again. That
    # nobody has changed them the operator's own backward checks.
    vectors = tuple(_link(_copied(v) if i % 4 == 0 else v, outer) for i, v in enumerate(vectors))
    recipe = Recipe(output, outer, run, tuple(links), vectors, input.stride())
    # The last vector of the first branch is this call's own, and the operator is about to save it.
    scope.pending = _source(vectors[3]), recipe


def _copied(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.detach().clone()


def note_convolution(scope: Scope, output, input, weight, bias, run: Callable) -> None:
    """The output of a convolution, which ``run`` makes of (input, None) and (weight, bias).

    The bias is copied: no backward refuses one that was changed.
    """
    outer = scope.outer
    links = _link(input, outer), None
    vectors = _link(weight, outer), _link(_copied(bias), outer)
    scope.convolutions.append(Recipe(output, outer, run, links, vectors, input.stride()))


class _Run:
    """An operator with its settings, which makes its output of statistics that are known."""

    __slots__ = ("settings",)
    keeps_both = False
    is_large = False

    def __init__(self, *settings):
        self.settings = settings


class _Apply(_Run):
    __slots__ = ()

    def __call__(self, operands, vectors):
        (input, residual), (weight, bias, mean, invstd) = operands, vectors
        op = _LIBRARY.batch_norm_add_relu_apply.default
        return op(input, weight, bias, residual, mean, invstd, *self.settings, False)[0]


class _Eval(_Run):
    __slots__ = ()

    def __call__(self, operands, vectors):
        (input, residual), (weight, bias, mean, var) = operands, vectors
        op = _LIBRARY.batch_norm_add_relu_eval.default
        return op(input, weight, bias, residual, mean, var, *self.settings, False)[0]


class _DualApply(_Run):
    """Evaluation with scales in place of weights and a variance of one: scale / sqrt(1 + 0) is the scale."""

    __slots__ = ()
    keeps_both = True

    def __call__(self, operands, vectors):
        (input, input2), (weight, bias, mean, invstd, weight2, bias2, mean2, invstd2) = operands, vectors
        one = torch.ones_like(invstd)
        first, second = _scale(weight, invstd), _scale(weight2, invstd2)
        bias, bias2 = (None if b is None else b.to(invstd.dtype) for b in (bias, bias2))
        op = _LIBRARY.dual_batch_norm_add_relu_eval.default
        return op(input, first, bias, mean, one, input2, second, bias2, mean2, one, 0.0, 0.0, *self.settings, False)[0]


class _DualEval(_Run):
    __slots__ = ()
    keeps_both = True

    def __call__(self, operands, vectors):
        op = _LIBRARY.dual_batch_norm_add_relu_eval.default
        return op(operands[0], *vectors[:4], operands[1], *vectors[4:], *self.settings, False)[0]


def _scale(weight: Tensor | None, invstd: Tensor) -> Tensor:
    """As the kernels compute it: the product in the dtype of the statistics."""
    return invstd if weight is None else weight.to(invstd.dtype) * invstd


def note_train(output, input, weight, bias, residual, mean, invstd, relu) -> None:
    """The output of a training forward. ``bias`` is a copy: no backward refuses a bias that was changed."""
    _note(output, (input, residual), (weight, bias, mean, invstd), _Apply(relu))


def note_eval(output, input, weight, bias, residual, running_mean, running_var, eps, relu) -> None:
    """The output of an evaluation; bias and statistics are copies."""
    _note(output, (input, residual), (weight, bias, running_mean, running_var), _Eval(eps, relu))


def note_dual_train(output, branch, branch2, relu) -> None:
    """The output of two branches in training: input, weight, bias, mean and invstd of each."""
    _note(output, (branch[0], branch2[0]), (*branch[1:], *branch2[1:]), _DualApply(relu))


def note_dual_eval(output, branch, branch2, eps, eps2, relu) -> None:
    """The output of two branches in evaluation: input, weight, bias, running mean and variance of each."""
    _note(output, (branch[0], branch2[0]), (*branch[1:], *branch2[1:]), _DualEval(eps, eps2, relu))
