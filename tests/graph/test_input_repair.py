"""What a model's own exceptions, code and docstring say about its input is made use of."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from archlint.errors import ArchlintError
from archlint.graph.documented_inputs import Sizes, stated_inputs
from archlint.graph.from_torch import load_torch, record


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(24, 8)


class AsksByName(Base):
    """Says which tensor it lacks."""

    main_input_name = "x"

    def forward(self, x: Tensor, noise_mask: Tensor | None = None) -> Tensor:
        """Mask it.

        noise_mask (`torch.Tensor` of shape `(batch_size, 8)`): what to keep.
        """
        if noise_mask is None:
            raise ValueError("noise_mask must be given in training")
        return self.layer(x) * noise_mask


class AsksByNone(Base):
    """Looks into a tensor that it was not given."""

    def forward(self, x: Tensor, second: Tensor | None = None) -> Tensor:
        """Add.

        second (`torch.Tensor` of shape `(batch_size, 8)`):
            Added.
        """
        return self.layer(x) + self.inner(second)

    def inner(self, second: Tensor | None) -> Tensor:
        return second.abs()  # type: ignore[union-attr]


class AsksByFlag(Base):
    """Raises under a condition that was computed before."""

    def forward(self, x: Tensor, second: Tensor | None = None) -> Tensor:
        """Add.

        second (`torch.Tensor` of shape `(batch_size, 8)`):
            Added.
        """
        lacking = second is None
        if self.training and lacking:
            raise ValueError("everything must be provided")
        return self.layer(x) if second is None else self.layer(x) + second


class Unpacks(nn.Module):
    """Takes videos apart, which no layer tells of."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 8, 3)

    def forward(self, clips: Tensor) -> Tensor:
        batch, num_frames, channels, height, width = clips.size()
        return self.layer(clips.reshape(batch * num_frames, channels, height, width))


class InMultiples(nn.Module):
    """Wants a length that is a multiple."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv1d(1, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] % 50:
            raise ValueError(f"the length {x.shape[-1]} is no multiple of 50")
        return self.layer(x.reshape(x.shape[0], 1, x.shape[-1]))


class AssertsMultiples(InMultiples):
    """The same without a word."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[-1] % 50 == 0
        return self.layer(x.reshape(x.shape[0], 1, x.shape[-1]))


