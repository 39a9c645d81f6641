"""Networks that are built without memory, against the same ones that are built as usual, bit for bit."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import localgrad as lg
from localgrad.scale import deferred
from localgrad.scale.deferred import Deferred
from localgrad.scale.held import Held

IMAGE = torch.zeros(2, 3, 32, 32)


@pytest.fixture(autouse=True)
def _all_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """All numbers of these small networks come later."""
    monkeypatch.setattr(deferred, "SMALL", 1)


class Drawn(nn.Module):
    """Draws its weights in each way that PyTorch has, and computes some of them."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ParameterList(nn.Parameter(torch.empty(6, 6)) for _ in range(8))
        draws: list[Callable[[Tensor], Any]] = [
            nn.init.orthogonal_,
            nn.init.eye_,
            partial(nn.init.trunc_normal_, std=1.0),  # It draws until no number is too large.
            nn.init.kaiming_normal_,
            partial(nn.init.sparse_, sparsity=0.5),
            partial(nn.init.constant_, val=0.5),
            lambda t: t.data.bernoulli_(0.3),
            lambda t: t.data.copy_(torch.linspace(0, 1, 36).view(6, 6) + torch.randperm(6)),
        ]
        for draw, table in zip(draws, self.tables, strict=True):
            draw(table)
        rates = torch.rand(5).tolist()
        self.scaled = nn.Parameter(torch.randn(4, 4) * rates[0] + float(np.random.rand()) + random.random())  # noqa: NPY002
        self.turned = nn.Parameter(torch.randn(2, 6).T)
        with torch.no_grad():
            self.scaled[1:3] = 7
            self.scaled.mul_(2 if self.scaled.sum() > 0 else 3)
        own = torch.Generator().manual_seed(3)
        self.register_buffer("noise", torch.randn(3, 3, generator=own).normal_(generator=own))
        self.twin = nn.Linear(6, 6)
        self.twin.weight = self.tables[0]
        self.apply(self._again)

    def _again(self, module: nn.Module) -> None:
        """Many networks draw all of their layers once more at the end."""
        if isinstance(module, nn.Linear):
            nn.init.uniform_(module.bias)


def cut(network: Callable[[], nn.Module], **how: Any) -> lg.LocalModel:
    return lg.localize(network(), blocks=4, example=IMAGE, **how)


def channels_last() -> lg.LocalModel:
    return cut(partial(lg.CifarResNet, 8), method=lg.dgl()).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def loaded() -> nn.Module:
    network = lg.CifarResNet(8)
    network.load_state_dict({name: torch.full_like(t, 2) for name, t in network.state_dict().items()})
    return network


def warmed() -> nn.Module:
    network = lg.CifarResNet(8)
    network(torch.ones(2, 3, 32, 32))  # Batch norm changes its statistics.
    return network


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "drawn": Drawn,
    "loaded": loaded,
    "warmed": warmed,
    "resnet, deep man": partial(cut, partial(lg.CifarResNet, 8), method=lg.infopro(), coupling=lg.DeepMAN(lag=2)),
    "resnet, channels last": channels_last,
    "vit, man++": lambda: lg.localize(
        lg.build("timm:vit_tiny_patch16_224", classes=10, depth=4), method=lg.dgl(), coupling=lg.MANPlusPlus(),
        example=torch.zeros(2, 3, 224, 224),
    ),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(5, 5)),
    "lstm": lambda: nn.LSTM(3, 4),
}  # fmt: skip


