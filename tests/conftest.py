"""What all tests share: small-machine settings, torchvision's operators, the real files."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent

# Before numpy, torch or onnxruntime start their pools: one thread each is enough for small models.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

# --------------------------------------------------------------------------- torchvision

_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_kept: list[Any] = []  # the library lives as long as the operators are needed


class _TorchvisionOperators:
    """Defines torchvision's operators when torchvision is first imported, by timm for instance.

    Its import registers meta kernels for operators that its compiled library defines; that library
    is built for CUDA alone and cannot be loaded beside a CPU torch. torch is imported only here,
    so tests that need no torchvision pay nothing.
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == "torchvision" and not _kept:
            spec = PathFinder.find_spec(name)
            folders = (spec.submodule_search_locations or []) if spec is not None else []
            if folders and not _loads([p for f in folders for p in Path(f).glob("_C*.so")]):
                import torch

                library = torch.library.Library("torchvision", "FRAGMENT")
                for schema in _OPERATORS:
                    library.define(schema)
                _kept.append(library)
        return None  # the import itself goes its usual way


def _loads(libraries: Sequence[Path]) -> bool:
    """Whether torchvision's own compiled library can be loaded here."""
    import torch

    try:
        for library in libraries:
            torch.ops.load_library(str(library))
    except OSError:
        return False
    return bool(libraries)


sys.meta_path.insert(0, _TorchvisionOperators())  # type: ignore[arg-type]


# --------------------------------------------------------------------------- real files


def load_script(path: Path) -> ModuleType:
    """A script of the repository as a module, whatever the working directory."""
    name = f"archlint_{path.parent.name}_{path.stem}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def real_files() -> Mapping[str, Path]:
    """Every public real ONNX file by its name ``package/file``, fetched where it is missing.

    Without a network the tests that need them are skipped; not so where ``CI`` or
    ``ARCHLINT_REQUIRE_REAL`` is set.
    """
    download = load_script(ROOT / "fixtures" / "real" / "download.py")
    try:
        found: dict[str, Path] = download.ensure(download.default_cache())
    except download.DownloadError as error:
        reason = f"the real files cannot be had: {error}"
        if os.environ.get("CI") or os.environ.get("ARCHLINT_REQUIRE_REAL"):
            pytest.fail(reason)
        pytest.skip(reason)
    return found
