"""Networks of several dtypes, complex ones among them: copies have their source's, heads that of what they read."""

from __future__ import annotations

import copy

import pytest
import torch
from small import auxiliaries, batch, branches_of, coupling_of, links_of, said
from torch import Tensor, nn

import localgrad as lg


class Spectral(nn.Module):
    """A layer of a Fourier neural operator."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 8, 5, dtype=torch.cfloat))
        self.a, self.b = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)

    def forward(self, h: Tensor) -> Tensor:
        return self.b(self.a(h + torch.fft.irfft2(torch.fft.rfft2(h) * self.w)))


def convolutions() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1))


class Mixed(nn.Module):
    """A stem, two units in one dtype and two in another. turned: the units are registered before the stem."""

    def __init__(self, first: torch.dtype, second: torch.dtype, *, turned: bool = False) -> None:
        super().__init__()
        if not turned:
            self.stem = nn.Conv2d(3, 6, 1)
        self.a = nn.Sequential(convolutions(), convolutions()).to(first)
        self.b = nn.Sequential(convolutions(), convolutions()).to(second)
        if turned:
            self.stem = nn.Conv2d(3, 6, 1)
        self.fc = nn.Linear(6, 10)
        self.dtypes = first, second

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(self.stem(x).to(self.dtypes[0]))
        return self.fc(self.b(h.to(self.dtypes[1])).float().mean((2, 3)))


class ComplexFirst(nn.Module):
    """Its first parameter is complex, its input is not."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 8, 5, dtype=torch.cfloat))
        self.units = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1)), convolutions(), convolutions()
        )
        self.fc = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.units(torch.fft.irfft2(torch.fft.rfft2(x) * self.w)).mean((2, 3)))


def operator() -> nn.Module:
    end = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10))
    return nn.Sequential(nn.Conv2d(3, 6, 1), Spectral(), Spectral(), Spectral(), *end)


NETWORKS = {
    "spectral": operator,
    "complex first": ComplexFirst,
    "half": lambda: Mixed(torch.bfloat16, torch.bfloat16),
    "half to double": lambda: Mixed(torch.bfloat16, torch.float64),
    "double to half": lambda: Mixed(torch.float64, torch.bfloat16, turned=True),
    "single to double": lambda: Mixed(torch.float32, torch.float64),
}
METHODS = [lg.dgl(), lg.infopro(), lg.auglocal()]
COUPLINGS = [None, lg.MANPlusPlus(0.9), lg.DeepMAN(0.9)]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
@pytest.mark.parametrize("coupling", COUPLINGS, ids=str)
def test_copies_have_their_sources_dtypes_and_a_step_trains_all(
    name: str, method: lg.Method, coupling: lg.MAN | None
) -> None:
    x, y = batch()
    model = lg.localize(NETWORKS[name](), blocks=3, method=method, coupling=coupling, example=x)
    for auxiliary in auxiliaries(model) if coupling else ():
        for link, unit in zip(links_of(auxiliary), coupling_of(auxiliary).sources, strict=True):
            wanted = [p.dtype for p in unit.module.parameters()]
            assert all([p.dtype for p in branch.parameters()] == wanted for branch in branches_of(link))
    out = lg.local_backward(model, x, y)
    assert all(bool(torch.isfinite(loss)) for loss in out.losses)
    assert all(p.grad is not None for k in range(3) for p in model.members(k))
    assert model.ema_distances() == [None if coupling is None else 0] * 2
    if method.name == "dgl":
        assert lg.predict_peak(model, 4, lambda m: [torch.optim.SGD(lg.param_groups(m), lr=0.1)]).total > 0


