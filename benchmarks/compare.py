"""Alternatives timed in turn in one process, for the ratio of their medians on a machine that is not quiet.

Operator::

    python -m benchmarks.compare --batch 8 --layout nchw                 # every site of ResNet-50, as it occurs
    python -m benchmarks.compare --batch 8 --layout nchw --kind residual # every shape of it, with a residual
    python -m benchmarks.compare --batch 8 --forward                     # without the backward
    python -m benchmarks.compare --host                                  # what the host adds: 2x8x2x2, blocks, networks
    python -m benchmarks.compare --small --batch 2                       # 64 channels, from 2x2 up: where fusing pays

Network::

    python -m benchmarks.compare --model resnet50 --batch 8 --channels-last
    python -m benchmarks.compare --model resnet50 --batch 8 --inference

Nothing is timed whose result is not as near to float64 as eager's.
"""

import argparse
import csv
import dataclasses
import math
import os
import pathlib
import statistics
import sys
from collections.abc import Iterator

import torch
from tabulate import tabulate
from tqdm import tqdm

from resnet_fused.cli.doctor import serves
from resnet_fused.measure import in_turn, median_ratio

from . import device, host
from .networks import INFERENCE_VARIANTS, Network
from .networks import VARIANTS as NETWORK_VARIANTS
from .operator import DTYPES, LAYOUTS, VARIANTS, Case, Operator
from .shapes import KINDS, Site, as_residual, sites


@dataclasses.dataclass
class Comparison:
    """What was compared, and the samples of every variant in seconds."""

    name: str
    samples: dict[str, list[float]]
    count: int = 1
    bytes: dict[str, int | None] = dataclasses.field(default_factory=dict)

    def ratio(self, variant: str, other: str) -> float | None:
        """The median of ``variant`` over that of ``other``."""
        return median_ratio(self.samples[variant], self.samples[other]) if variant in self.samples else None

    def row(self) -> list:
        """A line of the operators' table."""
        medians = {name: statistics.median(times) for name, times in self.samples.items()}
        size = self.bytes.get("fused")
        return [
            self.name,
            self.count,
            *(1e3 * medians[name] if name in medians else None for name in VARIANTS),
            self.ratio("eager", "fused"),
            self.ratio("compile", "fused"),
            self.bytes["eager"] / 1e6 if size else None,
            size / 1e6 if size else None,
            size / medians["fused"] / 1e9 if size else None,
            len(self.samples["fused"]),
        ]


HEADERS = ("", "sites", "eager ms", "fused ms", "compile ms", "eager/fused", "compile/fused")
HEADERS += ("eager MB", "fused MB", "fused GB/s", "rounds")
FORMATS = ("", "", ".3f", ".3f", ".3f", ".2f", ".2f", ".1f", ".1f", ".1f", "")

NETWORK_HEADERS = ("", "median ms", "of eager", "kept MB", "of eager", "peak MB", "of eager", "rounds")
NETWORK_FORMATS = ("", ".1f", ".3f", ".1f", ".3f", ".1f", ".3f", "")


def geometric_mean(values: list[float]) -> float:
    """Of ratios."""
    return math.exp(statistics.fmean(map(math.log, values)))


def operators(options: argparse.Namespace) -> Iterator[Comparison]:
    """Every site of the network of ``--shapes``."""
    counts = sites(options.shapes)
    if options.kind == "residual":
        counts = as_residual(counts)
    elif options.kind:
        counts = {site: count for site, count in counts.items() if site.kind == options.kind}
    backward = not (options.forward or options.inference)
    for site, count in tqdm(counts.items(), unit="shape", disable=None, leave=False):
        case = Case(site, options.batch, options.layout, DTYPES[options.dtype], not options.inference)
        yield _operator(case, count, backward, options)


def host_operator(options: argparse.Namespace) -> Iterator[Comparison]:
    """A tensor so small that only the work of the host counts."""
    yield _operator(Case(Site(8, 2, 2, "residual"), 2, options.layout), 1, not options.forward, options, calls=50)


def small(options: argparse.Namespace) -> Iterator[Comparison]:
    """Tensors from where the work of the host counts alone to where it does not count."""
    for side in (2, 4, 7, 14, 28, 56):
        case = Case(Site(64, side, side, "residual"), options.batch, options.layout, DTYPES[options.dtype])
        yield _operator(case, 1, not options.forward, options, calls=20)


def _operator(case: Case, count: int, backward: bool, options: argparse.Namespace, calls: int = 1) -> Comparison:
    operator = Operator(case)
    with torch.set_grad_enabled(case.training):
        operator.check(backward and case.training)
        calls_of = [operator.call(variant, backward) for variant in options.variants]
        samples = in_turn(calls_of, options.seconds, options.minimum_rounds, options.rounds, calls, device.clock())
    sizes = {variant: case.bytes(variant, backward) for variant in options.variants}
    return Comparison(str(case), dict(zip(options.variants, samples, strict=True)), count, sizes)


