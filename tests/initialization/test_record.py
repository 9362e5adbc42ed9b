"""The record of initialization: exact laws, sites, copies, without allocating weights."""

from __future__ import annotations

import copy
import linecache
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import init

from archlint.graph.from_torch import load_torch
from archlint.initialization.distribution import Distribution
from archlint.initialization.record import Recorded, build
from archlint.profiling import profile


def laws_of(factory: Callable[[], nn.Module]) -> dict[str, Recorded]:
    model, record = build(factory)
    assert not record.notes
    return record.laws(model)


def law(of: Callable[[], Tensor], estimated: bool = False) -> Distribution:
    """The law of one parameter that ``of`` makes."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(of())

    found = laws_of(Net)["w"].law
    assert found is not None
    assert found.exact != estimated
    return found


def empty(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape))


# --------------------------------------------------------------------------- layers of torch.nn

THIRD = 1 / 3
# layer, parameter, family, second moment (theory.md section 10)
DEFAULTS: list[tuple[Callable[[], nn.Module], str, str, float]] = [
    (lambda: nn.Linear(50, 70), "weight", "uniform", THIRD / 50),
    (lambda: nn.Linear(50, 70), "bias", "uniform", THIRD / 50),
    (lambda: nn.Conv2d(8, 16, 3), "weight", "uniform", THIRD / 72),
    (lambda: nn.Conv2d(8, 16, 3, groups=4), "weight", "uniform", THIRD / 18),
    (lambda: nn.Conv1d(8, 16, 5), "bias", "uniform", THIRD / 40),
    (lambda: nn.ConvTranspose2d(8, 16, 4), "weight", "uniform", THIRD / 256),
    (lambda: nn.Embedding(50, 40), "weight", "normal", 1.0),
    (lambda: nn.Embedding(50, 40, padding_idx=0), "weight", "normal", 49 / 50),
    (lambda: nn.EmbeddingBag(50, 40), "weight", "normal", 1.0),
    (lambda: nn.LSTM(30, 40), "weight_hh_l0", "uniform", THIRD / 40),
    (lambda: nn.LSTM(30, 40), "bias_ih_l0", "uniform", THIRD / 40),
    (lambda: nn.GRU(30, 40), "weight_ih_l0", "uniform", THIRD / 40),
    (lambda: nn.RNNCell(30, 40), "weight_hh", "uniform", THIRD / 40),
    (lambda: nn.MultiheadAttention(48, 4), "in_proj_weight", "uniform", 2 / (4 * 48)),
    (lambda: nn.MultiheadAttention(48, 4, kdim=32), "k_proj_weight", "uniform", 2 / (48 + 32)),
    (lambda: nn.MultiheadAttention(48, 4), "out_proj.weight", "uniform", THIRD / 48),
    (lambda: nn.MultiheadAttention(48, 4), "in_proj_bias", "zeros", 0.0),
    (lambda: nn.Bilinear(30, 40, 8), "weight", "uniform", THIRD / 30),
    (lambda: nn.LayerNorm(48), "weight", "ones", 1.0),
    (lambda: nn.LayerNorm(48), "bias", "zeros", 0.0),
    (lambda: nn.GroupNorm(4, 48), "weight", "ones", 1.0),
    (lambda: nn.RMSNorm(48), "weight", "ones", 1.0),
    (lambda: nn.BatchNorm2d(48), "weight", "ones", 1.0),
    (lambda: nn.PReLU(48), "weight", "constant", 0.0625),
]


@pytest.mark.parametrize(("layer", "name", "family", "second"), DEFAULTS)
def test_defaults_of_torch(
    layer: Callable[[], nn.Module], name: str, family: str, second: float
) -> None:
    found = laws_of(layer)[name].law
    assert found is not None
    assert found.exact
    assert found.family == family
    assert found.second_moment == pytest.approx(second, rel=1e-9)
    if family in ("uniform", "normal"):
        assert found.mean == 0.0
        assert found.symmetric


@pytest.mark.parametrize(("layer", "name", "family", "second"), DEFAULTS)
def test_defaults_agree_with_draws(
    layer: Callable[[], nn.Module], name: str, family: str, second: float
) -> None:
    torch.manual_seed(1)
    count = max(1, 200_000 // layer().get_parameter(name).numel())
    values = torch.cat([layer().get_parameter(name).detach().flatten() for _ in range(count)])
    square = values.double() ** 2
    error = float(square.std()) / math.sqrt(square.numel())
    assert abs(float(square.mean()) - second) <= 5 * error + 1e-7 * second


# --------------------------------------------------------------------------- initializers

SHAPE = (60, 80)
TRUNCATED = 0.7737413


def filled(initialiser: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[[], Tensor]:
    def make() -> Tensor:
        tensor = torch.empty(*SHAPE)
        initialiser(tensor, *args, **kwargs)
        return tensor

    return make


INITIALISERS: list[tuple[Callable[[], Tensor], str, float, float, str]] = [
    (filled(init.normal_, std=0.02), "normal", 4e-4, 3.0, "normal_(std=0.02)"),
    (filled(init.uniform_, -0.1, 0.1), "uniform", 0.01 / 3, 1.8, "uniform_(a=-0.1, b=0.1)"),
    (filled(init.kaiming_normal_, nonlinearity="relu"), "normal", 2 / 80, 3.0,
     'kaiming_normal_(nonlinearity="relu")'),
    (filled(init.kaiming_uniform_, a=math.sqrt(5)), "uniform", 1 / 240, 1.8,
     "kaiming_uniform_(a=sqrt(5))"),
    (filled(init.xavier_uniform_, gain=2.0), "uniform", 8 / 140, 1.8, "xavier_uniform_(gain=2)"),
    (filled(init.xavier_normal_), "normal", 2 / 140, 3.0, "xavier_normal_()"),
    (filled(init.trunc_normal_), "truncated_normal", TRUNCATED, 2.3655, "trunc_normal_()"),
    (filled(init.trunc_normal_, std=0.02), "normal", 4e-4, 3.0, "trunc_normal_(std=0.02)"),
    (filled(init.orthogonal_, gain=2), "orthogonal", 4 / 80, 3 * 80 / 82, "orthogonal_(gain=2)"),
    (filled(init.sparse_, sparsity=0.1), "sparse", 0.9e-4, 3 / 0.9, "sparse_(sparsity=0.1)"),
    (filled(init.eye_), "eye", 1 / 80, 78.0127, "eye_()"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "family", "second", "kurtosis", "text"), INITIALISERS)
def test_initialisers(
    make: Callable[[], Tensor], family: str, second: float, kurtosis: float, text: str
) -> None:
    found = law(make)
    assert (found.family, found.initializer) == (family, text)
    assert found.second_moment == pytest.approx(second, rel=1e-5)
    assert found.kurtosis == pytest.approx(kurtosis, rel=1e-4)


def test_an_initialiser_of_a_library_that_goes_through_erfinv() -> None:
    layers = pytest.importorskip("timm.layers")
    found = law(filled(layers.trunc_normal_tf_, std=0.02))
    assert found.family == "truncated_normal"
    assert found.initializer == "trunc_normal_tf_(std=0.02)"
    assert found.second_moment == pytest.approx(4e-4 * TRUNCATED, rel=1e-6)
    assert law(filled(layers.trunc_normal_, std=0.02)).family == "normal"


def test_dirac() -> None:
    found = law(lambda: init.dirac_(torch.empty(32, 16, 3, 3), groups=2))
    assert (found.family, found.random) == ("dirac", False)
    assert found.second_moment == pytest.approx(32 / (32 * 16 * 9))


# --------------------------------------------------------------------------- chains

# What grows faster than its argument is held: exp of an exponential variable has no fourth moment,
# and that of a normal one's sixteenth power does not show in any number of draws.
CHAINS: list[tuple[str, Callable[[Tensor], Tensor]]] = [
    ("scale", lambda x: x * 0.3),
    ("shift", lambda x: x + 0.2),
    ("negate", lambda x: -x),
    ("absolute", lambda x: x.abs()),
    ("clamp", lambda x: x.clamp(-0.5, 0.8)),
    ("exponential", lambda x: (0.5 * x).clamp(max=1.0).exp()),
    ("tanh", torch.tanh),
    ("square", lambda x: x.clamp(-2, 2) ** 2),
    ("relu", torch.relu),
    ("sine", torch.sin),
    ("in place", lambda x: x.mul_(0.7).add_(0.1)),
    ("itself", lambda x: x * torch.tanh(x)),
    ("softplus", nn.functional.softplus),
]
STARTS: list[tuple[str, Callable[[int], Tensor]]] = [
    ("randn", torch.randn),
    ("rand", torch.rand),
    ("uniform", lambda n: torch.empty(n).uniform_(-1, 2)),
    ("truncated", lambda n: init.trunc_normal_(torch.empty(n), 0.1, 1.0, -1.0, 1.5)),
    ("exponential", lambda n: torch.empty(n).exponential_(2.0)),
]


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, len(STARTS) - 1), st.lists(st.integers(0, len(CHAINS) - 1), max_size=4),
    st.booleans(),
)  # fmt: skip
def test_chains_agree_with_draws(start: int, chain: list[int], other: bool) -> None:
    def make(n: int) -> Tensor:
        x = STARTS[start][1](n)
        for i in chain:
            x = CHAINS[i][1](x)
        return x * torch.randn(n) if other else x

    found = law(lambda: make(5000))
    torch.manual_seed(0)
    sample = make(400_000).double().numpy()
    n = sample.size
    for power, value in ((1, found.mean), (2, found.second_moment)):
        each = sample**power
        assert abs(each.mean() - value) <= 6 * each.std() / math.sqrt(n) + 1e-4 * abs(value)
    if found.variance > 1e-6:
        centred = sample - sample.mean()
        kurtosis = float(np.mean(centred**4) / np.mean(centred**2) ** 2)
        ratio = centred**4 / np.mean(centred**2) ** 2
        error = float(ratio.std()) / math.sqrt(n) + 4 * kurtosis / math.sqrt(n)
        assert abs(kurtosis - found.kurtosis) <= 8 * error + 0.02 * kurtosis
        if found.symmetric:
            assert abs(np.mean(centred**3)) <= 6 * float(np.std(centred**3)) / math.sqrt(n)


def test_sums_and_products_of_independent_draws() -> None:
    found = law(lambda: torch.randn(60, 60) + 2 * torch.rand(60, 60))
    assert found.mean == pytest.approx(1.0)
    assert found.variance == pytest.approx(1 + 4 / 12)
    found = law(lambda: torch.randn(60, 60) * torch.linspace(0, 1, 60))
    grid = np.linspace(0, 1, 60)
    assert found.second_moment == pytest.approx(float((grid**2).mean()), rel=1e-5)
    assert found.kurtosis == pytest.approx(
        3 * float((grid**4).mean() / (grid**2).mean() ** 2), rel=1e-5
    )


# --------------------------------------------------------------------------- parts and copies


def test_parts_of_a_tensor() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.joint = nn.Linear(64, 192)
            for part in self.joint.weight.data.chunk(3)[:2]:
                part.normal_(std=0.1)
            self.table = nn.Embedding(3000, 64)
            with torch.no_grad():
                self.table.weight[7].zero_()
                self.table.weight[:, :32].mul_(2.0)
            self.columns = empty(100, 64)
            with torch.no_grad():
                self.columns[:, 0::2].fill_(1.0)
                self.columns[:, 1::2].fill_(-1.0)
            self.cat = nn.Parameter(torch.cat([torch.zeros(40, 64), torch.randn(40, 64)]))

    found = laws_of(Net)
    joint = found["joint.weight"].law
    assert joint is not None
    assert joint.family == "mixture"
    assert joint.second_moment == pytest.approx((2 * 0.01 + 1 / 192) / 3)
    table = found["table.weight"].law
    assert table is not None
    assert table.second_moment == pytest.approx(2.5 * 2999 / 3000)
    columns = found["columns"].law
    assert columns is not None
    assert (columns.mean, columns.second_moment, columns.random) == (0.0, 1.0, False)
    cat = found["cat"].law
    assert cat is not None
    assert cat.second_moment == pytest.approx(0.5)


class Copies(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        first = nn.Linear(40, 40)
        self.layers = nn.ModuleList([first, copy.deepcopy(first), nn.Linear(40, 40)])
        self.layers[2].load_state_dict(first.state_dict())
        self.apart = copy.deepcopy(first)
        init.normal_(self.apart.weight)
        self.scaled = nn.Parameter(2 * first.weight.detach())
        self.rows = nn.Parameter(first.weight.detach()[:20].clone())
        self.tied = first


def test_copies_share_their_draws() -> None:
    found = laws_of(Copies)
    assert found["layers.0.weight"].clone_of is None
    assert found["layers.1.weight"].clone_of == "layers.0.weight"
    assert found["layers.2.weight"].clone_of == "layers.0.weight"
    assert found["layers.2.bias"].clone_of == "layers.0.bias"
    assert found["apart.weight"].clone_of is None
    assert not found["apart.weight"].shared
    for name in ("scaled", "rows"):
        assert found[name].clone_of is None
        assert found[name].shared
    assert "tied.weight" not in found


def test_a_site_is_the_line_that_decided() -> None:
    model, record = build(Copies)
    found = record.laws(model)
    lines = {
        name: linecache.getline(site.file, site.line).strip()
        for name in ("layers.0.weight", "layers.1.weight", "layers.2.weight", "apart.weight",
                     "scaled")
        if (site := found[name].site) is not None and site.line is not None
    }  # fmt: skip
    assert lines["layers.0.weight"] == "first = nn.Linear(40, 40)"
    assert "copy.deepcopy(first)" in lines["layers.1.weight"]
    assert "load_state_dict" in lines["layers.2.weight"]
    assert lines["apart.weight"] == "init.normal_(self.apart.weight)"
    assert "2 * first" in lines["scaled"]


def test_a_site_in_a_library_is_where_it_calls_its_initializer() -> None:
    """Without a line of the user's it is the model's, not that of the library's own helpers."""
    pytest.importorskip("timm")
    profiled = profile('timm:create_model("vit_tiny_patch16_224", depth=1)')
    sites = {p.name: p.site for p in profiled.parameters}
    for name in ("blocks.0.mlp.fc1.weight", "blocks.0.attn.qkv.weight"):
        site = sites[name]
        assert site is not None
        assert site.line is not None
        assert site.file.endswith("timm/models/vision_transformer.py")
        assert "trunc_normal_(module.weight" in linecache.getline(site.file, site.line)


