"""``python -m resnet_fused doctor | report MODEL | memory MODEL | demo``."""

import argparse
import json
import os
import sys

from . import __version__


def main(arguments: list[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit code: 0, 1 where the doctor finds no fused kernels for the CPU, 2 for a wrong argument.
    """
    options = _parser().parse_args(arguments)
    try:
        code = options.command(options)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has read enough, as `head` does; nor may Python write more as it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m resnet_fused", description="BatchNorm, residual add and ReLU as one PyTorch operator."
    )
    parser.add_argument("--version", action="version", version=f"resnet_fused {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    text = "Show versions and devices, and which backend serves each device and why."
    doctor = commands.add_parser("doctor", help=text, description=text)
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(command=_doctor)

    names = f"MODEL is a torchvision model such as resnet50, or one of {_examples()}, or module:callable."
    text = "Show for every BatchNorm of a model what it is fused with, or why not."
    report = commands.add_parser("report", help=text, description=text, epilog=names)
    report.add_argument("model", metavar="MODEL", help="see below")
    form = report.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--why", action="store_true", help="show only the reasons why BatchNorms are not fused")
    report.set_defaults(command=_report)

    text = "Predict the memory of a training step, eager, fused and with recomputation, with no GPU and no data."
    memory = commands.add_parser("memory", help=text, description=text, epilog=names)
    memory.add_argument("model", metavar="MODEL", help="see below")
    memory.add_argument("--batch-size", type=_several, default=32, help="images a step (default: %(default)s)")
    memory.add_argument("--image-size", type=_positive, default=224, help="side in pixels (default: %(default)s)")
    dtypes = ("float32", "bf16", "bfloat16", "float16")
    memory.add_argument("--dtype", choices=dtypes, default="float32", help="of model and images (default: %(default)s)")
    memory.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where it would run; none is used")
    memory.add_argument("--memory", type=_bytes, help="find the largest batch that fits into this, such as 24GB")
    memory.add_argument("--contiguous", action="store_true", help="NCHW weights and images, not channels_last")
    memory.add_argument("--output", metavar="FILE", help="plot memory over the step to this file (default: no plot)")
    memory.set_defaults(command=_memory)

    text = "Train a torchvision ResNet eager and fused, in turn, on scikit-learn's digits, and compare the two."
    demo = commands.add_parser("demo", help=text, description=text)
    demo.add_argument("--model", default="resnet18", help="a torchvision ResNet (default: %(default)s)")
    demo.add_argument("--epochs", type=_positive, default=3, help="passes over the images (default: %(default)s)")
    demo.add_argument("--batch-size", type=_positive, default=64, help="images a step (default: %(default)s)")
    demo.add_argument("--image-size", type=_positive, default=64, help="side in pixels (default: %(default)s)")
    demo.add_argument("--images", type=_positive, help="use so many of the images (default: all 1797)")
    demo.add_argument("--channels-last", action="store_true", help="channels_last weights and images")
    demo.add_argument("--seed", type=int, default=0, help="of weights and batches (default: %(default)s)")
    demo.add_argument("--output", default="demo_output/demo.png", help="where the plot goes (default: %(default)s)")
    demo.set_defaults(command=_demo)
    return parser


def _examples() -> str:
    from .cli.model_names import PACKAGES

    return ", ".join(package.example for package in PACKAGES.values())


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _several(text: str) -> int:
    value = _positive(text)
    if value < 2:
        raise argparse.ArgumentTypeError("must be at least 2: a BatchNorm over single positions takes no less")
    return value


def _bytes(text: str) -> int:
    from .cli.memory import bytes_of

    try:
        return bytes_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _doctor(options: argparse.Namespace) -> int:
    from .cli import doctor

    findings = doctor.examine()
    print(json.dumps(findings, indent=2) if options.json else doctor.render(findings))
    return 0 if doctor.healthy(findings) else 1


def _report(options: argparse.Namespace) -> int:
    from .cli.model_names import ModelError
    from .cli.report import report, why

    try:
        found = report(options.model)
    except ModelError as error:
        return _refuse(error)
    if options.json:
        print(found.to_json())
    else:
        print(why(found) if options.why else found)
    return 0


def _memory(options: argparse.Namespace) -> int:
    from .cli import memory
    from .cli.model_names import ModelError

    settings = memory.Settings(
        model=options.model,
        batch_size=options.batch_size,
        dtype=options.dtype,
        device=options.device,
        image_size=options.image_size,
        channels_last=not options.contiguous,
        memory=options.memory,
        output=options.output,
    )
    try:
        memory.run(settings)
    except ModelError as error:
        return _refuse(error)
    except ModuleNotFoundError as error:
        return _refuse(f"the plot needs {error.name}: install it, or leave --output out.")
    return 0


def _demo(options: argparse.Namespace) -> int:
    try:
        from .cli import demo
    except ModuleNotFoundError as error:
        return _refuse(f"the demo needs {error.name}: install it with `pip install 'resnet_fused[demo]'`.")
    from .cli.model_names import ModelError

    settings = demo.Settings(
        model=options.model,
        epochs=options.epochs,
        batch_size=options.batch_size,
        image_size=options.image_size,
        images=options.images,
        channels_last=options.channels_last,
        seed=options.seed,
        output=options.output,
    )
    try:
        demo.run(settings)
    except ModelError as error:
        return _refuse(error)
    return 0


def _refuse(message: object) -> int:
    print(f"resnet_fused: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
