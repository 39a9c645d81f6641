"""Copies of units whose weights are computed from others: equal to their source, or drawn anew."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from small import assert_same, auxiliaries, batch, branches_of, coupling_of, gradients, links_of, state
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import localgrad as lg
from localgrad.core.copies import draw_anew, duplicate

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")


class Symmetric(nn.Module):
    """Has no `right_inverse`."""

    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).mT


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(3.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x

    def right_inverse(self, x: Tensor) -> Tensor:
        return x / self.factor


def with_step(module: nn.Module, *steps: nn.Module, name: str = "weight") -> nn.Module:
    for step in steps:
        parametrize.register_parametrization(module, name, step)
    return module


def lstm_of_norms() -> nn.Module:
    return parametrizations.weight_norm(parametrizations.weight_norm(nn.LSTM(4, 5), "weight_hh_l0"), "weight_ih_l0")


def orthogonal_exponential() -> nn.Module:
    return parametrizations.orthogonal(nn.Linear(4, 4), orthogonal_map="matrix_exp", use_trivialization=False)


# Name: a module, an input for it, and which of its tensors is computed.
COMPUTED: dict[str, tuple[Callable[[], nn.Module], Tensor, str]] = {
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(4, 5)), torch.ones(2, 4), "weight"),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Conv2d(3, 5, 3)), torch.ones(2, 3, 4, 4), "weight"),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(4, 6)), torch.ones(2, 4), "weight"),
    "orthogonal, not invertible": (orthogonal_exponential, torch.ones(2, 4), "weight"),
    "no inverse": (lambda: with_step(nn.Linear(4, 4), Symmetric()), torch.ones(2, 4), "weight"),
    "stacked": (lambda: with_step(nn.Linear(4, 4), Symmetric(), Scaled()), torch.ones(2, 4), "weight"),
    "norm on norm": (
        lambda: parametrizations.spectral_norm(parametrizations.weight_norm(nn.Linear(4, 5))),
        torch.ones(2, 4), "weight",
    ),
    "embedding": (lambda: parametrizations.weight_norm(nn.Embedding(4, 3)), torch.arange(3), "weight"),
    "lstm": (lstm_of_norms, torch.ones(3, 2, 4), "weight_hh_l0"),
    "gru": (lambda: parametrizations.orthogonal(nn.GRU(4, 5), "weight_hh_l0"), torch.ones(3, 2, 4), "weight_hh_l0"),
    "older weight norm": (lambda: weight_norm(nn.Conv2d(3, 5, 3)), torch.ones(2, 3, 4, 4), "weight"),
    "older weight norm, one for all": (
        lambda: weight_norm(nn.Linear(4, 5), dim=cast(int, None)), torch.ones(2, 4), "weight"
    ),
    "older weight norm of a bias": (lambda: weight_norm(nn.Linear(4, 5), "bias"), torch.ones(2, 4), "bias"),
    "older weight norm of an lstm": (
        lambda: weight_norm(nn.LSTM(4, 5), "weight_hh_l0"), torch.ones(3, 2, 4), "weight_hh_l0"
    ),
    "older spectral norm": (lambda: spectral_norm(nn.Linear(4, 5)), torch.ones(2, 4), "weight"),
    "pruned": (lambda: prune.l1_unstructured(nn.Linear(4, 5), "weight", 0.5), torch.ones(2, 4), "weight"),
    "pruned twice": (
        lambda: prune.random_unstructured(prune.l1_unstructured(nn.Linear(4, 5), "weight", 3), "weight", 0.3),
        torch.ones(2, 4), "weight",
    ),
}  # fmt: skip


def value(module: nn.Module, x: Tensor) -> Tensor:
    out = module(x)
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("name", COMPUTED)
def test_a_copy_computes_what_its_source_does_until_it_is_drawn_anew(name: str) -> None:
    make, x, tensor = COMPUTED[name]
    module = make()
    value(module, x)  # after which an older weight has a graph
    twin = duplicate(module)
    for m in (module, twin):
        m.eval()
    before, kept = value(module, x), state(module)
    assert torch.equal(value(twin, x), before)
    draw_anew(twin)
    assert not torch.allclose(getattr(twin, tensor), getattr(module, tensor), atol=1e-3)
    drawn = getattr(twin, tensor).detach().clone()
    assert not torch.allclose(value(twin, x), before, atol=1e-4)
    assert torch.equal(getattr(twin, tensor), drawn)  # which the copy's own hooks compute from the copy's parameters
    assert torch.equal(value(module, x), before)
    assert_same(kept, state(module))
    value(twin, x).sum().backward()
    assert all(p.grad is not None for p in twin.parameters())
    assert all(p.grad is None for p in module.parameters())
    if "spectral" not in name and "orthogonal" not in name and name not in ("gru", "norm on norm"):
        with torch.no_grad():
            for p in module.parameters():
                p.mul_(50)
        draw_anew(module)  # The weight has the spread of a plain layer's, whatever it was before.
        assert 0 < float(getattr(module, tensor).detach().std()) < (2.5 if name == "embedding" else 1)


def test_norms_hold_for_what_is_drawn() -> None:
    conv: Any = parametrizations.spectral_norm(nn.Conv2d(3, 5, 3))
    linear: Any = parametrizations.orthogonal(nn.Linear(4, 4))
    for module in (conv, linear):
        draw_anew(module)
        weight = module.eval().weight.detach().flatten(1)
        assert float(torch.linalg.matrix_norm(weight, 2)) == pytest.approx(1, abs=0.02)
    torch.testing.assert_close(linear.weight @ linear.weight.mT, torch.eye(4), atol=1e-5, rtol=0)
    pruned: Any = prune.l1_unstructured(nn.Linear(4, 5), "weight", 0.5)
    draw_anew(pruned)
    assert torch.equal(pruned.weight == 0, pruned.weight_mask == 0)


def test_a_weight_that_nothing_tells_how_to_draw_is_said() -> None:
    class Own(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.factor = nn.Parameter(torch.randn(4, 4))
            del self._parameters["weight"]

        @property
        def weight(self) -> Tensor:
            return 2 * self.factor

    class Positive(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.exp()

        def right_inverse(self, x: Tensor) -> Tensor:
            return x.log()

    attention = nn.TransformerEncoderLayer(8, 2, 16)  # Its attention has a `_reset_parameters`, without a warning.
    kept = {name: value for name, value in state(attention).items() if value.ndim > 1}
    draw_anew(attention)
    assert not any(torch.equal(value, attention.state_dict()[name]) for name, value in kept.items())
    with pytest.warns(UserWarning, match="copy of Own is not drawn anew"):
        draw_anew(Own())
    embedding = nn.Embedding(4, 3)
    with torch.no_grad():
        embedding.weight.abs_()
    with_step(embedding, Positive())
    kept = state(embedding)
    with pytest.warns(UserWarning, match="begins with its source's weight"):
        draw_anew(embedding)
    assert_same(kept, state(embedding))


# In a model


class Unit(nn.Module):
    def __init__(self, norm: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.a, self.b = (norm(nn.Conv2d(6, 6, 3, padding=1)) for _ in range(2))

    def forward(self, h: Tensor) -> Tensor:
        return torch.relu(h + self.b(torch.relu(self.a(h))))


def network(norm: Callable[[Any], nn.Module]) -> nn.Module:
    units = nn.Sequential(*[Unit(norm) for _ in range(3)])
    return nn.Sequential(nn.Conv2d(3, 6, 1), units, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10))


NORMS = {
    "parametrized": parametrizations.weight_norm,
    "parametrized spectrally": parametrizations.spectral_norm,
    "weight norm": weight_norm,
    "spectral norm": spectral_norm,
    "pruned": lambda m: prune.l1_unstructured(m, "weight", 0.5),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    "coupling", [lg.MAN(0.5), lg.DeepMAN(0.5), lg.MAN(0.5, form="pull"), lg.MAN(0.5, lag=1)], ids=str
)
def test_averages_follow_the_parameters_that_weights_are_computed_from(norm: str, coupling: lg.MAN) -> None:
    x, y = batch()
    net = network(NORMS[norm])
    net(x)
    model = lg.localize(net, blocks=2, method=lg.dgl("0c1f"), coupling=coupling, example=x)
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(lg.param_groups(model), lr=0.1)
    for _ in range(2):
        lg.local_backward(model, x, y)
        assert all(p.grad is not None for k in range(2) for p in model.members(k))
        optimizer.step()
        optimizer.zero_grad()
    auxiliary = auxiliaries(model)[0]
    link, source = links_of(auxiliary)[0], coupling_of(auxiliary).sources[0].module
    if coupling.form == "branches":
        learnable, ema = branches_of(link)
        fresh, started = branches_of(links_of(auxiliaries(twin)[0])[0])
        assert not torch.equal(
            fresh.get_submodule("a")(torch.ones(1, 6, 4, 4)), started.get_submodule("a")(torch.ones(1, 6, 4, 4))
        )
        assert not torch.equal(*(nn.utils.parameters_to_vector(m.parameters()) for m in (learnable, ema)))
        coupling_of(auxiliary).update()
        starts = {name: p.detach() for name, p in started.named_parameters()}
        for (name, average), now in zip(ema.named_parameters(), source.parameters(), strict=True):
            between = torch.minimum(starts[name], now), torch.maximum(starts[name], now)
            assert bool((average >= between[0] - 1e-3).all() and (average <= between[1] + 1e-3).all())
    again = copy.deepcopy(model)  # after steps, when weights have graphs
    for m in (model, lg.recompute(again, couplings=True)):
        torch.manual_seed(1)
        lg.local_backward(m, x, y)
    if "spectral" not in norm:  # whose buffers a recomputed unit moves twice
        assert_same(gradients(model), gradients(again))
    if not coupling.delayed:
        assert lg.predict_peak(model, 4, lambda m: [torch.optim.SGD(lg.param_groups(m), lr=0.1)]).total > 0


@pytest.mark.parametrize("norm", NORMS)
def test_heads_of_units_are_drawn_anew(norm: str) -> None:
    x, y = batch()
    net = network(NORMS[norm])
    net(x)
    model = lg.localize(net, blocks=2, method=lg.auglocal(), example=x)
    unit = auxiliaries(model)[0].heads["classifier"].get_submodule("0.a")
    theirs = model.blocks[1][0].get_submodule("a")
    h = torch.ones(1, 6, 4, 4)
    assert not torch.allclose(unit(h), theirs(h), atol=1e-3)
    lg.local_backward(model, x, y)
    assert all(p.grad is not None for p in unit.parameters())