@pytest.mark.filterwarnings("ignore:the auxiliary of block 0 has copied other weights:UserWarning")
@pytest.mark.parametrize("name", ["spectral", "complex first"])
def test_an_average_of_complex_numbers_is_the_naive_one(name: str) -> None:
    x, y = batch()
    model = lg.localize(NETWORKS[name](), blocks=2, method=lg.dgl("0c1f"), coupling=lg.MAN(0.75), example=x)
    auxiliary = auxiliaries(model)[0]
    ema, source = links_of(auxiliary)[0].ema, coupling_of(auxiliary).sources[0].module
    assert ema is not None
    with torch.no_grad():
        for p in source.parameters():
            p.add_(torch.randn_like(p))
    averages, sources = ([p.detach() for p in m.parameters()] for m in (ema, source))
    apart = sum(float((e - s).abs().square().sum()) for e, s in zip(averages, sources, strict=True))
    wanted = [0.75 * e + 0.25 * s for e, s in zip(averages, sources, strict=True)]
    size = sum(float(s.abs().square().sum()) for s in sources)
    assert model.ema_distances()[0] == pytest.approx((apart / size) ** 0.5, rel=1e-5)
    lg.local_backward(model, x, y)
    torch.testing.assert_close([p.detach() for p in ema.parameters()], wanted)
    assert model.double().backbone.get_parameter("1.w" if name == "spectral" else "w").is_complex()
    lg.local_backward(model, x.double(), y)


def test_complex_buffers_are_averaged_and_counters_copied() -> None:
    source, average = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    for module, value in ((source, 4 + 8j), (average, 0j)):
        module.register_buffer("phase", torch.tensor([value]))
    lg.update_ema(average, source, 0.75, buffers=True)
    assert torch.equal(average.get_buffer("phase"), torch.tensor([1 + 2j]))


def test_no_cut_lies_where_no_real_numbers_cross() -> None:
    class Complex(nn.Module):
        def __init__(self, outer: bool) -> None:
            super().__init__()
            width = 4 if outer else 48
            self.units = nn.Sequential(
                nn.Sequential(nn.Linear(48, 4, dtype=torch.cfloat), nn.Tanh(), nn.Linear(4, 4, dtype=torch.cfloat)),
                nn.Sequential(nn.Linear(4, 4, dtype=torch.cfloat), nn.Tanh(), nn.Linear(4, width, dtype=torch.cfloat)),
            )
            self.fc = nn.Linear(width, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.units(x.flatten(1).to(torch.cfloat)).abs())

    x, y = batch(size=4)
    for outer, blocks, text in (
        (True, 2, "a tensor of complex64 numbers crosses, and heads read real ones"),
        (False, ["units.0"], "no cut behind 'units.0': a tensor of complex64"),
    ):
        assert text in said(lg.localize, Complex(outer), blocks=blocks, method=lg.dgl("0c1f"), example=x)
    model = lg.localize(Complex(True), method=lg.bp(), example=x)
    lg.local_backward(model, x, y)
    assert all(p.grad is not None for p in model.backbone.parameters())


def test_a_network_of_several_dtypes_is_planned() -> None:
    x, _ = batch()
    for name in ("spectral", "double to half"):
        assert lg.plan(NETWORKS[name](), x, 2**30, method=lg.dgl("0c1f"), coupling=lg.MAN()).exact


def test_scales_and_heads_are_real_and_follow_what_they_read() -> None:
    x, _ = batch()
    network, method = NETWORKS["half to double"](), lg.dgl("1c1f")
    model = lg.localize(network, blocks=3, method=method, coupling=lg.MANPlusPlus(), example=x)
    for auxiliary in auxiliaries(model):
        dtype = coupling_of(auxiliary).sources[-1].output.dtype
        assert {p.dtype for p in auxiliary.heads.parameters()} == {dtype}
        assert [link.scale.dtype for link in links_of(auxiliary) if link.scale is not None] == [dtype]
    spectral = lg.localize(operator(), blocks=2, method=lg.dgl(), coupling=lg.MANPlusPlus(), example=x)
    assert [s.dtype for n, s in spectral.auxiliaries.named_parameters() if n.endswith("scale")] == [torch.float32]
    twin = copy.deepcopy(model)
    assert [p.dtype for p in twin.parameters()] == [p.dtype for p in model.parameters()]