def test_what_nobody_filled_and_what_was_overwritten() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.Tensor(50, 50))
            self.b = nn.Linear(50, 50)
            init.xavier_uniform_(self.b.weight)
            init.normal_(self.b.weight)
            self.c = nn.Linear(50, 50)
            init.normal_(self.c.weight)

    found = laws_of(Net)
    assert found["a"].law is not None
    assert found["a"].law.family == "uninitialised"
    assert [o.initializer for o in found["b.weight"].overwritten] == ["xavier_uniform_()"]
    assert not found["c.weight"].overwritten  # the layer's own default is nobody's mistake
    assert not found["b.bias"].overwritten


@pytest.mark.parametrize("shape", [(16, 16), (64, 64), (48, 64), (64, 48)])
@pytest.mark.parametrize("map", ["matrix_exp", "cayley", "householder"])
@pytest.mark.parametrize("orthogonal", [False, True])
def test_orthogonal_parametrization(shape: tuple[int, int], map: str, orthogonal: bool) -> None:
    """Without its weights: the base is orthogonal, what is trained starts at minus the identity."""

    def factory() -> nn.Module:
        layer = nn.Linear(*shape)
        if orthogonal:
            init.orthogonal_(layer.weight)
        return nn.utils.parametrizations.orthogonal(layer, orthogonal_map=map)

    found = laws_of(factory)
    torch.manual_seed(0)
    made = factory()
    tensors = {**dict(made.named_parameters()), **dict(made.named_buffers())}
    assert set(tensors) == set(found)
    base = found["parametrizations.weight.0.base"].law
    assert base is not None
    assert base.family == "orthogonal"
    for name in ("parametrizations.weight.0.base", "parametrizations.weight.original"):
        expected = found[name].law
        assert expected is not None
        assert expected.exact
        second = float(tensors[name].double().square().mean())
        assert second == pytest.approx(expected.second_moment, rel=1e-5)


