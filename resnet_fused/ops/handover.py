"""A residual's gradient, handed to the node that made the residual without a pass of its own.

The output of a block is used twice by the next one: by its first convolution, and as the residual of its end. autograd
adds the two gradients in a pass of its own, which reads both and writes one. Here the end of the next block leaves the
residual's gradient with the node that made the residual, and returns none for it; that node adds the two as it reads
them. The forward knows nothing of it, and tensors and graph are what they are without.

What autograd brings to that node is then a part of the gradient, which nobody may see. So it is decided in each
backward, and nothing is handed over where somebody looks, or may look:

- a hook on the tensor (``register_hook``, ``retain_grad``), on its node, or on the node that would hand over. The nodes
  see every registration from Python, since they are objects of a class of ours;
- a backward that gives gradients of chosen tensors (``torch.autograd.grad``, ``backward(inputs=...)``). The engine
  tells by the node of a weight, which each of these leaves out, or refuses;
- a graph of the gradient (``create_graph``), or a backward that torch.compile runs.

What Python does not see is a hook that an extension in C++ registers on the tensor or on its node: it would be given a
part. So this is off unless ``RESNET_FUSED_HANDOVER=1`` asks for it.
"""

import os
import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from . import streams
from .torch_private import fix_weakref, graph_task, will_run

ENABLED = os.environ.get("RESNET_FUSED_HANDOVER") == "1"


class _Given(NamedTuple):
    """A gradient that waits for its node: in which backward, and behind which stream of its device."""

    task: int
    gradient: Tensor
    stream: torch.Stream | None


class Node:
    """First base of the nodes of our operators, which note who looks at gradients of theirs."""

    is_watched = False
    given: _Given | None = None
    output: weakref.ref | None = None

    def register_hook(self, hook):
        """As of any node; the hook sees what went in and came out."""
        self._watch()
        return super().register_hook(hook)

    def register_prehook(self, hook):
        """As of any node; the hook sees what goes in."""
        self._watch()
        return super().register_prehook(hook)

    def _watch(self) -> None:
        self.is_watched = True
        if self.given is not None:  # in the midst of a backward
            super().register_prehook(lambda gradients: (self._whole(gradients[0]), *gradients[1:]))

    def _register_hook_dict(self, tensor: Tensor):
        """The first hook on the output: called by ``Tensor.register_hook`` before the hook is there."""
        self.is_watched = True
        if self.given is not None:
            tensor._backward_hooks["before all others"] = self._whole
        return super()._register_hook_dict(tensor)

    def _whole(self, gradient: Tensor | None) -> Tensor | None:
        given = taken(self)
        return given if gradient is None else gradient if given is None else gradient + given


def through(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """The function, whose nodes take part."""
    base = function._backward_cls
    function._backward_cls = type(base.__name__, (Node, base), {"__module__": base.__module__})
    return function


def begin(node: Node, output: Tensor) -> None:
    """Called in the forward of a node, with its output. Its backward then gets None where there is no gradient."""
    if not ENABLED:
        return
    node.set_materialize_grads(False)
    node.output = weakref.ref(output)


def give(node, edge: int, weight: int, gradient: Tensor) -> bool:
    """Leaves a gradient with the node at that edge of ``node``, which runs; False where autograd is to have it.

    Args:
        node: the context of an operator in its backward.
        edge: the gradient's place among those of the tensors that the operator was called with.
        weight: that of a parameter. Without one whose gradient is asked for nobody knows what the backward is for.
    """
    if not ENABLED or torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    if not isinstance(node, Node) or node.is_watched:
        return False
    task = graph_task()
    if task == -1:
        return False
    edges = node.next_functions
    taker, place = edges[edge]
    if not isinstance(taker, Node) or place != 0 or taker.output is None or taker.is_watched or taker.given is not None:
        return False
    if _is_looked_at(taker) or not _brings_all(edges[weight][0]) or not will_run(taker):
        return False
    mine = _Given(task, gradient, streams.current(gradient))
    # Two threads may run backward through one graph.
    return taker.__dict__.setdefault("given", mine) is mine


def taken(node) -> Tensor | None:
    """The gradient that was left with ``node`` in this backward."""
    given = getattr(node, "given", None)
    if given is None or given.task != graph_task():
        return None  # it may be of another thread, or of a backward that failed; then nothing is left here again
    del node.given
    return streams.handed(given.gradient, given.stream)


def both(node, grad_output: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The gradient of the output of ``node``, in two parts where one was left with it."""
    if not ENABLED:
        return grad_output, None
    second = taken(node)
    if second is None or grad_output is None:
        return (second if grad_output is None else grad_output), None
    output = _output(node)
    if output is not None and output.retains_grad and output.grad is not None:
        output.grad += second  # asked for in the midst of a backward, after its first part was under way
    return grad_output, second


def _brings_all(leaf) -> bool:
    """Whether this backward is ``backward()``, from a leaf of the graph: gradients of chosen tensors would be all but
    that of the leaf, or would have the engine refuse the question.

    ``backward(inputs=...)`` with the leaf among them passes; what else it chooses retains its gradient.
    """
    if type(leaf).__name__ != "AccumulateGrad":
        return False
    try:
        return will_run(leaf)
    except RuntimeError:
        return False


def _is_looked_at(node: Node) -> bool:
    output = _output(node)
    return output is not None and (output.retains_grad or output._backward_hooks is not None)


def _output(node: Node) -> Tensor | None:
    output = None if node.output is None else node.output()
    if output is not None:
        fix_weakref(output)
    return output
