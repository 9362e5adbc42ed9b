"""Many independent draws of a network's weights at once, straight from their laws.

The random numbers of a draw come from a generator of its own, seeded by the run's seed and the
draw's number; on a GPU, where a call costs more than its numbers, from that of a block of draws,
whose size depends on the network alone. So the same seed gives the same networks, however draws are
grouped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from archlint.graph.model import Parameter
from archlint.initialization.distribution import Distribution
from archlint.probe.execute import as_tensor
from archlint.probe.ops.frame import torch_dtype

# Families that are drawn as the law says; any other by its first two moments.
EXACT = frozenset({"normal", "uniform", "truncated_normal", "constant", "zeros", "ones",
                   "orthogonal", "sparse", "dirac", "eye", "two_point", "laplace"})  # fmt: skip
_SCALED = ("normal", "uniform", "mixture", "trained")
_WORTH_THREADS = 500_000  # random numbers of a chunk
_SEEDS = 0x9E3779B97F4A7C15  # odd: distinct draws get distinct seeds
_MOST = 64  # draws of a block
Room = dict[str, Tensor]  # memory for the numbers of draws, used again by whoever keeps it


@dataclass(frozen=True)
class Blocks:
    """Numbers for draws from a device's own generator, a block of draws by a call.

    ``salt`` tells apart what is drawn for one network; ``elements`` are the numbers of one draw,
    ``bound`` those of a block.
    """

    seed: int
    salt: int
    elements: int
    device: torch.device
    bound: int = 2**16

    @property
    def size(self) -> int:
        """How many draws a block has: a power of two, as chunks most often are."""
        most = min(_MOST, self.bound // max(self.elements, 1))
        return 1 << max(most.bit_length() - 1, 0)

    def draw(
        self, first: int, count: int, make: Callable[[torch.Generator, int], Tensor]
    ) -> Tensor:
        """[count, …]: the numbers of draws ``first`` … ``first + count − 1``, of those that
        ``make`` gives for a whole block, [size, …]."""
        generator, size, parts = torch.Generator(self.device), self.size, []
        for number in range(first // size, (first + count - 1) // size + 1):
            seed = (self.seed * 1_000_003 + number) * _SEEDS + self.salt * 0xD1342543DE82EF95
            generator.manual_seed(seed % 2**63)
            start = number * size
            parts.append(make(generator, size)[max(first - start, 0) : first + count - start])
        return parts[0] if len(parts) == 1 else torch.cat(parts)


@dataclass(frozen=True)
class Plan:
    """How a parameter is drawn: what kind of numbers, and where they lie in the draw's row."""

    parameter: Parameter
    law: Distribution | None
    kind: str  # "normal", "uniform", or "" for what is not random
    start: int
    size: int

    @property
    def end(self) -> int:
        """Where the next one lies."""
        return self.start + self.size + self.size % 2

    @property
    def scaled(self) -> bool:
        """Whether a draw is numbers of the kind, scaled and shifted."""
        return self.law is not None and self.law.family in _SCALED and self.law.std > 0.0