def seeded(make: Callable[[], Any]) -> tuple[Any, list[float]]:
    """What `make` gives after fixed seeds, and the random numbers that come next."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    made = make()
    return made, [torch.rand(()).item(), random.random(), np.random.rand()]  # noqa: NPY002


def tensors(network: nn.Module) -> dict[str, Tensor]:
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


@pytest.mark.parametrize("name", NETWORKS)
def test_values_that_come_later_are_those_that_would_have_been(name: str) -> None:
    expected, then = seeded(NETWORKS[name])
    context = Deferred()
    with context:
        found, later = seeded(NETWORKS[name])
    assert later == then
    mine, theirs = tensors(expected), tensors(found)
    assert mine.keys() == theirs.keys()
    lacking = {key: t for key, t in theirs.items() if context.knows(t)}
    assert len(lacking) > len([t for t in theirs.values() if t.is_floating_point()]) / 2
    values = theirs | dict(zip(lacking, context.values(lacking.values()), strict=True))
    assert [key for key in mine if not torch.equal(mine[key], values[key])] == []
    assert [key for key in mine if mine[key].stride() != values[key].stride()] == []
    for key in list(lacking)[::3]:  # Each by itself, in another order.
        assert torch.equal(context.values([lacking[key]])[0], mine[key])


def test_tensors_that_share_memory_share_it_again() -> None:
    with Deferred() as context:
        network = Drawn()
    first, second = context.values([network.tables[0], network.tables[0].view(36)])
    first.zero_()
    assert not second.any()


def test_only_what_a_tensor_depends_on_is_repeated() -> None:
    with Deferred() as context:
        tables = [torch.randn(10, 10) for _ in range(50)]
        _ = tables[3] + 1
    calls = [call.func for call in context.calls]
    context.calls = [call for call in context.calls if tables[7].untyped_storage()._cdata in call.changes]
    assert len(context.calls) == 1 < len(calls)
    assert context.values([tables[7]])[0].any()


def test_a_model_lends_the_values_of_a_block_and_takes_them_back() -> None:
    make = partial(cut, partial(lg.CifarResNet, 8), method=lg.dgl(), coupling=lg.MAN())
    expected, _ = seeded(make)
    held, _ = seeded(lambda: Held(make))
    parameters = [list(held.model.blocks[k].parameters()) for k in range(4)]
    for k in (2, 0, 2):
        with held.lent(k):
            assert all(torch.equal(a, b) for a, b in zip(parameters[k], expected.blocks[k].parameters(), strict=True))
            assert any(p.is_meta for p in parameters[3])
        assert all(p.is_meta for p in parameters[k])


def test_a_network_that_cannot_be_built_without_values_is_built_with_them() -> None:
    def make() -> lg.LocalModel:
        network = lg.CifarResNet(8)
        bytes(network.conv1.weight.untyped_storage())  # It asks for values behind PyTorch's back.
        return lg.localize(network, blocks=4, method=lg.dgl(), example=IMAGE)

    expected, then = seeded(make)
    with pytest.warns(UserWarning, match="cannot be built without values .* each rank builds all of it"):
        found, later = seeded(lambda: Held(make).model)
    assert later == then
    assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), found.parameters(), strict=True))


def _written_by_numpy(network: nn.Module) -> None:
    for parameter in network.parameters():
        parameter.detach().numpy()[...] = 7


def _saved(network: nn.Module) -> None:
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    file.seek(0)
    assert not any(t.is_meta for t in torch.load(file, weights_only=True).values())


def _changed_later(network: nn.Module) -> None:
    source = torch.arange(16 * 16 * 9.0).view(16, 16, 3, 3)
    with torch.no_grad():
        network.get_parameter("layer1.0.conv1.weight").copy_(source)
        source += 1


def _refilled_later(network: nn.Module) -> None:
    """Reads each weight through one array of numpy, as readers of other formats do."""
    array = np.empty((16, 16, 3, 3), np.float32)
    with torch.no_grad():
        for i, name in enumerate(("layer1.0.conv1.weight", "layer1.0.conv2.weight")):
            array[...] = i
            network.get_parameter(name).copy_(torch.from_numpy(array))


def _many_at_once(network: nn.Module) -> None:
    with torch.no_grad():
        torch._foreach_add_(list(network.parameters()), 1.0)  # pyright: ignore[reportPrivateImportUsage]


@pytest.mark.parametrize("change", [_written_by_numpy, _saved, _changed_later, _refilled_later, _many_at_once])
def test_what_goes_past_pytorch_is_noticed(change: Callable[[nn.Module], None]) -> None:
    def make() -> lg.LocalModel:
        network = lg.CifarResNet(8)
        change(network)
        return lg.localize(network, blocks=4, method=lg.dgl(), example=IMAGE)

    expected, _ = seeded(make)
    with pytest.warns(UserWarning, match="cannot be built without values"):
        found, _ = seeded(lambda: Held(make).model)
    assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), found.parameters(), strict=True))


def test_an_error_of_the_user_is_raised_as_it_is() -> None:
    with pytest.raises(lg.UserError, match="unknown model"):
        Held(lambda: cut(partial(lg.build, "resnet19", classes=10), method=lg.dgl()))
