"""Fuses the models of tools/model_list.py and writes docs/models.md: what is fused, and how far from unfused it is.

    make model-table        python tools/model_table.py [--only PATTERN] [--quick] [--jobs N] [--output FILE]

Each model is built with random weights and compared with its fused copy in float64, in eval and training mode. Exits
with 1 where one differs by more than the bound or fails. A part of the list is printed, and written only to --output.
"""

import argparse
import importlib.metadata
import multiprocessing
import os
import pathlib
import platform
import re
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

import torch
from model_check import Errors, Result, check
from model_list import MODELS, PACKAGES, Model

from resnet_fused.cli.model_names import PACKAGES as SOURCES

OUTPUT = pathlib.Path(__file__).parents[1] / "docs" / "models.md"
# Float64 rounds by 1e-16, which 150 BatchNorms in training amplify to some 1e-11; the smallest error that is none of
# rounding in float64, a value that went through float32, starts at 6e-8.
BOUND = 1e-9
# Of the reasons of one model.
SHOWN_REASONS = 3
SHOWN_CHARACTERS = 120
HEADERS = (
    *("model", "BatchNorms", "fused", "alone", "not"),
    *("eval: output", "gradients", "train: output", "gradients", "statistics", "why not"),
)
RULE = ("---", *("--:",) * (len(HEADERS) - 2), "---")


def main() -> int:
    """Checks the models that were asked for and writes the table.

    Returns:
        The exit code: 1 where a model differs from its fused copy or fails, 2 where none was asked for.
    """
    options = _options()
    models = [model for model in MODELS if re.search(options.only, model.title) and (model.quick or not options.quick)]
    if not models:
        print(f"model_table: no model matches {options.only!r}", file=sys.stderr)
        return 2
    started = time.perf_counter()
    results = dict(_run(models, options.jobs))
    text = page(results, time.perf_counter() - started)
    output = options.output or (OUTPUT if len(models) == len(MODELS) else None)
    if output is None:
        print(text)
    else:
        output.write_text(text)
    bad = [model.title for model in models if not _holds(results[model.title])]
    print(f"{len(models) - len(bad)} of {len(models)} models hold" + "".join(f"\n  not {title}" for title in bad))
    return 1 if bad else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", metavar="PATTERN", help="models whose name matches a regular expression")
    parser.add_argument("--quick", action="store_true", help="one small model of each kind")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--output", type=pathlib.Path, help="where the table goes (default: docs/models.md)")
    return parser.parse_args()


def _prepare() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


def _run(models: list[Model], jobs: int) -> Iterator[tuple[str, Result | str]]:
    """The title of each model and what was found, or why nothing was, in the order in which they end."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    broken = []
    done = 0
    with _pool(jobs) as pool:
        futures = {pool.submit(check, model): model for model in models}
        for future in as_completed(futures):
            model = futures[future]
            try:
                result = _result(future)
            except BrokenProcessPool:
                broken.append(model)
                continue
            done += 1
            _progress(done, len(models), model, result)
            yield model.title, result
    # A process that is killed takes the others' work with it: whose fault it was shows alone.
    for model in broken:
        with _pool(1) as pool:
            try:
                result = _result(pool.submit(check, model))
            except BrokenProcessPool:
                result = "its process was killed"
        done += 1
        _progress(done, len(models), model, result)
        yield model.title, result


def _pool(jobs: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=_prepare)


def _result(future: Future) -> Result | str:
    try:
        return future.result()
    except BrokenProcessPool:
        raise
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _progress(done: int, total: int, model: Model, result: Result | str) -> None:
    if isinstance(result, Result):
        largest = max(result.eval.largest, result.train.largest)
        found = f"{result.fused} of {result.total} fused, error {largest:.1e}"
    else:
        found = f"FAILED: {result}"
    print(f"[{done}/{total}] {model.title}: {found}", flush=True)


def _holds(result: Result | str) -> bool:
    return isinstance(result, Result) and max(result.eval.largest, result.train.largest) <= BOUND


def page(results: dict[str, Result | str], seconds: float) -> str:
    """The text of docs/models.md.

    Args:
        results: of each title of a model, as :func:`model_check.check` returns them, or why there is none.
        seconds: how long it took to find them.
    """
    found = [result for result in results.values() if isinstance(result, Result)]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", *map(_pip, PACKAGES)))
    whole = sum(result.total > 0 and result.fused == result.total for result in found)
    lines = [
        "# Models",
        "",
        f"What `fuse` makes of {len(results)} models of other packages, and the largest error of the fused model",
        "against the unfused one in float64: of the outputs, relative to the largest output; of the gradients of",
        "parameters and input, relative to the largest gradient of the model; of each running statistic after a step",
        "of training. Both have the same random weights, statistics and random numbers; nothing is downloaded. Where",
        "all errors are 0, the model was left as it is.",
        "",
        f"All BatchNorms of {whole} models are fused, {sum(r.fused for r in found)} of {sum(r.total for r in found)}",
        f"in all, {sum(r.alone for r in found)} of them alone: in an operator that has no add and no ReLU to do.",
        "`python -m resnet_fused report MODEL --why` gives the reasons for the others in full.",
        "",
        f"With {versions}, Python {platform.python_version()},",
        f"on {platform.machine()}, in {seconds / 60:.0f} minutes:",
        "",
        "    make model-table",
    ]
    for package, models in PACKAGES.items():
        rows = [_row(model, results[model.title]) for model in models if model.title in results]
        if rows:
            lines += ["", f"## {package}", ""]
            lines += [f"| {' | '.join(cells)} |" for cells in (HEADERS, RULE, *rows)]
    return "\n".join(lines) + "\n"


def _pip(package: str) -> str:
    return SOURCES[package].pip


def _row(model: Model, result: Result | str) -> tuple[str, ...]:
    name = _cell(f"`{model.title}`")
    if isinstance(result, str):
        return (name, *("",) * (len(HEADERS) - 2), _cell(f"FAILED: {result}"))
    counts = (result.total, result.fused, result.alone, result.total - result.fused)
    return (name, *map(str, counts), *_errors(result.eval)[:2], *_errors(result.train), _digest(result.reasons))


def _errors(errors: Errors) -> tuple[str, ...]:
    values = (errors.output, errors.gradient, errors.statistics)
    return tuple(f"**{value:.1e}**" if not value <= BOUND else f"{value:.0e}" if value else "0" for value in values)


def _digest(reasons: tuple[tuple[str, int], ...]) -> str:
    """The most frequent reasons with how many BatchNorms have them."""
    shown = [f"{count}: {_cell(_short(reason))}" for reason, count in reasons[:SHOWN_REASONS]]
    rest = reasons[SHOWN_REASONS:]
    if rest:
        shown.append(f"{sum(count for _, count in rest)}: {len(rest)} other reasons")
    return "; ".join(shown)


def _short(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    sys.exit(main())
