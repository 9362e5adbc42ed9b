"""What a network is given to learn: scikit-learn's digits, the user's samples, or a batch of its
own inputs to remember.

Every task is a classification. The logits are the last real-valued thing that the network makes
before a softmax or sigmoid, averaged over positions, so that a sample has one answer; as many
classes as it has features, at most ten. Batches come in groups as large as the graph's own batch,
which holds for any number of samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from archlint.graph.model import LayerGraph
from archlint.probe.feed import Data, Feed
from archlint.signal.analysis import Analysis

MOST_CLASSES = 10
_BATCH = 32  # samples of a step, at least; a batch to remember has twice as many
_FEWEST = 16  # samples that can be learned
_MOST_ALIKE = 0.9  # labels of one kind
_HELD = 256  # samples that are looked at, and never learned


class NoTask(Exception):
    """Nothing can be learned: one line that says why."""


@dataclass(frozen=True)
class Batch:
    """Inputs by value id [group, *shape] and labels [group, sample]."""

    inputs: Mapping[str, Tensor]
    labels: Tensor


@dataclass(frozen=True)
class Readout:
    """Where the logits of a graph are: a value, its axes of samples (None: a single one) and
    classes, and how many classes are told apart."""

    value: str
    sample_axis: int | None
    class_axis: int
    samples: int
    classes: int

    def __call__(self, y: Tensor) -> Tensor:
        """The logits of one group: [sample, class]."""
        y = y.movedim(self.class_axis, -1)
        if self.sample_axis is None:
            y = y.unsqueeze(0)
        else:
            axis = self.sample_axis - (self.sample_axis > self.class_axis)
            y = y.movedim(axis, 0)
        logits = y.reshape(y.shape[0], -1, y.shape[-1]).mean(1)
        return F.pad(logits, (0, 1)) if logits.shape[-1] == 1 else logits


def readout(analysis: Analysis) -> Readout:
    """The logits of a network. Raises NoTask where its outputs hold none."""
    graph = analysis.graph
    real = [o for o in graph.outputs if "float" in (graph.values[o].dtype or "")]
    if not real:
        raise NoTask(f"the outputs are {kinds(graph)}: there is no loss to train with")
    samples = samples_of(graph)
    for output in real:
        value = output
        while (node := graph.producer.get(value)) is not None and node.op in (
            "softmax", "log_softmax", "sigmoid",
        ):  # fmt: skip
            value = node.inputs[0] or value
        shape = graph.shape(value)
        if not shape or any(n is None for n in shape):
            continue
        sizes = [n or 1 for n in shape]
        roles = analysis.signal(value).roles
        if len(roles) != len(sizes):
            roles = ()
        sample = roles.index("sample") if "sample" in roles else None
        if sample is None and sizes[0] == samples and len(sizes) > 1:
            sample = 0
        features = [a for a, role in enumerate(roles) if role == "feature" and a != sample]
        axes = features or [a for a in range(len(sizes)) if a != sample]
        if not axes or (sample is None and samples > 1):
            continue
        axis = axes[-1] if features or len(sizes) < 4 else axes[0]
        return Readout(value, sample, axis, samples, min(max(sizes[axis], 2), MOST_CLASSES))
    raise NoTask("the output is a single number, not one answer a sample: there is nothing to "
                 "classify by")  # fmt: skip


def kinds(graph: LayerGraph) -> str:
    """What the outputs of a graph are that are no real numbers."""
    found = {graph.values[o].dtype or "of an unknown type" for o in graph.outputs}
    whole = all(t.startswith(("int", "uint", "bool")) for t in found)
    return "integers" if whole else ", ".join(sorted(found))


def samples_of(graph: LayerGraph) -> int:
    """How many samples a batch of the graph holds."""
    for id in graph.inputs:
        shape = graph.shape(id)
        if shape and len(shape) > 1 and shape[0]:
            return shape[0]
    return 1


@dataclass(frozen=True)
class Task:
    """Samples to learn and others to look at. ``share`` is that of the commonest answer. A task to
    remember has one batch, which is both."""

    name: str
    learned: Batch
    held: Batch
    samples: int
    share: float
    axis: bool = True  # whether the network's inputs have an axis of samples
    rows: bool = False  # whether ``learned`` has a row a sample: inputs [row, …], labels [row]

    @property
    def threshold(self) -> float:
        """The accuracy from which on a network has started: twice what the best constant answer
        gets (20 % of ten classes, as in Hanin & Rolnick 2018), and of few samples more than guesses
        get once in ten thousand looks; at most half of what is missing."""
        chance = 3.7 * math.sqrt(self.share * (1 - self.share) / self.held.labels.numel())
        return self.share + min(max(self.share, chance), (1 - self.share) / 2)

    def batches(self, seed: int) -> Iterator[Batch]:
        """The batches to learn, without end; the same for the same seed."""
        while not self.rows:
            yield self.learned
        generator = torch.Generator().manual_seed(seed)
        rows = len(self.learned.labels)
        count = groups(self.samples) * self.samples
        order = torch.empty(0, dtype=torch.int64)
        while True:
            while len(order) < count:
                order = torch.cat([order, torch.randperm(rows, generator=generator)])
            chosen, order = order[:count], order[count:]
            yield grouped(self.learned, chosen, self.samples, self.axis)


def groups(samples: int, least: int = _BATCH) -> int:
    """How many batches of the graph's size hold a step's samples."""
    return max(1, -(-least // samples))


def grouped(rows: Batch, chosen: Tensor, samples: int, axis: bool) -> Batch:
    """Chosen rows in groups of ``samples``, which have an ``axis`` of their own in the inputs but
    where the network takes a single sample without one."""
    count = len(chosen) // samples
    place = chosen[: count * samples].to(rows.labels.device)
    size = (count, samples) if axis else (count,)
    inputs = {id: x[place].reshape(*size, *x.shape[1:]) for id, x in rows.inputs.items()}
    return Batch(inputs, rows.labels[place].reshape(count, samples))


# --------------------------------------------------------------------------- the tasks


def task_for(
    analysis: Analysis,
    found: Readout,
    seed: int,
    real: torch.dtype,
    device: torch.device,
    data: Data | None = None,
) -> tuple[Task, str]:
    """What fits a network: the user's data; digits where one real-valued input takes samples; else
    a batch of its inputs. With a remark where it is not what it could be, else empty."""
    graph = analysis.graph
    if data is not None and data.labels is not None:
        labels = data.labels
        kinds = int(labels.max()) + 1
        if int(labels.min()) < 0 or kinds > _features(graph, found):
            raise NoTask(
                f"the labels of the data go from {int(labels.min())} to {int(labels.max())}, the "
                f"output has {_features(graph, found)} classes")  # fmt: skip
        if len(graph.inputs) > 1:
            raise NoTask(f"the data are for one input, the model has {len(graph.inputs)}")
        name = f"{len(labels)} samples of the data"
        return _split(name, data.rows, labels, found, seed, _batched(graph, found)), ""
    if data is None and _takes_images(graph, found):
        try:
            images, labels = digit_images()
        except ModuleNotFoundError:
            return remembered(graph, found, seed, real, device, None), (
                "scikit-learn is not installed: a batch of random inputs is learned in place of "
                "its digits (pip install scikit-learn)")  # fmt: skip
        kept = labels < found.classes
        images, labels = images[kept].to(device), labels[kept].to(device)
        id = graph.inputs[0]
        shape = tuple(n or 1 for n in graph.shape(id) or ())
        rows = fitted(images, shape[1:] if _batched(graph, found) else shape).to(real)
        axis = _batched(graph, found)
        return _split("scikit-learn's digits", {id: rows}, labels, found, seed, axis), ""
    return remembered(graph, found, seed, real, device, data), data.note if data is not None else ""


def digit_images() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 digits [sample, 8, 8], standardised by the mean and variance of all
    pixels, and their labels. Raises ModuleNotFoundError."""
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    found = load_digits()
    x = torch.tensor(found.images, dtype=torch.float32)
    return (x - x.mean()) / x.std(), torch.tensor(found.target)


