"""``python -m resnet_fused demo``: one ResNet, eager and fused from the same weights, trained in turn on images."""

import copy
import dataclasses
import pathlib
import statistics
import sys

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

from .. import fuse
from ..measure import SavedActivations, cpu_name, seconds, without_garbage_collection
from ..tables import table
from . import demo_plot, doctor
from .model_names import ModelError, torchvision_builder

CLASSES = 10
TEST_SHARE = 0.2
# Steps whose time does not count: the first ones allocate and choose convolution algorithms.
WARMUP_STEPS = 3


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the demo trains, and where its plot goes."""

    model: str = "resnet18"
    epochs: int = 3
    batch_size: int = 64
    image_size: int = 64
    images: int | None = None
    channels_last: bool = False
    seed: int = 0
    output: str = "demo_output/demo.png"

    @property
    def memory_format(self) -> torch.memory_format:
        """Of weights and images."""
        return torch.channels_last if self.channels_last else torch.contiguous_format


class Run:
    """One of the two networks, its optimizer and what was measured of it."""

    def __init__(self, name: str, model: nn.Module):
        self.name = name
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)
        self.losses: list[float] = []
        self.step_seconds: list[float] = []
        self.saved_bytes = 0
        self.accuracy = 0.0

    def step(self, images: Tensor, labels: Tensor) -> None:
        """One training step."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(self.model(images), labels)
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())

    def timed_step(self, images: Tensor, labels: Tensor) -> None:
        """One training step, and the time it took."""
        self.step_seconds.append(seconds(lambda: self.step(images, labels)))

    def measure_memory(self, images: Tensor, labels: Tensor) -> None:
        """Counts what a forward keeps for its backward, on a copy, so that the training does not notice."""
        model = copy.deepcopy(self.model)
        with SavedActivations(model) as saved:
            loss = F.cross_entropy(model(images), labels)
        self.saved_bytes = saved.bytes
        del loss

    def test(self, images: Tensor, labels: Tensor, batch_size: int) -> None:
        """Measures the share of test images that are classified correctly."""
        self.model.eval()
        with torch.inference_mode():
            correct = sum(
                int((self.model(x).argmax(1) == y).sum())
                for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True)
            )
        self.model.train()
        self.accuracy = correct / len(labels)

    @property
    def counted_seconds(self) -> list[float]:
        """The steps' times without those of the warm-up."""
        return self.step_seconds[WARMUP_STEPS:] or self.step_seconds