class Drawer:
    """Draws parameters. ``remarks`` say what is only approximately what the network would draw."""

    def __init__(
        self,
        parameters: Mapping[str, Parameter],
        seed: int,
        real: torch.dtype,
        device: torch.device,
    ) -> None:
        self.seed, self.real, self.device = seed, real, device
        self.plans: dict[str, Plan] = {}
        self.sizes = {"normal": 0, "uniform": 0}
        self.fixed: dict[str, Tensor] = {}
        rough: list[str] = []
        estimated = False
        for name, parameter in parameters.items():
            law = parameter.law
            kind = _kind(law)
            if kind and law is not None:
                if law.family not in EXACT:
                    rough.append(name)
                estimated = estimated or not law.exact
            elif parameter.load is None and (
                law is None or law.family in ("unknown", "uninitialised", "deterministic")
            ):
                rough.append(name)
            size = math.prod(parameter.shape) if kind else 0
            origin = parameters.get(parameter.clone_of or "")
            if origin is not None and origin.name in self.plans:
                self.plans[name] = self.plans[origin.name]
                continue
            self.plans[name] = Plan(parameter, law, kind, self.sizes.get(kind, 0), size)
            if kind:
                self.sizes[kind] += size + size % 2  # they come in pairs
        self.tables = {kind: self._tables(kind) for kind in self.sizes}
        remarks = []
        if estimated:
            remarks.append("the laws of the weights are estimated from the weights themselves")
        if rough:
            some = ", ".join(rough[:3]) + (" …" if len(rough) > 3 else "")
            remarks.append(f"drawn by mean and variance alone, their law being unknown: {some}")
        self.remarks = tuple(remarks)

    def _tables(self, kind: str) -> list[tuple[int, int, Distribution | None]]:
        """Stretches of a draw's row whose numbers are of one law: those of weights that are drawn
        as they are found in the table, scale included, and of those that are made of them (None).
        """
        found: list[tuple[int, int, Distribution | None]] = []
        for plan in sorted({id(p): p for p in self.plans.values()}.values(), key=lambda p: p.start):
            if plan.kind != kind or not plan.size:
                continue
            law = plan.law if plan.scaled else None
            last = found[-1][2] if found else None
            if (
                found
                and (law is None) == (last is None)
                and (law is None or last is None or (law.mean, law.std) == (last.mean, last.std))
            ):
                found[-1] = (found[-1][0], plan.end, last)
            else:
                found.append((plan.start, plan.end, law))
        return found

    @property
    def elements(self) -> int:
        """Random numbers of one draw."""
        return sum(self.sizes.values())

    def draw(self, first: int, count: int, room: Room | None = None) -> dict[str, Tensor]:
        """Draws ``first`` … ``first + count − 1``: name -> [count, *shape]; without the first
        axis where a parameter is the same in every draw. They hold until ``room`` is used again."""
        fill = self._by_table if self.device.type == "cpu" else self._by_torch
        rows = fill(first, count, {} if room is None else room)
        found: dict[str, Tensor] = {}
        made: dict[int, Tensor] = {}
        for name, plan in self.plans.items():
            if not plan.kind:
                found[name] = self._constant(name, plan)
                continue
            if id(plan) not in made:
                part = rows[plan.kind][:, plan.start : plan.start + plan.size]
                made[id(plan)] = self._shaped(plan, part)
            found[name] = made[id(plan)]
        return found

    def _by_table(self, first: int, count: int, room: Room) -> dict[str, Tensor]:
        """Two numbers by 16 bits, out of 65,536 equally likely pairs. Five times as fast as exact
        numbers, which are most of the cost of a small network."""
        rows = {}
        for kind, size in self.sizes.items():
            if size:
                if kind not in room or len(room[kind]) < count:
                    room[kind] = torch.empty((count, size), dtype=torch.float32)
                rows[kind] = room[kind][:count]
        one = partial(self._row, {kind: t.numpy().view(np.float64) for kind, t in rows.items()},
                      first)  # fmt: skip
        workers = torch.get_num_threads()
        if workers > 1 and count > 1 and self.elements * count > _WORTH_THREADS:
            with ThreadPoolExecutor(workers) as pool:  # filling lets other threads run
                list(pool.map(one, range(count)))
        else:
            for i in range(count):
                one(i)
        return rows

    def _row(self, rows: Mapping[str, npt.NDArray[np.float64]], first: int, i: int) -> None:
        bits = np.random.SFC64([self.seed, first + i])
        for kind, row in rows.items():
            pairs = row.shape[1]
            raw = np.asarray(bits.random_raw(pairs // 4 + 1)).view(np.uint16)[:pairs]
            out = row[i]
            for start, stop, law in self.tables[kind]:
                table = _pairs(kind, law.mean, law.std) if law else _pairs(kind)
                some = slice(start // 2, stop // 2)
                np.take(table, raw[some], out=out[some], mode="wrap")

    def _by_torch(self, first: int, count: int, room: Room) -> dict[str, Tensor]:
        """Numbers of the device's own generator."""

        def make(kind: str, generator: torch.Generator, draws: int) -> Tensor:
            x = torch.empty((draws, self.sizes[kind]), dtype=torch.float32, device=self.device)
            return x.normal_(generator=generator) if kind == "normal" else x.uniform_(
                generator=generator
            )  # fmt: skip

        return {
            kind: Blocks(self.seed, k, size, self.device, 2**22).draw(
                first, count, partial(make, kind)
            )
            for k, (kind, size) in enumerate(self.sizes.items())
            if size
        }

    def _constant(self, name: str, plan: Plan) -> Tensor:
        if name not in self.fixed:
            self.fixed[name] = _fixed(plan.parameter, plan.law, self.real, self.device)
        return self.fixed[name]

    def _shaped(self, plan: Plan, numbers: Tensor) -> Tensor:
        law = plan.law
        assert law is not None
        shape = (numbers.shape[0], *plan.parameter.shape)
        dtype = torch_dtype(plan.parameter.dtype, self.real) or self.real
        x = numbers.to(dtype)
        if plan.scaled and self.device.type == "cpu":  # as they come from the table
            return x.reshape(shape)
        match law.family:
            case "orthogonal":
                x = _orthogonal(x.reshape(shape), math.sqrt(law.second_moment))
            case "uniform":
                half = math.sqrt(3.0) * law.std
                x = x.mul_(2 * half).add_(law.mean - half)
            case "truncated_normal":
                cut, std = _cut(law.kurtosis)
                low = NormalDist().cdf(-cut)
                x = torch.special.ndtri(low + (1 - 2 * low) * x) * (law.std / std) + law.mean
            case "sparse":  # E w² = (1 − s)σ², kurtosis 3/(1 − s)
                share = min(3.0 / law.kurtosis, 1.0)
                x = _sparse(x.reshape(shape), share) * math.sqrt(law.second_moment / share)
            case "two_point":
                x = torch.where(x < 0.5, -law.std, law.std) + law.mean
            case "laplace":
                centred = x - 0.5
                size = -torch.log1p(-2 * centred.abs().clamp(max=0.5 - 1e-9)) / math.sqrt(2)
                x = centred.sign() * size * law.std + law.mean
            case _:
                x = x.mul_(law.std) if law.mean == 0.0 else x.mul_(law.std).add_(law.mean)
        return x.reshape(shape)


_RADII, _ANGLES = 2048, 32


@lru_cache(maxsize=32)
def _pairs(kind: str, mean: float = 0.0, std: float = 0.0) -> npt.NDArray[np.float64]:
    """65,536 pairs of numbers, each pair's eight bytes as one float64: of a mean and a standard
    deviation, without one of variance one (normal) or on (0, 1).

    Normal: 2,048 radii, which are the means of as many equal parts of the law of r², with 32 angles
    each, turned by the golden section from one radius to the next. All joint moments are those of
    independent numbers up to the 31st in the angle; the kurtosis is 2.999. Uniform: a grid of 256
    by 256, each place of which is shifted so that either number has 65,536 values.
    """
    if kind == "normal":
        u = np.linspace(0.0, 1.0, _RADII + 1)
        below = u + (1 - u) * np.log(np.maximum(1 - u, 1e-300))  # ∫ −ln(1 − u): r²/2 is Exp(1)
        radius = np.sqrt(2 * _RADII * np.diff(below))[:, None]
        turn = np.arange(_RADII)[:, None] * ((math.sqrt(5) - 1) / 2)
        angle = 2 * math.pi / _ANGLES * (np.arange(_ANGLES) + turn)
        found = np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1).reshape(-1, 2)
        unit = 1.0
    else:
        place = np.arange(256)
        shift = np.random.default_rng(0).permutation(256)
        x = place[:, None] + (shift[None, :] + 0.5) / 256
        found = np.stack([x, x.T], -1).reshape(-1, 2) / 256
        unit = math.sqrt(12.0)
    if std > 0.0:
        found = mean + std * unit * (found - (0.5 if kind == "uniform" else 0.0))
    return np.ascontiguousarray(found, np.float32).view(np.float64).ravel()


def _kind(law: Distribution | None) -> str:
    if law is None or not law.random or law.family in ("unknown", "uninitialised"):
        return ""
    if law.family in ("uniform", "truncated_normal", "two_point", "laplace"):
        return "uniform"
    return "normal"


def _fixed(
    parameter: Parameter, law: Distribution | None, real: torch.dtype, device: torch.device
) -> Tensor:
    """A parameter that every draw has alike."""
    dtype = torch_dtype(parameter.dtype, real)
    shape = parameter.shape
    known = law is not None and law.family in ("constant", "zeros", "ones")
    if parameter.load is not None and not known:
        return as_tensor(parameter.load(), dtype, device)
    if law is not None and law.family == "dirac":
        weight = torch.zeros(shape, dtype=dtype, device=device)
        torch.nn.init.dirac_(weight)
        return weight
    if law is not None and law.family == "eye" and len(shape) == 2:
        return torch.eye(*shape, dtype=dtype, device=device)
    value = law.mean if law is not None else 0.0
    return torch.full(shape, value, dtype=dtype, device=device)


def _orthogonal(x: Tensor, std: float) -> Tensor:
    """Matrices with orthonormal rows or columns, Haar distributed, scaled to an element's
    standard deviation: [draw, rows, *rest] from normal numbers (Mezzadri 2007)."""
    matrix = x.flatten(2)
    rows, columns = matrix.shape[1:]
    wide = rows < columns
    q, r = torch.linalg.qr(matrix.transpose(1, 2) if wide else matrix)
    q = q * torch.diagonal(r, dim1=1, dim2=2).sign()[:, None, :]
    q = q.transpose(1, 2) if wide else q
    found: Tensor = q * (std * math.sqrt(max(rows, columns)))
    return found.reshape(x.shape)


def _sparse(x: Tensor, share: float) -> Tensor:
    """Normal numbers of which a share stays in every column, the rest zero (torch's ``sparse_``):
    which ones is told by the numbers' own order, that of their fractional parts."""
    rows = x.shape[1]
    zeros = rows - round(share * rows)
    order = (x.abs() * 4096.0).frac().argsort(1).argsort(1)
    return torch.where(order < zeros, torch.zeros_like(x), x)


@lru_cache(maxsize=64)
def _cut(kurtosis: float) -> tuple[float, float]:
    """Where a normal law of this kurtosis is cut (±, in its own σ), and its σ after the cut."""
    low, high = 0.05, 12.0
    for _ in range(60):
        middle = (low + high) / 2
        if _moments(middle)[1] < kurtosis:
            low = middle
        else:
            high = middle
    return low, math.sqrt(_moments(low)[0])


def _moments(cut: float) -> tuple[float, float]:
    """Variance and kurtosis of N(0, 1) cut to ±cut."""
    normal = NormalDist()
    mass = 2 * normal.cdf(cut) - 1
    edge = 2 * cut * normal.pdf(cut) / mass
    second = 1 - edge
    fourth = 3 * second - edge * cut * cut
    return second, fourth / second**2
