"""Targets of Python code on the command line: what is linted, and what is said of what is not."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from torch import nn

from tests.terminal import ROOT, run, run_here, write

NET = '''\
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width: int = 64):
        super().__init__()
        self.fc = nn.Linear(width, width)

    def forward(self, x):
        return torch.relu(self.fc(x))


class Net(nn.Module):
    """Shrinks its signal with torch's default initialization."""

    def __init__(self, depth: int = 20, width=64):
        super().__init__()
        self.layers = nn.ModuleList([Block(width) for _ in range(depth)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Needy(nn.Module):
    def __init__(self, width, *, classes):
        super().__init__()
        self.fc = nn.Linear(width, classes)

    def forward(self, x):
        return self.fc(x)


def build(depth: int = 3) -> nn.Module:
    if depth < 0:
        raise ValueError("depth must be positive")
    return Net(depth)


class Outer:
    Inner = Net


model = Net()
number = 3
'''


@pytest.fixture(autouse=True)
def no_module_of_another_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another folder's ``net`` that this process has imported."""
    monkeypatch.delitem(sys.modules, "net", raising=False)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    write(folder, "net.py", NET)
    return folder


def check(folder: Path, source: str, *args: object, target: str = "m.py:Net") -> tuple[int, str]:
    """Exit code and all that is said of a module of a project."""
    header = "import torch\nfrom torch import nn\n\n\n"
    write(folder, "m.py", header + dedent(source))
    done = run_here(folder, target, "--format", "concise", *args)
    assert "mistake of archlint" not in done.err
    assert "archlint/" not in done.err
    return done.code, done.err + done.out


# --------------------------------------------------------------------------- targets


@pytest.mark.parametrize(
    "target",
    ["net.py:Net", "net:Net", "net.py:Outer.Inner", "net.py:build(depth=20)", "net.py:Net(20, 64)",
     "net.py:model", "./net.py:Net"],
)  # fmt: skip
def test_the_same_model_by_its_names(project: Path, target: str) -> None:
    done = run_here(project, target, "--format", "json")
    assert done.err == ""
    (found,) = json.loads(done.out)["targets"]
    assert found["target"] == target
    assert found["input"] == {"x": "2x64"}
    assert found["coverage"]["nodes"] == 40
    assert [f["code"] for f in found["findings"]] == ["ARC101"]
    assert done.code == 1


def test_kwargs(project: Path) -> None:
    done = run_here(
        project, "net.py:Net", "--kwargs", '{"depth": 1, "width": 8}', "--format", "json"
    )
    (found,) = json.loads(done.out)["targets"]
    assert found["target"] == "net.py:Net(depth=1, width=8)"
    assert found["input"] == {"x": "2x8"}


def test_a_whole_file_means_the_models_in_it(project: Path) -> None:
    done = run_here(project, "net.py", "--format", "json", "--fail-on", "never")
    assert [t["target"] for t in json.loads(done.out)["targets"]] == ["net.py:Net"]
    assert "need arguments: Needy(width, *, classes)" in done.err
    assert done.code == 0


def test_a_file_without_models(tmp_path: Path) -> None:
    code, said = check(tmp_path, "def build(n: int) -> nn.Module: ...", target="m.py")
    assert code == 2
    assert "defines no model that can be built without arguments" in said
    assert "build(n: int)" in said


def test_a_call_with_literals() -> None:
    pytest.importorskip("timm")
    done = run_here(ROOT, 'timm:create_model("resnet18", num_classes=10)', "--format", "json")
    assert done.code == 0, done.err
    (found,) = json.loads(done.out)["targets"]
    assert found["input"] == {"x": "2x3x224x224"}
    done = run_here(ROOT, 'timm:create_model("resnet1")')
    assert done.code == 2
    assert 'building timm:create_model("resnet1") raised RuntimeError: Unknown model' in done.err


def test_without_torch(project: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None; sys.argv = ['archlint', 'net.py:Net']\n"
        "from archlint.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=project,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: net.py:Net is a PyTorch model, and torch is not installed here",
        "  hint: pip install 'archlint-nn[torch]', into the environment that the model runs in",
    ]


MISTAKES = {
    "net.py:Nett": ("net.py has no attribute 'Nett'", "did you mean net.py:Net?"),
    "net.py:Outer.Iner": (
        "net.py:Outer has no attribute 'Iner'",
        "did you mean net.py:Outer.Inner?",
    ),
    "net.py:zzz": ("has no attribute 'zzz'", "models there: Block(width: int = 64), Net("),
    "nett:Net": ("there is no module 'nett'", "did you mean net?"),
    "torch.optimm:SGD": ("there is no module 'torch.optimm'", "did you mean torch.optim?"),
    "nett.py:Net": ("nett.py does not exist", "did you mean net.py?"),
    "net.py:number": ("net.py:number is an int, not a model", "models there: Block("),
    "net.py:Needy": ("needs arguments: Needy(width, *, classes)", '--kwargs \'{"width": …'),
    "net.py:Needy(3)": ("needs arguments: Needy(width, *, classes)", "Needy(classes=…)"),
    "net.py:Net(dept=3)": ("Net has no parameter 'dept'", "did you mean 'depth'?"),
    "net.py:Net(1, 2, 3)": ("too many positional arguments: Net(depth: int = 20, width=64)", None),
    "net.py:model()": ("model is a model already", "name the class or function"),
    "net.py:Net(x)": ("the argument x of Net is no literal", "write a function"),
    "net.py::Net": ("':Net' is no name", "write net.py:name"),
    "net.Net": ("net.Net is neither a file nor a target", "write net:Net"),
    "model.pt": ("a pickled file is never loaded", "name the code"),
}


@pytest.mark.parametrize("target", MISTAKES)
def test_mistakes_in_the_name(project: Path, target: str) -> None:
    message, hint = MISTAKES[target]
    done = run_here(project, target)
    assert done.code == 2
    assert done.out == ""
    first, *rest = done.err.splitlines()
    assert first.startswith("error: ")
    assert message in first
    assert len(rest) == (hint is not None)
    assert hint is None or (rest[0].startswith("  hint: ") and hint in rest[0])


def test_one_bad_target_hides_nothing(project: Path) -> None:
    done = run_here(project, "net.py:Nett", "net.py:Net", "net.py:Needy", "--format", "json")
    targets = json.loads(done.out)["targets"]
    assert [t["target"] for t in targets] == ["net.py:Nett", "net.py:Net", "net.py:Needy"]
    assert [bool(t["findings"]) for t in targets] == [False, True, False]
    assert targets[2]["error"]["message"].startswith("net.py:Needy needs arguments")
    assert done.code == 2


# --------------------------------------------------------------------------- importing


def test_a_file_of_a_package_has_its_name_there(tmp_path: Path) -> None:
    write(tmp_path, "src/pkg/__init__.py", "")
    write(tmp_path, "src/pkg/models/__init__.py", "")
    write(tmp_path, "src/pkg/parts.py", NET)
    write(tmp_path, "src/pkg/models/big.py",
          "from ..parts import Net\nassert __name__ == 'pkg.models.big', __name__\n")  # fmt: skip
    for target in ("src/pkg/models/big.py:Net", "./src/pkg/models/big.py:Net"):
        assert run_here(tmp_path, target).code == 1
    assert run_here(tmp_path / "src", "pkg.models.big:Net").code == 1
    assert run_here(tmp_path / "src", "pkg:models.big.Net").code == 1
    done = run_here(tmp_path, "pkg.models.big:Net")
    assert "it is below src/" in done.err


def test_relative_imports_without_a_package_file(tmp_path: Path) -> None:
    write(tmp_path, "models/parts.py", NET)
    write(tmp_path, "models/big.py", "from .parts import Net\n")
    assert run_here(tmp_path, "models/big.py:Net").code == 1
    assert run_here(tmp_path, "models.big:Net").code == 1


def test_files_of_one_name_in_two_folders(tmp_path: Path) -> None:
    write(tmp_path, "a/net.py", NET)
    write(tmp_path, "b/net.py", NET.replace("depth: int = 20", "depth: int = 21"))
    done = run_here(tmp_path, "a/net.py:Net", "b/net.py:Net", "--format", "json")
    counts = [t["coverage"]["nodes"] for t in json.loads(done.out)["targets"]]
    assert counts == [40, 42]


def test_a_file_with_the_name_of_a_module_of_the_library(tmp_path: Path) -> None:
    write(tmp_path, "code.py", NET)
    write(tmp_path, "json.py", NET)
    assert run_here(tmp_path, "code.py:Net", "json.py:Net").code == 1


def test_a_missing_dependency_is_theirs(tmp_path: Path) -> None:
    code, said = check(tmp_path, "import nothing_of_this_name\n")
    assert code == 2
    assert "importing m.py raised ModuleNotFoundError: No module named 'nothing_of_this" in said
    assert 'File "m.py", line 5, in <module>' in said
    assert "import nothing_of_this_name" in said


def test_a_syntax_error_is_theirs(tmp_path: Path) -> None:
    code, said = check(tmp_path, "class Net(nn.Module)\n    pass\n")
    assert code == 2
    assert "raised SyntaxError: expected ':'" in said
    assert "class Net(nn.Module)" in said.splitlines()[2]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import sys; sys.exit('no')", "importing m.py ended the program: sys.exit('no')"),
        ("import argparse; argparse.ArgumentParser().parse_args(); raise KeyError(3)",
         "importing m.py raised KeyError: 3"),
        ("class Stop(BaseException): ...\nraise Stop('now')", "raised Stop: now"),
        ("class Odd(Exception):\n    def __str__(self): raise self\nraise Odd", "raised Odd: (its"),
        ("raise ExceptionGroup('two', [ValueError(1), KeyError(2)])", "ExceptionGroup: two (2"),
        ("def f(): f()\nf()", "raised RecursionError: maximum recursion depth"),
        ("def __getattr__(name): raise OSError(name)", "reading m.py:Net raised OSError: Net"),
    ],
)  # fmt: skip
def test_what_importing_raises(tmp_path: Path, source: str, message: str) -> None:
    code, said = check(tmp_path, source)
    assert code == 2
    assert message in said.splitlines()[0]


# --------------------------------------------------------------------------- building, running


def model(init: str = "pass", forward: str = "return self.fc(x)", more: str = "") -> str:
    return (
        f"class Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        f"        self.fc = nn.Linear(8, 8)\n        {init}\n\n"
        f"    def forward(self, x):\n        {forward}\n{more}"
    )


def test_a_constructor_that_raises(project: Path) -> None:
    done = run_here(project, "net.py:build(depth=-1)")
    assert done.code == 2
    assert done.err.splitlines() == [
        "error: building net.py:build(depth=-1) raised ValueError: depth must be positive",
        '    File "net.py", line 38, in build',
        '      raise ValueError("depth must be positive")',
        "  ValueError: depth must be positive",
    ]


def test_a_shape_that_does_not_fit(project: Path) -> None:
    done = run_here(project, "net.py:Net", "--input", "x:2x63")
    assert done.code == 2
    assert "layers.0.fc (Linear) raised RuntimeError with the input x:2x63" in done.err
    assert "63" in done.err.splitlines()[0]
    assert "x = layer(x)" in done.err
    done = run_here(project, "net.py:Net", "--input", "y:2x64")
    assert "Net.forward has no parameter 'y'" in done.err


RAISES = {
    "forward": (
        model(forward="raise ValueError('no')"),
        "raised ValueError",
        "raise ValueError('no')",
    ),
    "exit": (
        model(forward="import sys; sys.exit(3)"),
        "ended the program: sys.exit(3)",
        "sys.exit(3)",
    ),
    "returns": ("def Net(): return 3", "m.py:Net returned int, not an nn.Module", ""),
    "nothing": ("def Net(): pass", "returned NoneType", ""),
    "no_super": (
        "class Net(nn.Module):\n    def __init__(self):\n        self.fc = nn.Linear(2, 2)",
        "cannot assign module before Module.__init__() call",
        "self.fc = nn.Linear(2, 2)",
    ),
    "no_forward": ("class Net(nn.Module):\n    pass", "forward", ""),
    "abstract": (
        "import abc\nclass Net(nn.Module, abc.ABC):\n    @abc.abstractmethod\n    def f(self): ...",
        "Can't instantiate abstract class",
        "",
    ),
    "missing_operator": (
        model(forward="return torch.ops.mine.fused(x)"),
        "'_OpNamespace' 'mine' object has no",
        "fused",
    ),
    "metaclass": (
        "class Meta(type):\n    def __call__(cls, *a, **k): raise RuntimeError('meta')\n"
        "class Net(nn.Module, metaclass=Meta): ...",
        "raised RuntimeError: meta",
        "RuntimeError('meta')",
    ),
    "deleted": (model(init="del self.fc"), "'Net' object has no attribute 'fc'", "self.fc(x)"),
}


@pytest.mark.parametrize("name", RAISES)
def test_what_building_and_running_raise(tmp_path: Path, name: str) -> None:
    source, message, line = RAISES[name]
    code, said = check(tmp_path, source, "--input", "x:2x8")
    assert code == 2
    assert message in said.splitlines()[0]
    assert line in said


HANGS = {
    "import": "while True: pass",
    "constructor": model(init="while True: pass"),
    "forward": model(forward="while True: pass"),
    "sleep": model(forward="import time; time.sleep(1000)"),
    "swallowed": model(
        forward="\n        while True:\n            try:\n                while True: x = x + 0\n"
        "            except: pass"
    ),
    "lock": model(init="import threading; lock = threading.Lock(); lock.acquire(); lock.acquire()"),
    "child": model(forward="import subprocess; subprocess.run(['sleep', '1000'])"),
}


@pytest.fixture(scope="module")
def warm(project: Path) -> None:
    """What torch imports when it first builds and runs a model: no import is to be cut short."""
    assert run_here(project, "net.py:Net(depth=1)").code == 0


@pytest.mark.parametrize("name", HANGS)
def test_what_never_ends(tmp_path: Path, warm: None, name: str) -> None:
    code, said = check(tmp_path, HANGS[name], "--timeout", "1.5", "--input", "x:2x8")
    assert code == 2
    assert "m.py:Net did not finish within 1.5 s: it was at m.py:" in said
    assert "raise the limit with --timeout" in said


STUCK = """
    import ctypes

    class Stuck(Net):
        def forward(self, x):
            lock, library = ctypes.create_string_buffer(256), ctypes.CDLL(None)
            library.pthread_mutex_lock(lock)
            library.pthread_mutex_lock(lock)  # never comes back, whatever signal arrives
            return super().forward(x)
"""


WARM = """
import sys, archlint
from archlint.cli import main

archlint.check("net.py:Net(depth=1)")  # what is imported on the way has no limit here
sys.argv[0] = "archlint"
main()
"""


@pytest.mark.parametrize("form", ["concise", "json"])
def test_a_call_that_cannot_be_interrupted(tmp_path: Path, form: str) -> None:
    """Ends the process, with what was found before."""
    write(tmp_path, "net.py", NET + dedent(STUCK))
    targets = ["net.py:Net(depth=20)", "net.py:Stuck(depth=3)", "net.py:Net(depth=21)"]
    done = subprocess.run(
        [sys.executable, "-c", WARM, *targets, "--timeout", "6", "--input", "x:2x64",
         "--format", form], capture_output=True, text=True, cwd=tmp_path, timeout=200, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 2
    said = "net.py:Stuck(depth=3) did not finish within 6 s: it was at net.py:"
    assert said in done.stderr
    assert "cannot be interrupted" in done.stderr
    assert "ARC101" in done.stdout
    assert "depth=21" not in done.stdout
    if form == "json":
        assert [t["target"] for t in json.loads(done.stdout)["targets"]] == targets[:2]


WORKS = {
    "no_parameters": (
        "class Net(nn.Module):\n    def forward(self, x):\n        return torch.relu(x)"
    ),
    "item": model(forward="return self.fc(x) * (2.0 if x.sum().item() > -1e9 else 1.0)"),
    "numpy": model(forward="return self.fc(x) + float(x.detach().numpy().sum() * 0)"),
    "no_grad": model(forward="\n        with torch.no_grad():\n            return self.fc(x)"),
    "inference": model(
        forward="\n        with torch.inference_mode():\n            return self.fc(x)"
    ),
    "compiled": model(more="\nraw = Net\n\n\ndef Net():\n    return torch.compile(raw())"),
    "compiled_inside": model(init="self.fc = torch.compile(self.fc)"),
    "compiled_forward": model().replace("    def forward", "    @torch.compile\n    def forward"),
    "scripted": model(more="\nraw = Net\n\n\ndef Net():\n    return torch.jit.script(raw())"),
    "scripted_part": model(init="self.fc = torch.jit.script(self.fc)"),
    "traced": model(
        more="\nraw = Net\n\n\ndef Net():\n    return torch.jit.trace(raw(), torch.randn(2, 8))"
    ),
    "hooks": model(
        init="self.fc.register_forward_hook(lambda m, i, o: o * 2); "
        "self.fc.register_forward_pre_hook(lambda m, i: (i[0] + 1,)); "
        "self.register_full_backward_hook(lambda *a: None)"
    ),
    "data_parallel": model(more="\nraw = Net\n\n\ndef Net():\n    return nn.DataParallel(raw())"),
    "complex": model(forward="return torch.fft.ifft(torch.fft.fft(self.fc(x))).real"),
    "mixed_dtypes": model(forward="return self.fc(x).double() + x"),
    "device_of_input": model(forward="return self.fc(x.to('cpu')).cpu()"),
    "cuda_when_there": model(
        init="self.to('cuda' if torch.cuda.is_available() else 'cpu')",
    ),
    "print": model(init="print('building')", forward="print(x.shape); return self.fc(x)"),
    "tuple": model(forward="return self.fc(x), {'a': [x, None]}"),
    "checkpoint": model(
        forward="return torch.utils.checkpoint.checkpoint(self.fc, x, use_reentrant=False)",
    ),
    "autograd_function": model(
        more="\n\nclass Twice(torch.autograd.Function):\n    @staticmethod\n"
        "    def forward(ctx, x):\n        return x * 2\n    @staticmethod\n"
        "    def backward(ctx, g):\n        return g * 2\n",
        forward="return Twice.apply(self.fc(x))",
    ),
    "custom_op": (
        "@torch.library.custom_op('archlint_test::twice', mutates_args=())\n"
        "def twice(x: torch.Tensor) -> torch.Tensor:\n    return x * 2\n\n\n"
        + model(forward="return twice(self.fc(x))")
    ),
    "own_random_state": model(init="torch.manual_seed(3); nn.init.normal_(self.fc.weight)"),
    "seeded_generator": model(
        init="nn.init.normal_(self.fc.weight, generator=torch.Generator().manual_seed(0))"
    ),
    "half": model(init="self.half()"),
    "buffers": model(
        init="self.register_buffer('b', torch.ones(8))",
        forward="self.b.add_(1); return self.fc(x) + self.b",
    ),
    "warns": model(init="import warnings; warnings.warn('odd')"),
}


@pytest.mark.parametrize("name", WORKS)
def test_what_works(tmp_path: Path, name: str) -> None:
    code, said = check(tmp_path, WORKS[name], "--input", "2x8")
    assert code == 0, said
    if name in ("complex", "custom_op"):  # the node that stopped the prediction is named
        assert re.search("ARC901 .* not understood: (fft_fft|archlint_test::twice)", said)
    else:
        assert "All clear: 1 model checked." in said


def test_what_code_prints_stays_out_of_the_document(tmp_path: Path) -> None:
    write(tmp_path, "m.py", "import os, atexit, torch\nfrom torch import nn\nprint('importing')\n"
          "atexit.register(print, 'leaving')\nos.system('echo from a child')\n"
          "os.write(1, b'from below')\n" + WORKS["print"])  # fmt: skip
    done = run(tmp_path, "m.py:Net", "--format", "json")
    assert json.loads(done.out)["summary"]["failed"] == 0
    for text in ("importing", "building", "leaving", "from a child", "from below", "torch.Size"):
        assert text in done.err
    again = run(tmp_path, "m.py:Net", "--format", "json")
    assert again.out == done.out


# --------------------------------------------------------------------------- inputs


def test_inputs_of_every_form(tmp_path: Path) -> None:
    source = """
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.fc = nn.Embedding(50, 8), nn.Linear(8, 8)

        def forward(self, batch, views, scale=None):
            h = self.table(batch["ids"]).mean(1) + batch["meta"]["x"]
            h = h + sum(self.fc(view) for view in views)
            return h if scale is None else h * scale
    """
    code, said = check(
        tmp_path, source, "--input", "batch.ids:2x7:int64", "--input", "batch.meta.x:2x8",
        "--input", "views.0:2x8", "--input", "views.1:2x8", "--input", "scale:scalar",
    )  # fmt: skip
    assert code == 0, said
    code, said = check(tmp_path, source)
    assert code == 2
    assert "with the assumed input" in said
    assert "--input batch:2x3x224x224 --input views:" in said


@pytest.mark.parametrize("where", ["module", "function", "class"])
def test_example_inputs(tmp_path: Path, where: str) -> None:
    source = model(forward="return self.fc(x['a'])")
    example = "def example_inputs():\n    return {'x': {'a': torch.randn(3, 8)}}\n"
    if where == "class":
        indented = "".join(f"    {line}\n" for line in example.splitlines())
        source += f"\n    @staticmethod\n{indented}"
    else:
        source = f"{source}\n\n{example}"
    target = "m.py:Net"
    if where == "function":
        source += "\n\ndef build():\n    return Net()\n\n\nbuild.example_inputs = example_inputs\n"
        source += "del example_inputs\n"
        target = "m.py:build"
    code, said = check(tmp_path, source, target=target)
    assert code == 0, said
    code, said = check(tmp_path, source.replace("torch.randn(3, 8)", "1 / 0"), target=target)
    assert code == 2
    assert "example_inputs() raised ZeroDivisionError" in said.splitlines()[0]
    assert "1 / 0" in said


def test_targets_of_the_configuration(project: Path) -> None:
    write(project, "pyproject.toml",
          '[tool.archlint]\ntargets = ["net.py:Net", {target = "net.py:Needy", '
          'kwargs = {width = 4, classes = 2}, inputs = ["x:5x4"]}]\n')  # fmt: skip
    (project / "below").mkdir(exist_ok=True)
    for folder in (project, project / "below"):
        done = run_here(folder, "--format", "json")
        first, second = json.loads(done.out)["targets"]
        assert first["findings"]
        assert second["input"] == {"x": "5x4"}
    (project / "pyproject.toml").unlink()


# --------------------------------------------------------------------------- exported programs


def test_an_exported_program(tmp_path: Path) -> None:
    layers: list[nn.Module] = []
    for _ in range(20):
        layers += [nn.Linear(64, 64), nn.ReLU()]
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(
        nn.Sequential(*layers), (torch.randn(4, 64),), dynamic_shapes=({0: batch},)
    )
    torch.export.save(program, tmp_path / "m.pt2")
    done = run_here(tmp_path, "m.pt2", "--format", "json")
    assert done.err == ""
    (found,) = json.loads(done.out)["targets"]
    assert [f["code"] for f in found["findings"]] == ["ARC101"]


# --------------------------------------------------------------------------- suppressions


def test_findings_that_are_ignored(project: Path) -> None:
    line = "self.fc = nn.Linear(width, width)"
    for comment, code in [
        ("# archlint: ignore[ARC101] we know", 0),
        ("# archlint: ignore[ARC602, length-drift]", 0),
        ("# archlint: ignore[ARC102] another rule", 1),
        ("# archlint: ignore", 1),
        ("# '# archlint: ignore[ARC101]' in a comment that only quotes it", 0),
        ("; '# archlint: ignore[ARC101]'", 1),
    ]:
        write(project, "quiet.py", NET.replace(line, f"{line}  {comment}"))
        done = run_here(project, "quiet.py:model", "--explain-silence")
        assert done.code == code, comment
    write(project, "quiet.py", NET.replace(line, f"{line}  # archlint: ignore[ARC101] we know"))
    done = run_here(project, "quiet.py:model", "--explain-silence")
    assert (
        "ARC101 is silent at layers.*.fc: ignored by a comment at quiet.py:8: we know" in done.out
    )


@pytest.mark.parametrize(
    ("table", "code"),
    [
        ('rules = ["ARC1"], path = "layers.*"', 0),
        ('rules = ["length-drift"], target = "*:Net"', 0),
        ('rules = ["ARC101"], path = "layers.1*"', 1),
        ('rules = ["ARC101"], target = "other*"', 1),
        ('rules = ["ARC3"]', 1),
        ('rules = ["ARC999"]', 2),
    ],
)
def test_findings_that_the_configuration_ignores(project: Path, table: str, code: int) -> None:
    file = write(project, "quiet.toml",
                 f'[tool.archlint]\nignore = [{{{table}, reason = "known"}}]\n')  # fmt: skip
    assert run_here(project, "net.py:Net", "--config", file).code == code
