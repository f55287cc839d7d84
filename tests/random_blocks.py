"""Writes residual blocks as Python source, in the styles of people, for test_conversion_random.py."""

import contextlib
import random
from collections.abc import Callable

CHANNELS = 4
HEAD = """
import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0
        self.features = None
"""
RELU = [
    "self.relu({})",
    "self.relu_in({})",
    "F.relu({})",
    "F.relu({}, inplace=True)",
    "F.relu({}, True)",
    "torch.relu({})",
    "torch.relu_({})",
    "({}).relu()",
    "({}).relu_()",
    "self.act({})",
]
OTHERS = ["F.relu6({})", "F.silu({})", "self.leaky({})", "self.six({})", "F.leaky_relu({}, 0.1)", "torch.sigmoid({})"]
AROUND = [
    "with torch.no_grad():",
    "with torch.enable_grad():",
    "if x.dim() == 4:",
    "for _ in range(1):",
    "try:",
    "if self.calls < 1000:",
]
EARLY = [
    "if x.shape[0] == 3:",
    "if x.shape[1] != 4:",
    "if self.training:",
    "if not self.training:",
    "if not torch.is_grad_enabled():",
    "if x.requires_grad:",
]
BATCH_NORM = [
    "",
    "",
    "",
    ", affine=False",
    ", momentum=None",
    ", track_running_stats=False",
    ", eps=1e-3, momentum=0.3",
]


class Choices:
    """The choices of one block, by number: those of a seed, or the plain one where ``plain`` says so."""

    def __init__(self, seed, plain=frozenset()):
        self.random, self.plain, self.made = random.Random(seed), plain, 0
        # Some blocks are plain but for one or two things, which elsewhere would hide one another.
        self.calm = self.random.choice([0, 0, 0.5, 0.85])

    def below(self, n):
        choice, calm = self.random.randrange(n), self.random.random() < self.calm
        self.made += 1
        return 0 if calm or self.made - 1 in self.plain else choice


