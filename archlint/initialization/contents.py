"""What a storage holds while a model is built: which law where, and the call that put it there.

Most storages hold one *piece*. Once a part is written (``w[:n].normal_()``, a padding row) each
run of elements gets a label that says which piece it belongs to; runs are as long as all writes so
far allow, so that rows of an embedding cost a label each and not one an element.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from archlint.finding import Site
from archlint.initialization.laws import Law, unknown

Labels = npt.NDArray[np.int32]

LABELS = 1 << 24  # labels beyond which a storage is not followed: 64 MB


@dataclass(frozen=True, slots=True)
class Event:
    """A call that filled elements. ``default``: a layer's own ``reset_parameters`` did;
    ``initialiser``: it wrote in place into what existed before."""

    text: str = ""
    site: Site | None = None
    default: bool = False
    initialiser: bool = False


@dataclass(frozen=True, eq=False, slots=True)
class Piece:
    """Elements of one law, and the call that decided it. ``law`` is None where the elements
    themselves say it."""

    law: Law | None
    event: Event


class Geometry(NamedTuple):
    """Where a tensor's elements lie in its storage, in elements."""

    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def numel(self) -> int:
        """How many elements it has."""
        return math.prod(self.sizes)

    def merged(self) -> Geometry:
        """The same elements in the same order with as few dimensions as possible."""
        sizes: list[int] = []
        strides: list[int] = []
        for n, step in zip(self.sizes, self.strides, strict=True):
            if n == 1:
                continue
            if strides and strides[-1] == step * n:
                sizes[-1] *= n
                strides[-1] = step
            else:
                sizes.append(n)
                strides.append(step)
        return Geometry(self.offset, tuple(sizes), tuple(strides))

    @property
    def in_order(self) -> bool:
        """Whether it visits elements once, in the order of memory."""
        merged = self.merged()
        steps = merged.strides
        return all(s > 0 for s in steps) and all(
            a >= b * n for a, b, n in zip(steps, steps[1:], merged.sizes[1:], strict=False)
        )


@dataclass(frozen=True)
class Content:
    """The pieces of a tensor in the order of its elements: one, or a label a run of ``run``."""

    pieces: tuple[Piece, ...]
    labels: Labels | None = field(default=None, repr=False)
    run: int = 1

    @property
    def single(self) -> Piece | None:
        """The only piece, None where there are several."""
        return self.pieces[0] if len(self.pieces) == 1 else None

    def shares(self) -> list[tuple[float, Piece]]:
        """Each piece with its share of the elements."""
        if self.labels is None:
            return [(1.0, self.pieces[0])]
        counts = np.bincount(self.labels, minlength=len(self.pieces))
        return [(int(n) / self.labels.size, p) for n, p in zip(counts, self.pieces, strict=True)]

    def mapped(self, function: Callable[[Piece], Piece]) -> Content:
        """The same places with other pieces."""
        return replace(self, pieces=tuple(function(piece) for piece in self.pieces))


def one(piece: Piece) -> Content:
    """A content of one piece."""
    return Content((piece,))


