"""Many draws of one network, evaluated together, and what claims need of them.

Weights are drawn on the device from their laws and evaluated by ``torch.func.vmap`` in chunks that
fit the memory; of each draw only a few numbers are kept. The gradient at a value is that of a zero
added to it, for a random direction at the output.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from archlint.finding import Claim
from archlint.probe.draws import Blocks, Drawer, Room
from archlint.probe.execute import DATA_SIZED, Program, needed_for, unknown_nodes
from archlint.probe.feed import Feed
from archlint.probe.ops.frame import CannotExecute
from archlint.probe.rebuild import CannotRebuild, Rebuilder
from archlint.probe.sequential import Lost
from archlint.signal.analysis import Analysis

Floats = npt.NDArray[np.float64]
UNITS = frozenset({"unit difference", "common part"})  # statistics of a value's features
_ROUNDING = 1e-30
RANDOM = frozenset({"random_normal", "random_uniform", "bernoulli"})


class OutOfMemory(Exception):
    """One draw alone does not fit into the memory; what it takes at least, where that is known."""

    def __init__(self, needed: float | None = None) -> None:
        takes = f": it takes {needed / 1e6:.0f} MB at least" if needed is not None else ""
        super().__init__(f"a single draw does not fit into the memory{takes}")


# What others than torch's own allocators say: those of the processor, of cuBLAS and of cuDNN.
_FULL = ("can't allocate memory", "not enough memory", "status_alloc_failed", "out of memory")


def is_out_of_memory(problem: BaseException) -> bool:
    """Whether torch ran out of memory, on whatever device."""
    text = str(problem).lower()
    return isinstance(problem, torch.OutOfMemoryError | MemoryError) or (
        isinstance(problem, RuntimeError) and any(part in text for part in _FULL)
    )


def in_a_line(problem: BaseException) -> str:
    """What an exception says: its first sentence, without what to do about it in CUDA."""
    text = " ".join(str(problem).split()) or type(problem).__name__
    text = text.split(" CUDA kernel errors might")[0].split(" Search for `")[0]
    return text if len(text) <= 160 else text[:159] + "…"


_GRAIN = 2**16  # elements below which threads wait for each other longer than they compute


@contextmanager
def threads_for(elements: float) -> Iterator[None]:
    """One thread where an operation has so few elements; else as many as torch has."""
    before = torch.get_num_threads()
    if before == 1 or elements > _GRAIN:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


_LIBRARIES = 2**27  # bytes of a GPU that its libraries take for themselves, such as cuBLAS


@contextmanager
def bounded(device: torch.device, memory: float) -> Iterator[None]:
    """On CUDA, torch takes no more than ``memory`` bytes beyond what it has: more is refused as if
    the device were full. Elsewhere the size of the chunks alone bounds it."""
    if device.type != "cuda":
        yield
        return
    most = torch.cuda.memory_reserved(device) + memory + _LIBRARIES
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(most / total, 1.0), device)
    try:
        yield
    finally:
        with suppress(RuntimeError):  # the device is lost
            torch.cuda.set_per_process_memory_fraction(1.0, device)


@contextmanager
def exact_convolutions(device: torch.device) -> Iterator[None]:
    """On CUDA, convolutions in single precision, not in TensorFloat-32, and the same each time."""
    if device.type != "cuda":
        yield
        return
    with torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    ):
        yield


@dataclass
class Ensemble:
    """Draws of a network. ``claims`` say what is measured; :meth:`extend` adds draws.

    ``memory`` bounds the bytes that a chunk of draws may take. ``remarks`` are for the report.
    """

    analysis: Analysis
    claims: Sequence[Claim]
    drawer: Drawer | Rebuilder
    feed: Feed
    real: torch.dtype
    device: torch.device
    memory: float
    together: bool = True  # by vmap; else one draw after the other
    done: int = 0
    looks: int = 0  # at the draws so far, each of which spends some of α
    remarks: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        graph = self.analysis.graph
        self.values = sorted(
            {v for c in self.claims for v in (c.start, c.end, c.also) if v is not None}
        )
        unknown = unknown_nodes(graph)
        sized = {node.op for node in graph.walk()} & DATA_SIZED
        # Nothing that claims do not need, where some of it may not run: gradients then come from
        # the last values that claims are about, else from the outputs.
        alone = bool(unknown or sized)
        self.program = Program(graph, self.real, self.device, frozenset(self.values), alone)
        self.outputs = self._last() if alone else [
            o for o in graph.outputs if "float" in (graph.values[o].dtype or "")
        ]  # fmt: skip
        self.backward = any("gradient" in c.statistic for c in self.claims)
        self.samples = _samples(self.analysis)
        self.found: list[list[Floats]] = [[] for _ in self.claims]
        self.room: Room = {}
        self.no_path: set[str] = set()
        self.chunk = self._first_chunk()
        if unknown:
            names = ", ".join(sorted(unknown))
            self.remarks.append(
                f"run without {names}: it cannot be executed, and no figure needs it"
            )
        if sized:  # samples cannot be told apart
            self.together, self.chunk, self.samples = False, 1, 1
            names = ", ".join(sorted(sized))
            self.remarks.append(f"drawn one by one: the sizes in {names} depend on the data")
        if count := sum(node.op in RANDOM for node in graph.walk()):
            self.remarks.append(
                f"forward draws random numbers itself ({count} times): they are part of each draw"
            )
        self.remarks += self.drawer.remarks

    def _last(self) -> list[str]:
        """Ends of claims that no other one is computed from."""
        ends = {c.end for c in self.claims}
        graph = self.analysis.graph
        before = {v for end in ends for v in needed_for(graph, [end]) - {end}}
        return sorted(ends - before)

    # ------------------------------------------------------------------ memory

    def _first_chunk(self) -> int:
        """As many draws as fit, their weights and the values that live at the same time, and no
        more than keep the device busy: more win no time, leave the processor's caches, and are
        long in coming where somebody waits for the next look."""
        size = self.real.itemsize
        weights = self.drawer.elements * (4 + 2 * size)
        most, step, drawn, work = (128, 2**19, 2**25, 2**32) if self.device.type == "cpu" else (
            2048, 2**24, 2**30, 2**42)  # fmt: skip
        busy = min(most, step / max(self._elements(1), 1.0), drawn / max(self.drawer.elements, 1),
                   work / max(self._products(), 1.0))  # fmt: skip
        if isinstance(self.drawer, Rebuilder):
            busy = min(busy, 4)  # building takes long
        return max(1, int(min(busy, self.memory / (weights + self._bytes() + 1))))

    def _needed(self) -> float:
        """Bytes that one draw takes at least: random numbers, weights, and each value once."""
        wide = self.real.itemsize if self.real.itemsize > 4 else 0
        return self.drawer.elements * (4.0 + wide) + self._bytes() / 2

    def _bytes(self) -> float:
        """Bytes of the values of one draw: all of them where a backward pass needs them, else
        the most that live at once."""
        graph, size = self.analysis.graph, self.real.itemsize
        counts = {id: value.size or 0 for id, value in graph.values.items()
                  if value.parameter is None and value.constant is None}  # fmt: skip
        if self.backward:
            return 2.0 * size * sum(counts.values())
        live = peak = sum(counts[id] for id in graph.inputs)
        for step in self.program.steps:
            live += sum(counts.get(out, 0) for out in step.outputs)
            peak = max(peak, live)
            live -= sum(counts.get(value, 0) for value in step.free)
        return 2.0 * size * peak

    def _products(self) -> float:
        """Multiplications of a draw's forward, those of matrices alone."""
        graph, total = self.analysis.graph, 0.0
        for step in self.program.steps:
            node = step.call.node
            if node.op in ("linear", "conv", "conv_transpose", "matmul"):
                factor = graph.shape(node.inputs[0 if node.op == "matmul" else 1]) or (1,)
                sizes = [n or 1 for n in factor]
                each = sizes[-1] if node.op == "matmul" else math.prod(sizes) / sizes[0]
                total += each * (graph.values[step.outputs[0]].size or 0)
        return total

    def _elements(self, draws: int) -> float:
        """Elements that a step computes on average."""
        graph = self.analysis.graph
        made = [graph.values[out].size or 0 for step in self.program.steps for out in step.outputs]
        return draws * sum(made) / max(len(made), 1)

    # ------------------------------------------------------------------ running

    def extend(self, until: int) -> None:
        """Draw until there are ``until`` draws. Raises OutOfMemory, CannotExecute, CannotRebuild,
        and whatever a single draw raises."""
        if self._needed() > self.memory:
            raise OutOfMemory(self._needed())
        while self.done < until:
            count = min(self.chunk, until - self.done)
            try:
                self._take(self.done, count)
            except (CannotExecute, CannotRebuild):
                raise
            except Exception as problem:  # whatever torch makes of somebody's network
                if is_out_of_memory(problem):
                    if self.chunk == 1:
                        raise OutOfMemory from problem
                    self.chunk = max(1, count // 2)
                    continue
                if not self.together or isinstance(problem, torch.OutOfMemoryError):
                    raise
                torch.zeros(1, device=self.device).cpu()  # raises where the device is lost
                self.together, self.chunk = False, 1
                self.remarks.append(
                    f"drawn one by one, since vmap does not take it: {in_a_line(problem)}"
                )
                continue
            self.done += count

    def _take(self, first: int, count: int) -> None:
        drawn = self.drawer.draw(first, count, self.room)
        inputs = self.feed.draw(first, count)
        fixed = {k: p for k, p in drawn.items() if not self.drawer.plans[k].kind}
        varied = {k: p for k, p in drawn.items() if k not in fixed}
        zeros = self._zeros(count)
        values = self.values

        def one(
            varied: Mapping[str, Tensor], inputs: Mapping[str, Tensor], zeros: dict[str, Tensor]
        ) -> tuple[list[Tensor], list[Tensor]]:
            def watch(id: str, x: Tensor) -> Tensor:
                if id not in zeros:
                    return x
                if zeros[id].shape != x.shape:  # a size that depends on the data
                    zeros[id] = torch.zeros_like(x, requires_grad=True)
                return x + zeros[id]

            found = self.program.run({**fixed, **varied}, inputs, watch if zeros else None)
            return [found[v] for v in values], [found[o] for o in self.outputs if zeros]

        with (
            torch.set_grad_enabled(self.backward),
            threads_for(self._elements(count)),
            exact_convolutions(self.device),
        ):
            if self.together:
                seen, outputs = torch.func.vmap(one, randomness="different")(varied, inputs, zeros)
            else:
                single = [{k: t[0] for k, t in part.items()} for part in (varied, inputs, zeros)]
                seen, outputs = ([x[None] for x in part] for part in one(*single))
                zeros = single[2]
            values_seen = {v: x.detach() for v, x in zip(values, seen, strict=True)}
            lengths = {v: self._lengths(v, x) for v, x in values_seen.items()}
            slopes = self._slopes(first, outputs, zeros) if self.backward else {}
        made = [
            self._units(claim, values_seen[claim.end])
            if claim.statistic in UNITS
            else self._ratio(claim, lengths, slopes)
            for claim in self.claims
        ]
        # At once, since the processor waits for it, and what it has a lost device cannot take.
        every: Floats = torch.cat(made, 1).cpu().double().numpy()
        ends = np.cumsum([x.shape[1] for x in made])[:-1]
        for parts, part in zip(self.found, np.split(every, ends, 1), strict=True):
            parts.append(part)

    def _zeros(self, count: int) -> dict[str, Tensor]:
        if not self.backward:
            return {}
        wanted = {v for c in self.claims if "gradient" in c.statistic for v in (c.start, c.end)}
        graph = self.analysis.graph
        return {
            v: torch.zeros((count, *(n or 1 for n in graph.shape(v) or ())), dtype=self.real,
                           device=self.device, requires_grad=True)
            for v in sorted(v for v in wanted if v is not None)
        }  # fmt: skip

    def _slopes(
        self, first: int, outputs: Sequence[Tensor], zeros: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """ln of the squared norm of the gradient at each value: [draw, sample]."""
        total: Tensor | None = None
        for k, y in enumerate(outputs):
            if not y.requires_grad:
                continue

            def normal(generator: torch.Generator, draws: int, shape: Any = y.shape[1:]) -> Tensor:
                x = torch.empty((draws, *shape), dtype=torch.float32, device=self.device)
                return x.normal_(generator=generator)

            blocks = Blocks(self.drawer.seed, 1024 + k, y[0].numel(), self.device)
            part = (y * blocks.draw(first, len(y), normal).to(y.dtype)).sum()
            total = part if total is None else total + part
        if total is None:
            self.no_path.update(zeros)
            return {}
        names = list(zeros)
        gradients = torch.autograd.grad(total, [zeros[v] for v in names], allow_unused=True)
        found = {}
        for v, g in zip(names, gradients, strict=True):
            if g is None:
                self.no_path.add(v)
            else:
                g = g if self.together else g[None]
                found[v] = self._by_sample(v, g).square().sum(-1).log()
        return found

    def _lengths(self, value: str, x: Tensor) -> Tensor:
        """ln of the mean square in each sample: [draw, sample]."""
        return self._by_sample(value, x).square().mean(-1).log()

    def _by_sample(self, value: str, x: Tensor) -> Tensor:
        """[draw, sample, elements]: one sample where they cannot be told apart."""
        roles = self.analysis.signal(value).roles
        axis = roles.index("sample") + 1 if "sample" in roles else 0
        if axis and x.shape[axis] % self.samples == 0:
            x = x.movedim(axis, 1)
            return x.reshape(x.shape[0], self.samples, -1)
        return x.reshape(x.shape[0], 1, -1)

    def _ratio(
        self, claim: Claim, lengths: Mapping[str, Tensor], slopes: Mapping[str, Tensor]
    ) -> Tensor:
        """ln of the ratio that a claim is about, [draw, sample]; infinite where a value is beyond
        numbers, NaN where there is none."""
        table = slopes if "gradient" in claim.statistic else lengths
        end = table.get(claim.end)
        start = table.get(claim.start) if claim.start is not None else None
        if end is None or (claim.start is not None and start is None):
            some = next(iter(lengths.values()))
            return torch.full_like(some[:, :1], torch.nan)
        x = end if start is None else start - end if table is slopes else end - start
        parts = [part for part in (start, end) if part is not None]
        if claim.also is not None:
            parts.append(lengths[claim.also])
            x = x - lengths[claim.also]
        for part in parts:  # infinite or NaN; NaN alone is zero by zero
            x = torch.where(part.isnan() | part.isposinf(), torch.inf, x)
        return x

    def _units(self, claim: Claim, x: Tensor) -> Tensor:
        """ln of what a claim about the features of a value says of each sample, [draw, sample]."""
        roles = self.analysis.signal(claim.end).roles
        features = [a for a, role in enumerate(roles) if role == "feature"]
        axis = features[-1] + 1 if features and len(roles) == x.dim() - 1 else x.dim() - 1
        x = x if self.device.type == "mps" else x.double()
        squared = self._by_sample(claim.end, x.square()).mean(-1)
        common = self._by_sample(claim.end, x.mean(axis, keepdim=True).square()).mean(-1)
        between = (squared - common).clamp(min=0.0)
        if claim.statistic == "unit difference":  # exact zeros count as what rounding leaves
            spread = self._by_sample(claim.end, x.var(axis, unbiased=False, keepdim=True)).mean(-1)
            return (spread.maximum(_ROUNDING * squared) / squared).log()
        return (common / between).log()

    def ratios(self, claim: int) -> tuple[Floats, Lost]:
        """The draws of a claim with finite values, and those that had none."""
        x = np.concatenate(self.found[claim]) if self.found[claim] else np.empty((0, 1))
        zero, beyond = np.isneginf(x), np.isposinf(x).any(1)
        finite = np.isfinite(x).all(1)
        dead = zero.any(1) & ~beyond & ~np.isnan(x).any(1)
        others = int((~finite & ~beyond & ~dead).sum())
        share = float(zero[finite | dead].mean()) if (finite | dead).any() else 0.0
        return x[finite], Lost(int(dead.sum()), int(beyond.sum()), others, share)


def _samples(analysis: Analysis) -> int:
    """How many samples a batch of the graph holds."""
    for id in analysis.graph.inputs:
        shape = analysis.graph.shape(id)
        if shape and shape[0]:
            return shape[0]
    return 1


def free_memory(device: torch.device) -> float:
    """Bytes that are free on a device; of the processor's no more than a container leaves."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return min(_free_of_the_machine(), _free_of_the_container())


def _free_of_the_machine() -> float:
    with suppress(OSError), open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return float(line.split()[1]) * 1024
    with suppress(AttributeError, ValueError, OSError):
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return 4.0 * 2**30


def _free_of_the_container(folder: Path = Path("/sys/fs/cgroup")) -> float:
    """What the limit of a control group leaves (version 2, then 1), infinite without one. What it
    counts as used and gives back when it is needed, files read, is free."""
    for most, now, idle in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):
        with suppress(OSError, ValueError):  # no such file, or "max"
            limit = float((folder / most).read_text())
            used = float((folder / now).read_text())
            for line in (folder / idle).read_text().splitlines():
                name, _, size = line.partition(" ")
                if name in ("inactive_file", "total_inactive_file"):
                    used -= float(size)
                    break
            return max(limit - used, 0.0)
    return math.inf