class Writer:
    """One block; of all options the plain one comes first."""

    def __init__(self, choices):
        self.below = choices.below
        self.init, self.methods, self.lines = [], [], []
        self.level, self.count = 2, 0
        self.convs, self.bns, self.frozen = [], [], []
        # Variables that hold a tensor of the block's shape, and statements to come later on.
        self.variables, self.waiting = [], []
        self.listed = self.rectifies = False

    def choose(self, *options):
        return options[self.below(len(options))]

    def one_in(self, n):
        return self.below(n) == n - 1

    def name(self, prefix):
        self.count += 1
        return f"{prefix}{self.count}"

    def line(self, text):
        self.lines.append("    " * self.level + text)

    @contextlib.contextmanager
    def inside(self, head):
        self.line(head)
        self.level += 1
        before = len(self.lines)
        yield
        if len(self.lines) == before:
            self.line("pass")
        self.level -= 1
        if head == "try:":
            self.line("finally:")
            self.line("    self.calls += 1")

    @contextlib.contextmanager
    def maybe_inside(self):
        with self.inside(self.choose(*AROUND)) if self.one_in(6) else contextlib.nullcontext():
            yield

    def member(self, prefix, constructor):
        name = self.name(prefix)
        self.init.append(f"self.{name} = {constructor}")
        return f"self.{name}"

    def conv(self):
        if self.convs and self.one_in(10):
            return self.choose(*self.convs)
        size = self.choose("3, padding=1", "1", "3, padding=1, bias=False")
        self.convs.append(self.member("conv", f"nn.Conv2d({CHANNELS}, {CHANNELS}, {size})"))
        return self.convs[-1]

    def bn(self):
        if self.bns and self.one_in(8):
            return self.choose(*self.bns)
        self.bns.append(self.member("bn", f"nn.BatchNorm2d({CHANNELS}{self.choose(*BATCH_NORM)})"))
        if self.one_in(8):
            self.frozen.append(self.bns[-1])
        return self.bns[-1]

    def relu(self, value):
        if self.one_in(8):
            return self.choose(*OTHERS).format(value)
        if self.one_in(6):
            return f"{self.member('relu', self.choose('nn.ReLU()', 'nn.ReLU(inplace=True)'))}({value})"
        return self.choose(*RELU).format(value)

    def assigned(self, value, more=True):
        """A variable with this value, which may be used for something else too."""
        if value in self.variables and not self.one_in(6):
            return value
        name = self.choose("out", "y", self.name("t"))
        if self.one_in(10):
            self.line(f"if ({name} := {value}) is None:")
            self.line("    return x")
        else:
            self.line(f"{name}{self.choose('', '', ': torch.Tensor')} = {value}")
        self.variables.append(name)
        if more and self.one_in(5):
            self.use(name)
        return name

    def use(self, name):
        use = self.choose("list", "dict", "attribute", "alias", "view", "value")
        if use == "list":
            self.listed = True
            self.line(f"kept.append({name})")
        elif use == "dict":
            self.listed = True
            self.line(f"named['{name}'] = {name}")
        elif use == "attribute":
            self.line(f"self.features = {name}")
        else:
            other = self.name("v")
            value = {"alias": name, "view": f"{name}[:, :, :]", "value": f"{name} * 0.5"}[use]
            self.line(f"{other} = {value}")
            self.variables.append(other)

    def maybe_assigned(self, value):
        return value if self.one_in(2) or value in self.variables else self.assigned(value)

    def piece(self, value, order):
        """The value after what ``order`` names."""
        for kind in order:
            if kind == "conv":
                value = f"{self.conv()}({value})"
                if self.waiting and self.one_in(2):
                    value = self.assigned(value)
                    self.emit_waiting()
            elif kind == "bn":
                value = f"{self.bn()}({value})"
            elif kind == "relu":
                value = self.rectified(value)
            elif kind == "se":
                value = self.assigned(value)
                value = f"{value} * torch.sigmoid({value}.mean((2, 3), keepdim=True))"
            elif kind == "drop":
                value = f"{self.member('drop', self.choose('nn.Identity()', 'nn.Dropout(0.0)'))}({value})"
            value = self.maybe_assigned(value)
        return value

    def rectified(self, value):
        """The activation, called in one of many ways."""
        way = self.choose("plain", "plain", "plain", "plain", "plain", "lambda", "list", "either", "method", "nested")
        if way == "plain":
            return self.relu(value)
        if way == "lambda":
            return f"(lambda value: {self.relu('value')})({value})"
        if way == "list":
            return f"[{self.relu('value')} for value in [{value}]][0]"
        value = self.assigned(value)
        if way == "either":
            condition = self.choose("self.training", "x.shape[0] > 2", "True")
            return f"({self.relu(value)} if {condition} else {self.relu(value)})"
        name = self.name("activate")
        if way == "method":
            self.methods += [f"    def {name}(self, value, scale=1.0):", f"        return {self.relu('value')}"]
            return f"self.{name}({value})"
        captured = self.choose("value", f"(value + {value})")
        self.line(f"def {name}(value):")
        self.line(f"    return {self.relu(captured)}")
        return f"{name}({value})"

    def orders(self):
        count = self.choose(2, 1, 3, 4)
        style = self.choose("after", "after", "before", "any")
        if style == "after":
            return [["conv", "bn", "relu"]] * (count - 1) + [["conv", "bn"]]
        if style == "before":
            return [["bn", "relu", "conv"]] * count
        some = (
            ["conv", "bn", "relu"],
            ["bn", "relu", "conv"],
            ["conv", "bn", "drop", "relu"],
            ["conv", "bn", "se", "relu"],
            ["conv", "relu", "bn"],
            ["conv", "bn"],
            ["bn", "bn", "relu"],
            ["conv", "bn", "se"],
        )
        return [list(self.choose(*some)) for _ in range(count)]

    def main(self):
        form = self.choose("chain", "chain", "chain", "loop", "method", "nested", "sequential")
        if form == "chain":
            value = "x"
            for order in self.orders():
                with self.maybe_inside():
                    value = self.assigned(self.piece(value, order))
            return value
        if form == "loop":
            count = 1 + self.below(3)
            self.init.append(f"self.convs = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range({count}))")
            self.init.append(f"self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range({count}))")
            self.line("out = x")
            with self.inside("for conv, bn in zip(self.convs, self.norms):"):
                self.line(f"out = {self.rectified('bn(conv(out))')}")
            self.variables.append("out")
            return "out"
        if form == "sequential":
            parts = ["nn.Conv2d(4, 4, 3, padding=1)", "nn.BatchNorm2d(4)", "nn.ReLU(inplace=True)"]
            body = self.member("body", f"nn.Sequential({', '.join((parts * 2)[: 2 + self.below(5)])})")
            return self.maybe_assigned(f"{body}(x)")
        # A method or a function of its own has its own lines and variables.
        name = self.name("branch")
        outer = self.lines, self.level, self.variables, self.waiting, self.listed
        self.lines, self.level, self.variables, self.waiting = [], 2 if form == "method" else 3, [], []
        value = "x"
        for order in self.orders():
            value = self.piece(value, order)
        self.line(f"return {value}")
        if self.listed:
            self.lines.insert(0, "    " * self.level + "kept, named = [], {}")
        lines = self.lines
        self.lines, self.level, self.variables, self.waiting, self.listed = outer
        if form == "method":
            self.methods += [f"    def {name}(self, x, *, scale=1.0):", *lines]
            return self.maybe_assigned(f"self.{name}(x)")
        self.line(f"def {name}(x):")
        self.lines += lines
        return self.maybe_assigned(f"{name}(x)")

    def projection(self):
        # A member too at times, for the main branch to use again.
        bn = self.bn() if self.one_in(4) else f"nn.BatchNorm2d(4{self.choose(*BATCH_NORM)})"
        conv = "nn.Conv2d(4, 4, 1, bias=False)"
        parts = self.choose(
            f"{conv}, {bn}", f"nn.AvgPool2d(3, 1, 1), {conv}, {bn}", bn, conv, f"{conv}, {bn}, nn.ReLU()"
        )
        return self.member("downsample", f"nn.Sequential({parts})")

    def shortcut(self):
        """Statements that give the shortcut, and the expression that it is then."""
        form = self.choose("x", "identity", "projection", "projection", "none", "either", "bn", "explicit")
        if form == "x":
            return [], "x"
        if form == "identity":
            return ["identity = x"], "identity"
        if form == "bn":
            return [], f"{self.bn()}(x)"
        if form == "explicit":
            return [f"identity = {self.conv()}(x)", f"identity = {self.bn()}(identity)"], "identity"
        downsample = self.projection()
        if form == "projection":
            return [], f"{downsample}(x)"
        if self.one_in(2):
            self.init.append(f"{downsample} = None")
        if form == "either":
            return [f"identity = x if {downsample} is None else {downsample}(x)"], "identity"
        return ["identity = x", f"if {downsample} is not None:", f"    identity = {downsample}(x)"], "identity"

    def emit_waiting(self):
        for text in self.waiting:
            self.line(text)
        self.waiting = []

    def added(self, out, shortcut):
        form = self.choose(
            "{out} + {shortcut}",
            "{out} += {shortcut}",
            "{shortcut} + {out}",
            "{shortcut} += {out}",
            "torch.add({out}, {shortcut})",
            "({out}).add_({shortcut})",
            "({out}).add({shortcut})",
            "({shortcut}).add_({out})",
            "torch.add({out}, {shortcut}, alpha=0.5)",
            "torch.add(input={shortcut}, other={out})",
            "sum([{out}, {shortcut}])",
            "{out} - {shortcut}",
        )
        if "+=" not in form:
            return form.format(out=out, shortcut=shortcut)
        target, value = (out, shortcut) if form.startswith("{out}") else (shortcut, out)
        if not target.isidentifier():
            target = self.assigned(target)
        self.line(f"{target} += {value}")
        return target

    def early(self):
        if self.one_in(6):
            self.line(self.choose(*EARLY))
            value = self.choose("x * 2", f"{self.bn()}(x)", "plain")
            self.line(f"    return {self.relu(f'{self.bn()}(x)') if value == 'plain' else value}")
        if self.one_in(8):
            self.line(f"x = {self.choose('F.relu(x, inplace=True)', 'self.relu_in(x)', 'F.relu(x)', 'x.relu_()')}")

    def tail(self, value):
        guarded = self.one_in(8)
        if guarded:
            value = self.assigned(value)
            self.rectifies = True
            with self.inside("if rectify:"):
                self.line(f"{value} = {self.relu(value)}")
        elif not self.one_in(6):
            value = self.rectified(self.piece(value, ["drop"] if self.one_in(8) else []))
        form = self.choose("value", "value", "value", "reuse", "tuple", "dict", "all", "delete", "twice")
        if form == "value":
            self.line(f"return {value}")
            return
        value = self.assigned(value)
        # Those assigned in a block that runs, which all of AROUND do.
        other = self.choose(*self.variables)
        if form == "reuse":
            self.line(f"return {value} + {other}")
        elif form == "tuple":
            self.line(f"return {value}, {other}")
        elif form == "dict":
            self.line(f"return {{'output': {value}, 'other': [{other}]}}")
        elif form == "all":
            self.listed = True
            self.line(f"return {value}, kept, named")
        elif form == "delete":
            self.line(f"{self.name('r')} = {value}")
            self.line(f"del {value}")
            self.line(f"return r{self.count}")
        else:
            self.line(f"return {self.relu(value)} * {value}")

    def write(self):
        self.init += [
            "self.relu = nn.ReLU()",
            "self.relu_in = nn.ReLU(inplace=True)",
            "self.six, self.leaky, self.act = nn.ReLU6(), nn.LeakyReLU(), F.relu",
        ]
        self.early()
        self.waiting, shortcut = self.shortcut()
        if self.one_in(2):
            self.emit_waiting()
        if self.one_in(4):
            shortcut = self.assigned(shortcut) if not self.waiting else shortcut
        value = self.main()
        self.emit_waiting()
        with self.maybe_inside():
            value = self.added(value, shortcut)
            value = self.maybe_assigned(value) if self.level == 2 else self.assigned(value)
        self.tail(value)
        if self.listed:
            self.lines.insert(0, "        kept, named = [], {}")
        if self.frozen:
            self.methods += ["    def train(self, mode=True):", "        super().train(mode)"]
            self.methods += [f"        {bn}.eval()" for bn in self.frozen]
            self.methods.append("        return self")
        init = "".join(f"        {line}\n" for line in self.init)
        methods = "".join(f"{line}\n" for line in self.methods)
        named = ", scale=1.0, *, rectify=True" if self.rectifies else self.choose("", "", ", scale=1.0")
        head = f"    def forward(self, x{named}):\n"
        return f"{HEAD}{init}\n{methods}\n{head}" + "\n".join(self.lines) + "\n"


def block_source(seed, plain=frozenset()):
    """Source of a module with a class Block that takes and returns tensors of 4 channels, and the number of choices."""
    choices = Choices(seed, plain)
    return Writer(choices).write(), choices.made


def simplest(seed, fails: Callable[[str], bool]):
    """The source with as many plain choices as let it fail still."""
    source, made = block_source(seed)
    plain = set()
    for choice in reversed(range(made)):
        simpler, _ = block_source(seed, plain | {choice})
        if simpler == source or fails(simpler):
            plain.add(choice)
            source = simpler
    return source