def network(options: argparse.Namespace) -> Comparison:
    """A training step, or a forward in inference, of ``--model``; ``bytes`` has what is kept and the peak."""
    made = Network.named(
        options.model,
        options.batch,
        options.image_size,
        layout=options.layout,
        dtype=DTYPES[options.dtype],
        training=not options.inference,
    )
    made.check()
    memory = {variant: made.memory(variant) for variant in options.variants}
    calls = [made.call(variant) for variant in options.variants]
    samples = in_turn(calls, options.seconds, options.minimum_rounds, options.rounds, clock=device.clock())
    name = f"{options.model} {options.batch}x3x{options.image_size}x{options.image_size}"
    return Comparison(name, dict(zip(options.variants, samples, strict=True)), bytes=memory)


def network_rows(comparison: Comparison) -> Iterator[list]:
    """A line for each variant of a network."""
    for variant, samples in comparison.samples.items():
        row = [variant, 1e3 * statistics.median(samples), comparison.ratio(variant, "eager")]
        for bytes_of, eager in zip(comparison.bytes[variant] or (), comparison.bytes["eager"] or (), strict=False):
            row += [None, None] if bytes_of is None else [bytes_of / 1e6, bytes_of / eager]
        yield [*row, *[None] * (len(NETWORK_HEADERS) - 1 - len(row)), len(samples)]


def summary(comparisons: list[Comparison]) -> str:
    """Geometric means and the worst ratio."""
    lines = []
    for variant in ("eager", "compile"):
        ratios = {c.name: c.ratio(variant, "fused") for c in comparisons if variant in c.samples}
        if len(ratios) > 1:
            worst = min(ratios, key=ratios.get)
            mean = geometric_mean(list(ratios.values()))
            lines.append(f"{variant}/fused: geometric mean {mean:.2f}, least {ratios[worst]:.2f} ({worst})")
    return "\n".join(lines)


def write_csv(path: str, comparisons: list[Comparison], options: argparse.Namespace) -> None:
    """One line for each comparison and variant."""
    with pathlib.Path(path).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(
            ("case", "variant", "layout", "dtype", "p20", "p50", "p80", "rounds", "threads", "device", "torch")
        )
        for comparison in comparisons:
            for variant, times in comparison.samples.items():
                deciles = statistics.quantiles(times, n=10)
                quantiles = [f"{value:.6g}" for value in (deciles[1], deciles[4], deciles[7])]
                where = (options.threads, device.name(), torch.__version__)
                writer.writerow(
                    (comparison.name, variant, options.layout, options.dtype, *quantiles, len(times), *where)
                )


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__.partition("\n")[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", help="a torchvision ResNet: compare its training step in place of the operator")
    what.add_argument("--host", action="store_true", help="what the host adds: tiny operator, blocks, ResNets")
    what.add_argument("--small", action="store_true", help="the operator on 64 channels of 2x2 to 56x56")
    parser.add_argument("--shapes", default="resnet50", help="the network whose sites are taken (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--kind", choices=KINDS, help="sites of one kind; residual: every shape, with a residual")
    parser.add_argument("--batch", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--layout", choices=LAYOUTS, default="nchw", help="default: %(default)s")
    parser.add_argument("--channels-last", dest="layout", action="store_const", const="channels_last")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    parser.add_argument("--image-size", type=int, default=224, help="of --model (default: %(default)s)")
    parser.add_argument("--forward", action="store_true", help="the operator's training forward alone")
    parser.add_argument("--inference", action="store_true", help="forward with running statistics, no gradients")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--seconds", type=float, help="for the rounds of one case (default: 4; 60 with --model)")
    parser.add_argument("--rounds", type=int, help="their number, in place of --seconds")
    parser.add_argument("--minimum-rounds", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: %(default)s")
    parser.add_argument("--csv", help="write quantiles of every case and variant to this file")
    options = parser.parse_args(arguments)
    options.seconds = options.seconds or (60.0 if options.model else 4.0)
    of_networks = INFERENCE_VARIANTS if options.inference else NETWORK_VARIANTS
    options.variants = [v for v in (of_networks if options.model else VARIANTS) if options.compile or v != "compile"]
    return options


def main(arguments: list[str] | None = None) -> int:
    """Prints one table; returns 1 where the compiled kernels do not serve, for then nothing fused is compared."""
    options = _parse(arguments)
    device.choose(options.device)
    torch.set_num_threads(options.threads)
    served_by, reason = serves(device.chosen())
    if served_by == "reference":
        print(f"there is nothing fused to compare: {reason}", file=sys.stderr)
        return 1
    mode = "inference" if options.inference else "training forward" if options.forward else "training"
    print(
        f"{device.name()}, {options.threads} threads, torch {torch.__version__}; {mode}, {options.layout}, "
        f"{options.dtype}; medians, alternatives in turn"
    )
    if options.model:
        comparisons = [network(options)]
        print(comparisons[0].name)
        print(tabulate(network_rows(comparisons[0]), NETWORK_HEADERS, tablefmt="simple", floatfmt=NETWORK_FORMATS))
    else:
        comparisons = list((host_operator if options.host else small if options.small else operators)(options))
        rows = [comparison.row() for comparison in comparisons]
        print(tabulate(rows, HEADERS, tablefmt="simple", floatfmt=FORMATS))
        print(summary(comparisons))
        if options.host:
            print(tabulate(host.rows(options), host.HEADERS, tablefmt="simple", floatfmt=host.FORMATS))
    if options.csv:
        write_csv(options.csv, comparisons, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