# --------------------------------------------------------------------------- constructors


def test_constructors_read_what_follows_from_literals() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            rates = [x.item() for x in torch.linspace(0, 0.3, 4)]
            assert rates[-1] == pytest.approx(0.3)
            table = torch.zeros(200, 64)
            table[:, 0::2] = torch.arange(200)[:, None] / 100.0
            self.register_buffer("table", table)
            self.register_buffer("index", torch.from_numpy(np.arange(4000)))
            self.register_buffer("noise", torch.randn(4))
            self.w = nn.Linear(64, 64, device="cuda", dtype=torch.bfloat16)
            self.w.to("cuda").half()
            assert self.w.weight.device.type == "cpu"

    model, record = build(Net)
    assert model.table.device.type == "cpu"
    assert float(model.table[199, 0]) == pytest.approx(1.99)
    assert int(model.index[3999]) == 3999
    assert model.noise.device.type == "meta"  # no finding may depend on one draw
    found = record.laws(model)["w.weight"].law
    assert found is not None
    assert found.second_moment == pytest.approx(1 / 192)


def test_numbers_that_were_drawn_need_a_real_model() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Linear(64, 64)
            init.normal_(self.w.weight, std=0.5 + 0 * self.w.weight.mean().item())

    model, record = build(Net)
    assert record.notes
    found = record.laws(model)["w.weight"].law
    assert found is not None
    assert found.exact
    assert found.second_moment == pytest.approx(0.25)