class TellsItsShape(nn.Module):
    """Says what shape it wants."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 5:
            raise ValueError("a 5D tensor of shape (batch_size, 2, num_channels, height, width)")
        return self.layer(x[:, 0]) + self.layer(x[:, 1])


class OfOneSide(nn.Module):
    """Compares a side with its own."""

    def __init__(self) -> None:
        super().__init__()
        self.side = 100
        self.layer = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[2] == self.side
        return self.layer(x)


class UpAndDown(nn.Module):
    """Meets itself at sizes that can be halved five times."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.side = nn.Linear(100, 100)
        self.layer = nn.Conv2d(8, 8, 3, stride=32, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        x = self.first(image[:, :, 1:, 1:])
        return nn.functional.interpolate(self.layer(x), scale_factor=32) + self.first(image)


class LooksUp(nn.Module):
    """Has an embedding that is not its first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(24, 8)
        self.table = nn.Embedding(50, 24)

    def forward(self, places: Tensor) -> Tensor:
        return self.layer(self.table(places))


class RowsOfPatches(nn.Module):
    """Takes patches as rows, and where each is."""

    main_input_name = "pixel_values"
    config = SimpleNamespace(image_size=32, to_dict=dict)

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(48, 8)
        self.table = nn.Embedding(64, 8)

    def forward(self, pixel_values: Tensor, places: Tensor) -> Tensor:
        """Embed.

        places (`torch.LongTensor` of shape `(batch_size, num_patches)`): where a patch is.
        """
        return self.layer(pixel_values) + self.table(places)


class KeptWidth(nn.Module):
    """Takes features of another width than its configuration tells, as long as their mask."""

    main_input_name = "input_features"
    config = SimpleNamespace(num_mel_bins=80, to_dict=dict)

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LayerNorm(160)

    def forward(self, input_features: Tensor, input_features_mask: Tensor) -> Tensor:
        return self.layer(input_features) * input_features_mask[..., None]


@pytest.mark.parametrize(
    ("kind", "names"),
    [(AsksByName, ["x", "noise_mask"]), (AsksByNone, ["x", "second"]),
     (AsksByFlag, ["x", "second"])],
)  # fmt: skip
def test_missing_tensors_are_added(kind: type[nn.Module], names: list[str]) -> None:
    recording, example = record(kind())
    assert list(recording.names) == names
    assert example.assumed
    notes = load_torch(kind()).notes
    assert all(any(f"input {name} assumed" in note for note in notes) for name in names)


@pytest.mark.parametrize(
    ("kind", "fits"),
    [(Unpacks, lambda s: len(s) == 5 and s[2] == 3), (InMultiples, lambda s: s[-1] % 50 == 0),
     (AssertsMultiples, lambda s: s[-1] % 50 == 0), (OfOneSide, lambda s: s[2:] == (100, 100)),
     (LooksUp, lambda s: True), (TellsItsShape, lambda s: s[1:3] == (2, 3)),
     (RowsOfPatches, lambda s: s[0] == 2 and s[2] == 48), (KeptWidth, lambda s: s[2] == 160)],
)  # fmt: skip
def test_shapes_are_mended(kind: type[nn.Module], fits: Any) -> None:
    recording, example = record(kind())
    value = next(n for n in recording.graph.nodes if n.op == "placeholder").meta["val"]
    assert fits(tuple(value.shape))
    args, kwargs = example.drawn()
    assert torch.isfinite(kind()(*args, **kwargs)).all()  # the real model takes it


def test_what_cannot_be_mended_is_told_of_the_first_input() -> None:
    class Never(Base):
        def forward(self, x: Tensor) -> Tensor:
            self.layer(x)
            raise ValueError("7 of 9 never")

    with pytest.raises(ArchlintError, match=r"Never raised ValueError .*7 of 9 never"):
        record(Never())


def test_given_inputs_are_not_changed() -> None:
    with pytest.raises(ArchlintError, match="no multiple of 50"):
        record(InMultiples(), {"x": ((2, 1, 49), None)})


def test_docstrings_and_code_state_shapes() -> None:
    class Stated(Base):
        def forward(self, pixels: Tensor, boxes: Tensor, y: Tensor, z: Tensor) -> Tensor:
            """Look.

            Args:
                pixels (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`):
                    An image.
                boxes (`torch.LongTensor` of shape `(batch_size, 4)` or `(batch_size, 2, 2)`):
                    Where.
                y (`torch.Tensor` of shape `(batch_size, sequence_length)`): out of date

            Returns:
                z (`torch.Tensor` of shape `(1, 1)`): no input
            """
            batch_size, mel_bins, seq_len = y.shape
            return self.layer(y.reshape(batch_size * seq_len, mel_bins)) + z

    found = stated_inputs(Stated())
    assert found["pixels"].dimensions == ("batch_size", "num_channels", "height", "width")
    assert found["boxes"].dimensions == ("batch_size", "4")
    assert "Long" in found["boxes"].kind
    assert found["y"].dimensions == ("batch_size", "mel_bins", "seq_len")
    assert "z" not in found


@pytest.mark.parametrize(
    ("dimension", "size"),
    [("batch_size", 2), ("3", 3), ("num_channels", 5), ("config.width", 48), ("image_size", 64),
     ("num_channels * patch_size ** 2", 80), ("sequence length", 32), ("sequence_length + 1", 33),
     ("num_patches", 256), ("whatever", None), ("f(x)", None), ("", None)],
)  # fmt: skip
def test_names_of_dimensions(dimension: str, size: int | None) -> None:
    class Config:
        num_channels, patch_size, image_size, width = 5, 4, 64, 48

    model = Base()
    model.config = Config()  # type: ignore[assignment]
    assert Sizes(model).of(dimension) == size


class FollowsMasks(nn.Module):
    """Bounds slices by lengths out of masks and of tensors that are filled."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        lengths = x.shape[1] * self.layer(x).new_ones(x.shape[0], dtype=torch.long)
        if (lengths > 4).all():
            return torch.stack([row[: n // 2] for row, n in zip(x, lengths, strict=True)])
        return x


def test_numbers_that_follow_from_shapes_alone_are_known() -> None:
    recording, example = record(FollowsMasks(), {"x": ((2, 6, 8), None)})
    assert not any("real tensors" in note for note in recording.notes)
    args, kwargs = example.drawn()
    found = torch.fx.Interpreter(recording.module()).run(*args, *kwargs.values())
    assert torch.equal(found[0], FollowsMasks()(*args, **kwargs))
    assert found[0].shape == (2, 3, 8)