def digits(settings: Settings) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scikit-learn's digits as float32 (N, 3, S, S) images of mean 0 and deviation 1.

    Returns:
        Training images and labels, then those for testing.
    """
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1)
    images = (images - images.mean()) / images.std()
    size = (settings.image_size, settings.image_size)
    images = F.interpolate(images, size=size, mode="bilinear", align_corners=False).expand(-1, 3, -1, -1)
    images = images.contiguous(memory_format=settings.memory_format)
    labels = torch.tensor(data.target)
    order = torch.from_numpy(np.random.default_rng(settings.seed).permutation(len(labels)))[: settings.images]
    held_out = int(TEST_SHARE * len(order))
    test, train = order[:held_out], order[held_out:]
    return images[train], labels[train], images[test], labels[test]


def run(settings: Settings) -> tuple[Run, Run]:
    """Trains both networks, prints the comparison and writes the plot.

    Raises:
        ModelError: torchvision has no such model, or the images make no batch.
    """
    torch.manual_seed(settings.seed)
    eager, fused = _networks(settings)
    train_images, train_labels, test_images, test_labels = digits(settings)
    if settings.batch_size > len(train_labels):
        raise ModelError(f"--batch-size must be at most {len(train_labels)}, the number of training images.")
    layout = "channels_last" if settings.channels_last else "NCHW"
    print(
        f"{settings.model}, {layout} float32, {len(train_labels)} training and {len(test_labels)} test images of "
        f"3x{settings.image_size}x{settings.image_size} (scikit-learn's digits), batches of {settings.batch_size}, "
        f"{torch.get_num_threads()} threads, {cpu_name()}"
    )
    served_by, reason = doctor.serves(torch.device("cpu"))
    fused_how = "fused kernels" if served_by != "reference" else "NOT fused kernels but the unfused maths"
    print(f"The fused network runs {fused_how} here: {reason}.")

    first = train_images[: settings.batch_size], train_labels[: settings.batch_size]
    for network in (eager, fused):
        network.measure_memory(*first)
    _train(settings, (eager, fused), train_images, train_labels)
    for network in (eager, fused):
        network.test(test_images, test_labels, settings.batch_size)

    print(comparison(eager, fused, settings.batch_size))
    print("The two round differently in the last bit; training amplifies that, as it does between two eager layouts.")
    output = pathlib.Path(settings.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    title = f"{settings.model} on digits: {layout} float32, batch {settings.batch_size}, {threads} threads"
    drawn = tuple(_drawn(network, settings.batch_size) for network in (eager, fused))
    demo_plot.write(output, title, drawn)
    print(f"Plot: {output.resolve()}")
    return eager, fused


def _drawn(network: Run, batch_size: int) -> demo_plot.Drawn:
    milliseconds = 1e3 * statistics.median(network.counted_seconds)
    megabytes = network.saved_bytes / batch_size / 1e6
    return demo_plot.Drawn(network.name, network.accuracy, network.losses, milliseconds, megabytes)


def _networks(settings: Settings) -> tuple[Run, Run]:
    model = torchvision_builder(settings.model)(num_classes=CLASSES).to(memory_format=settings.memory_format)
    fused = fuse(copy.deepcopy(model))
    return Run("eager", model), Run("fused", fused)


def _train(settings: Settings, networks: tuple[Run, Run], images: Tensor, labels: Tensor) -> None:
    # Batches of one size only: a last, smaller one would count among the times of the others.
    batches = len(labels) // settings.batch_size
    generator = torch.Generator().manual_seed(settings.seed)
    interval = 0.1 if sys.stderr.isatty() else 10.0
    progress = tqdm(total=settings.epochs * batches, unit="step", desc="eager and fused in turn", mininterval=interval)
    with progress, without_garbage_collection():
        for _ in range(settings.epochs):
            order = torch.randperm(len(labels), generator=generator)
            for batch in order[: batches * settings.batch_size].split(settings.batch_size):
                x, y = images[batch].contiguous(memory_format=settings.memory_format), labels[batch]
                for network in networks:
                    network.timed_step(x, y)
                losses = {f"loss {network.name}": f"{network.losses[-1]:.3f}" for network in networks}
                progress.set_postfix(losses, refresh=False)
                progress.update()


def comparison(eager: Run, fused: Run, batch_size: int) -> str:
    """The two runs side by side."""
    differences = [abs(a - b) for a, b in zip(eager.losses, fused.losses, strict=True)]
    times = [statistics.median(network.counted_seconds) for network in (eager, fused)]
    rows = [
        ("test accuracy", f"{eager.accuracy:.2%}", f"{fused.accuracy:.2%}", ""),
        ("last loss", f"{eager.losses[-1]:.4f}", f"{fused.losses[-1]:.4f}", ""),
        ("difference of losses, first step", "", f"{differences[0]:.1e}", ""),
        ("difference of losses, largest", "", f"{max(differences):.1e}", ""),
        ("time per step, median", *(f"{1e3 * t:.1f} ms" for t in times), f"{times[0] / times[1]:.2f}x as fast"),
        (
            "saved activations per image",
            *(f"{network.saved_bytes / batch_size / 1e6:.2f} MB" for network in (eager, fused)),
            f"{fused.saved_bytes / eager.saved_bytes:.2f} of eager's",
        ),
    ]
    return "\n" + table(rows, ("", "eager", "fused", "fused is"))