def test_what_numpy_draws_is_estimated() -> None:
    found = law(lambda: torch.from_numpy(np.random.randn(100, 100).astype("f")) * 0.5, True)
    assert found.family == "normal"
    assert found.second_moment == pytest.approx(0.25, rel=0.1)


def test_numbers_from_outside_that_replace_the_data_are_estimated() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Linear(64, 64)
            self.w.weight.data = torch.from_numpy(np.random.uniform(-1, 1, (64, 64)).astype("f"))
            self.w.bias.data.copy_(torch.linspace(0, 1, 64))
            self.g = nn.Parameter(torch.randn(64, 64, generator=torch.Generator()))
            self.s = nn.utils.parametrizations.spectral_norm(nn.Linear(64, 64))

    found = laws_of(Net)
    weight, bias, g = found["w.weight"].law, found["w.bias"].law, found["g"].law
    assert weight is not None
    assert (weight.family, weight.exact) == ("uniform", False)
    assert bias is not None
    assert (bias.family, bias.exact) == ("deterministic", True)
    assert g is not None
    assert (g.family, g.exact) == ("normal", True)
    original = found["s.parametrizations.weight.original"].law
    assert original is not None
    assert (original.family, original.exact) == ("uniform", True)


def test_what_is_not_understood_is_estimated() -> None:
    found = law(lambda: torch.cumsum(torch.randn(100, 100), 0) * 0 + torch.randn(100, 100), True)
    assert found.second_moment == pytest.approx(1.0, rel=0.1)