def fitted(images: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Images [sample, 8, 8] as samples of a shape: resampled to its last two axes and repeated
    along the others; a vector by its pixels, fewer than 64 by its principal components."""
    count = images.shape[0]
    made: Tensor
    if len(shape) == 1 and shape[0] < 64:
        flat = images.reshape(count, 64)
        flat = flat - flat.mean(0)
        _, _, axes = torch.linalg.svd(flat.double(), full_matrices=False)
        made = (flat.double() @ axes[: shape[0]].T).to(images.dtype)
    elif len(shape) == 1:
        side = int(np.ceil(np.sqrt(shape[0])))
        made = _resized(images, side, side).reshape(count, -1)[:, : shape[0]]
    else:
        made = _resized(images, shape[-2], shape[-1])
        made = made.reshape(count, *[1] * (len(shape) - 2), *shape[-2:]).expand(count, *shape)
    return (made - made.mean()) / made.std()


def _resized(images: Tensor, height: int, width: int) -> Tensor:
    if (height, width) == (8, 8):
        return images
    size = (height, width)
    made: Tensor = F.interpolate(images[:, None], size, mode="bilinear", antialias=True)
    return made.squeeze(1)


def _takes_images(graph: LayerGraph, found: Readout) -> bool:
    if len(graph.inputs) != 1:
        return False
    value = graph.values[graph.inputs[0]]
    if "float" not in (value.dtype or "") or not value.shape or None in value.shape:
        return False
    return len(value.shape) > (1 if _batched(graph, found) else 0)


def _batched(graph: LayerGraph, found: Readout) -> bool:
    """Whether the first axis of the first input counts samples."""
    shape = graph.shape(graph.inputs[0]) or ()
    return len(shape) > 1 and shape[0] == found.samples


def _features(graph: LayerGraph, found: Readout) -> int:
    shape = graph.shape(found.value) or ()
    return max(int(shape[found.class_axis] or 1), 2)


def _split(
    name: str,
    inputs: Mapping[str, Tensor],
    labels: Tensor,
    found: Readout,
    seed: int,
    axis: bool,
) -> Task:
    """Some samples are looked at, a fifth and no more than there is use for; the rest learned."""
    rows = len(labels)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).to(labels.device)
    held = min(_HELD, rows // 5) // found.samples * found.samples
    every = Batch(inputs, labels)
    rest = order[held:]
    if held < _BATCH:  # too few to tell learning from luck: what is learned is looked at
        held, rest = rows // found.samples * found.samples, order
        name += " to remember"
    if held < _FEWEST:
        raise NoTask(f"{rows} samples are too few to learn from in batches of {found.samples}")
    learned = Batch({id: x[rest] for id, x in inputs.items()}, labels[rest])
    looked = grouped(every, order[:held], found.samples, axis)
    share = max(_commonest(labels), _commonest(looked.labels))
    if share > _MOST_ALIKE:
        raise NoTask(
            f"{share:.0%} of the labels are the same: learning is not told from a constant answer"
        )
    return Task(name, learned, looked, found.samples, share, axis, rows=True)


def remembered(
    graph: LayerGraph,
    found: Readout,
    seed: int,
    real: torch.dtype,
    device: torch.device,
    data: Data | None,
) -> Task:
    """A batch of inputs with random labels, equally many of each."""
    count = groups(found.samples, 2 * _BATCH)
    generator = torch.Generator().manual_seed(seed)
    chosen: dict[str, Tensor] = {}
    for id, rows in data.rows.items() if data is not None else ():
        count = min(count, len(rows) // found.samples)
        if count * found.samples < _FEWEST:
            raise NoTask(f"{len(rows)} samples are too few for batches of {found.samples}")
        order = torch.randperm(len(rows), generator=generator)[: count * found.samples]
        some = Batch({id: rows}, torch.zeros(len(rows), device=device))
        axis = _batched(graph, found)
        chosen |= grouped(some, order.to(device), found.samples, axis).inputs
    inputs = {**Feed(graph, seed, real, device, {}).draw(0, count), **chosen}
    total = count * found.samples
    labels = torch.arange(total) % found.classes
    labels = labels[torch.randperm(total, generator=generator)]
    batch = Batch(inputs, labels.reshape(count, found.samples).to(device))
    name = f"a batch of {total} {'samples of the data' if data else 'random inputs'} to remember"
    return Task(name, batch, batch, found.samples, _commonest(batch.labels))


def _commonest(labels: Tensor) -> float:
    return float(torch.bincount(labels.flatten()).max()) / labels.numel()