class Storage:
    """The content of one storage of ``numel`` elements.

    ``real``: its elements exist and no draw is in them, so that they tell its law. ``stale``: it
    has memory whose elements are not what the program would see. ``elements`` are those of a
    tensor on meta that was filled with a table as a whole. ``overwritten`` are the initializers of
    which nothing is left.
    """

    def __init__(self, numel: int, piece: Piece, real: bool = False) -> None:
        self.numel = numel
        self.pieces: list[Piece] = [piece]
        self.labels: Labels | None = None
        self.run = numel
        self.real = real
        self.stale = False
        self.elements: Any = None
        self.overwritten: list[Event] = []

    # ------------------------------------------------------------------ reading

    def read(self, where: Geometry) -> Content:
        """The content of a view. A piece of which it shows a part, or in another order, gets the
        part's own draw."""
        where = where.merged()
        if self.labels is None:
            piece = self.pieces[0]
            if where.numel == self.numel and where.in_order:
                return one(piece)
            return one(self._part(piece, where))
        if where.numel == 0:
            return one(self.pieces[0])
        shown = self._shown(where)
        if shown is None:
            return one(Piece(unknown("a view with too many parts"), self.pieces[-1].event))
        flat = np.ascontiguousarray(shown).reshape(-1)
        used, labels = np.unique(flat, return_inverse=True)
        totals = np.bincount(self.labels, minlength=len(self.pieces))
        counts = np.bincount(labels, minlength=len(used))
        pieces = []
        run = where.numel // flat.size
        for i, label in enumerate(used.tolist()):
            piece = self.pieces[label]
            whole = where.in_order and counts[i] * run == totals[label] * self.run
            pieces.append(piece if whole else self._part(piece, where))
        if len(pieces) == 1:
            return one(pieces[0])
        return Content(tuple(pieces), labels.astype(np.int32).reshape(-1), run)

    @staticmethod
    def _part(piece: Piece, where: Geometry) -> Piece:
        if piece.law is None or piece.law.draw is None:
            return piece
        return replace(piece, law=piece.law.part(where))

    # ------------------------------------------------------------------ writing

    def write(self, where: Geometry, content: Content, derived: bool = False) -> None:
        """Put a content in a view. ``derived``: it is made of what the view held before."""
        where = where.merged()
        if where.numel >= self.numel and where.numel and where.in_order:
            self.write_whole(content, derived)
            return
        self.elements = None
        if where.numel == 0:
            return
        shown = self._shown(where, content.run if content.labels is not None else 0)
        if shown is None:
            piece = Piece(unknown("a write with too many parts"), content.pieces[-1].event)
            self.pieces, self.labels, self.run = [piece], None, self.numel
            return
        before = np.unique(shown).tolist() if not derived else []
        base = len(self.pieces)
        self.pieces += content.pieces
        if content.labels is None:
            shown[...] = base
        else:
            run = where.numel // shown.size
            labels = np.repeat(content.labels, content.run // run)
            shown[...] = (labels + base).reshape(shown.shape)
        assert self.labels is not None
        if before:
            left = set(np.unique(self.labels).tolist())
            self._leave([i for i in before if i not in left], content.pieces)
        self._compact()

    def write_whole(self, content: Content, derived: bool = False) -> None:
        """The same in the place of everything."""
        self.elements = None
        if not derived:
            self._leave(range(len(self.pieces)), content.pieces)
        self.pieces = list(content.pieces)
        self.labels = content.labels
        self.run = self.numel if content.labels is None else content.run

    def _leave(self, gone: Sequence[int] | range, by: Sequence[Piece]) -> None:
        """Note the initializers of which nothing is left."""
        left = [event for i in gone if (event := self.pieces[i].event).initialiser]
        if left:
            new = {(p.event.text, p.event.site) for p in by}
            self.overwritten += [event for event in left if (event.text, event.site) not in new]

    def change(self, where: Geometry, function: Callable[[Piece], Piece]) -> None:
        """Replace every piece in a view by what ``function`` makes of it."""
        self.write(where, self.read_raw(where).mapped(function), derived=True)

    def read_raw(self, where: Geometry) -> Content:
        """As :meth:`read`, with the draws as they are."""
        where = where.merged()
        if self.labels is None:
            return one(self.pieces[0])
        shown = self._shown(where)
        if shown is None:
            return one(Piece(unknown("a view with too many parts"), self.pieces[-1].event))
        flat = np.ascontiguousarray(shown).reshape(-1)
        used, labels = np.unique(flat, return_inverse=True)
        pieces = tuple(self.pieces[label] for label in used.tolist())
        if len(pieces) == 1:
            return one(pieces[0])
        return Content(pieces, labels.astype(np.int32).reshape(-1), where.numel // flat.size)

    def label(self, flat: npt.NDArray[np.int64], run: int, piece: Piece) -> bool:
        """Put a piece in the runs of ``run`` elements numbered by ``flat``; whether it could."""
        if not self._refine(run):
            return False
        self.elements = None
        assert self.labels is not None
        inside = run // self.run
        places = (flat.reshape(-1, 1) * inside + np.arange(inside)).reshape(-1)
        self.pieces.append(piece)
        self.labels[places] = len(self.pieces) - 1
        self._compact()
        return True

    # ------------------------------------------------------------------ labels

    def _refine(self, run: int) -> bool:
        """Make the runs divide ``run``; whether there is room for as many labels."""
        wanted = math.gcd(self.run, run) or 1
        if self.numel // wanted > LABELS:
            return False
        if self.labels is None:
            self.labels = np.zeros(self.numel // wanted, np.int32)
        elif wanted != self.run:
            self.labels = np.repeat(self.labels, self.run // wanted)
        self.run = wanted
        return True

    def _shown(self, where: Geometry, also: int = 0) -> Labels | None:
        """A view's labels, writable; None where there would be too many."""
        *_, last = where.sizes or (1,)
        contiguous = bool(where.strides) and where.strides[-1] == 1
        length = last if contiguous else 1
        outer = where.strides[:-1] if contiguous else where.strides
        run = math.gcd(where.offset, length, also, *outer)
        if not self._refine(run or length):
            return None
        assert self.labels is not None
        run = self.run
        sizes = list(where.sizes[:-1] if contiguous else where.sizes)
        strides = [s // run for s in outer]
        if contiguous:
            sizes.append(length // run)
            strides.append(1)
        width = self.labels.itemsize
        last_label = where.offset // run + sum(
            (n - 1) * s for n, s in zip(sizes, strides, strict=True)
        )
        if math.prod(sizes) > LABELS or last_label >= self.labels.size:
            return None
        return np.lib.stride_tricks.as_strided(
            self.labels[where.offset // run :], sizes, [s * width for s in strides]
        )

    def _compact(self) -> None:
        """Forget pieces that nothing is left of; one label is none."""
        assert self.labels is not None
        used, labels = np.unique(self.labels, return_inverse=True)
        self.pieces = [self.pieces[i] for i in used.tolist()]
        if len(used) == 1:
            self.labels, self.run = None, self.numel
        else:
            self.labels = labels.astype(np.int32).reshape(-1)