def test_what_is_chosen_by_its_own_size_is_another_law() -> None:
    """The first of four normal numbers that lies within two standard deviations."""

    def within() -> Tensor:
        drawn = torch.empty(200, 200, 4).normal_()
        inside = (drawn < 2) & (drawn > -2)
        return drawn.gather(-1, inside.max(-1, keepdim=True)[1]).squeeze(-1)

    found = law(within, True)
    assert not found.exact
    assert found.second_moment == pytest.approx(0.7737, rel=0.03)


def test_what_is_chosen_by_chance_keeps_its_law() -> None:
    def shuffled() -> Tensor:
        return (2 * torch.randn(4000, 8)).index_select(0, torch.randint(0, 4000, (4000,)))

    found = law(shuffled)
    assert found.exact
    assert found.second_moment == pytest.approx(4.0)


def test_loading_weights_is_silent(recwarn: pytest.WarningsRecorder) -> None:
    state = {"weight": torch.full((64, 64), 3.0), "bias": torch.ones(64)}

    def loaded() -> nn.Module:
        layer = nn.Linear(64, 64)
        layer.load_state_dict(state)
        return layer

    model, record = build(loaded)
    found = record.laws(model)["weight"].law
    assert found is not None
    assert found.second_moment == 9.0
    assert not [w for w in recwarn if "no-op" in str(w.message)]


def test_large_weights_are_not_allocated() -> None:
    model, record = build(lambda: nn.Linear(1 << 20, 1 << 20))
    assert model.weight.device.type == "meta"
    assert record.laws(model)["weight"].site is not None


def test_torch_and_the_random_state_are_as_before() -> None:
    before = init.orthogonal_.__code__, init.orthogonal_.__defaults__, torch.get_rng_state()
    laws_of(Copies)
    assert init.orthogonal_.__code__ is before[0]
    assert init.orthogonal_.__defaults__ == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert init.orthogonal_(torch.empty(3, 3)).det().abs().item() == pytest.approx(1, rel=1e-5)


def test_parametrised_and_lazy_layers() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.LazyLinear(64)
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(64, 64))

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.normed(self.first(x))
            return found

    graph = load_torch(Net, {"x": ((8, 100), None)})
    weight = graph.parameters["first.weight"].law
    assert weight is not None
    assert weight.second_moment == pytest.approx(1 / 300)
    lengths = graph.parameters["normed.parametrizations.weight.original0"].law
    assert lengths is not None
    assert lengths.second_moment == pytest.approx(1 / 3, rel=1e-6)
    assert graph.parameters["normed.parametrizations.weight.original1"].law is not None


class Written(nn.Module):
    """What is watched where it is made, on small tensors and on large ones."""

    def __init__(self) -> None:
        super().__init__()
        for n in (8, 300):
            a, b = torch.empty(n, n), torch.empty((n, 4), dtype=torch.float64)
            init.kaiming_uniform_(a, a=math.sqrt(5))
            a[: n // 2].fill_(3)
            b.uniform_(-0.9, to=0.9).erfinv_().mul_(0.02 * math.sqrt(2)).add_(0).clamp_(max=0.03)
            c = torch.zeros(n)
            c.normal_(std=2.0)
            d = torch.ones([n, n], device=torch.device("cpu"))
            d[:, :2].zero_()
            self.tensors = nn.ParameterList(nn.Parameter(t) for t in (a, b, c, d))
            self.norm = nn.BatchNorm2d(n)
            init.constant_(self.norm.weight, 0.5)
            self.register_buffer("step", torch.tensor(2.5, dtype=torch.float64))
            self.register_buffer("table", torch.arange(3, n))
            setattr(self, f"part{n}", nn.ModuleList([*self.children()]))


def test_what_is_watched_where_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same laws, sites and initializers that were overwritten as by torch's dispatcher."""
    found = laws_of(Written)
    monkeypatch.setattr("archlint.initialization.record.watched", lambda *_: None)
    dispatched = laws_of(Written)
    assert found == dispatched
    families = [r.law.family for r in found.values() if r.law is not None]
    assert len(families) == len(found)
    assert {"normal", "mixture", "constant", "deterministic"} <= set(families)


def test_a_call_that_torch_refuses_is_refused() -> None:
    with pytest.raises(RuntimeError, match="in-place"):
        build(lambda: nn.Linear(4, 4).weight.fill_(1.0))
    with pytest.raises(RuntimeError, match="negative"):
        build(lambda: torch.empty(-1))


@pytest.mark.slow
def test_llama_of_70_billion_parameters_is_recorded_in_seconds() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, vocab_size=32000,
    )  # fmt: skip
    found = laws_of(lambda: transformers.LlamaForCausalLM(config))
    weight = found["model.layers.79.mlp.down_proj.weight"].law
    assert weight is not None
    assert weight.family == "normal"
    assert weight.std == pytest.approx(0.02)


def test_dtypes_by_the_names_of_python() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.tril(torch.ones((4, 4), dtype=bool)))
            self.register_buffer("scale", torch.zeros(4, dtype=float))
            self.register_buffer("kept", torch.empty((3,), dtype=bool).fill_(True))

        def forward(self, x: Tensor) -> Tensor:
            return (x.double() * self.scale).masked_fill(~self.mask, 0.0)

    model, _ = build(Masked)
    kinds = {name: buffer.dtype for name, buffer in model.named_buffers()}
    assert kinds == {"mask": torch.bool, "scale": torch.float64, "kept": torch.bool}
