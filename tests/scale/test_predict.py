"""The peak's split, the profiler as a second opinion, and the prediction that runs nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import localgrad as lg
from localgrad.core.errors import UserError
from localgrad.scale import fakes
from localgrad.scale.memory import KINDS, training_step

BATCH = 16


def sgd(model: lg.LocalModel) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(lg.param_groups(model), lr=0.1, momentum=0.9)]


def sgd_of_each_block(model: lg.LocalModel) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(model.members(k), lr=0.1, momentum=0.9) for k in range(len(model.blocks))]


def adamw(model: lg.LocalModel) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW(lg.param_groups(model), lr=0.001)]


def local(
    name: str, blocks: int, coupling: lg.MAN | None, size: int = 32, method: lg.Method | None = None
) -> lg.LocalModel:
    chosen = lg.bp() if blocks == 1 else method or lg.dgl("1c2f")
    backbone = lg.CifarResNet(14) if name == "resnet14" else lg.build(name, classes=10)
    backbone = backbone.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    example = torch.zeros(2, 3, size, size)
    model = lg.localize(
        backbone, blocks=blocks, method=chosen, coupling=coupling if blocks > 1 else None, example=example
    )
    return model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def stepping(model: lg.LocalModel, optimizers: list[Any], **how: Any) -> Callable[[], None]:
    """A step, after one that has made the optimizers' state."""
    weight = next((p for p in model.parameters() if p.ndim == 4), next(model.parameters()))
    last = weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last)
    x = torch.randn(BATCH, *model.image, dtype=weight.dtype)
    x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    y = torch.randint(10, (BATCH,))

    def step() -> None:
        training_step(model, optimizers, x, y, **how)

    step()
    return step


def measured(model: lg.LocalModel, make: Callable[[lg.LocalModel], list[Any]], **how: Any) -> lg.PeakBytes:
    optimizers = make(model)
    return lg.measure_peak(stepping(model, optimizers, **how), model=model, optimizers=optimizers)


def bytes_of(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def test_a_function_may_make_one_optimizer_or_one_for_each_block() -> None:
    model = lg.localize(nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))), blocks=2, method=lg.dgl("0c1f"),
                        example=torch.zeros(2, 4))  # fmt: skip
    alone = lg.predict_peak(model, 4, lambda own: adamw(own)[0])
    assert alone.total == lg.predict_peak(model, 4, adamw).total
    for makes, as_you_go in ((lambda own: adamw(own)[0], True), (sgd_of_each_block, False)):
        with pytest.raises(UserError, match=r"optimizers makes [12], not [21]: one, or with"):
            lg.predict_peak(model, 4, makes, step_as_you_go=as_you_go)


def test_the_split_adds_up_and_knows_whose_bytes_they_are() -> None:
    model = local("resnet20", 4, lg.MAN())
    found = measured(model, sgd)
    assert tuple(found.split) == KINDS
    assert sum(found.split.values()) == found.total
    trained = [p for p in model.parameters() if p.requires_grad]
    assert found.split["parameters"] == bytes_of(model.backbone.state_dict().values())
    assert found.split["optimizer"] == bytes_of(trained)
    assert found.split["auxiliaries"] == bytes_of(model.auxiliaries.state_dict().values())
    assert 0 < found.split["gradients"] <= bytes_of(trained)
    assert found.split["activations"] > found.total / 2


@pytest.mark.parametrize(("name", "blocks"), [("resnet20", 1), ("resnet20", 4), ("torchvision:resnet18", 2)])
def test_the_profilers_allocations_agree_within_a_tenth(name: str, blocks: int) -> None:
    model = local(name, blocks, lg.MAN())
    optimizers = sgd(model)
    step = stepping(model, optimizers)
    found = lg.measure_peak(step, model=model, optimizers=optimizers)
    before = found.timeline[0][1]  # Live when the step began.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events: Any = profile.profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
    memory = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    peak = before + max(itertools.accumulate(size for _, size in memory))
    assert found.total == pytest.approx(peak, rel=0.1)  # The rest is kernels' own scratch memory.


SIZES = {
    "resnet20": 32, "resnet32": 32, "resnet56": 32, "resnet110": 32, "torchvision:resnet18": 48, "timm:resnet18": 48,
    "timm:resnet26d": 96, "timm:resnext26ts": 96, "torchvision:resnet50": 96, "torchvision:wide_resnet50_2": 96,
    "torchvision:resnext50_32x4d": 96, "timm:vit_tiny_patch16_224": 224,
}  # fmt: skip
QUICK = [("resnet14", 1), ("resnet14", 4), ("torchvision:resnet18", 4), ("timm:resnet18", 2)]
LARGER = [pytest.param(n, k, marks=pytest.mark.slow) for n in SIZES for k in (1, 2, 4, 8) if (n, k) not in QUICK]


def agree(model: lg.LocalModel, make: Any, **how: Any) -> None:
    predicted = lg.predict_peak(model, BATCH, make, **how).total
    assert predicted == pytest.approx(measured(model, make, **how).total, rel=0.001)


@pytest.mark.parametrize(("name", "blocks"), [*QUICK, *LARGER])
def test_the_prediction_is_what_is_measured(name: str, blocks: int) -> None:
    agree(local(name, blocks, lg.MAN(), SIZES.get(name, 32)), sgd)


@pytest.mark.parametrize(
    ("how", "make", "coupling"),
    [
        ({"autocast": torch.bfloat16}, sgd, lg.DeepMAN()),
        ({"step_as_you_go": True}, sgd_of_each_block, lg.MANPlusPlus()),
        ({"step_as_you_go": True}, sgd_of_each_block, None),
        ({}, adamw, lg.DeepMAN()),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_the_prediction_knows_how_a_step_is_taken(how: Any, make: Any, coupling: lg.MAN | None) -> None:
    model = local("resnet14", 4, coupling, 16, method=lg.infopro())
    agree(lg.recompute(model, units=["layer1.1"], couplings=True), make, **how)


def test_a_prediction_takes_no_memory_and_changes_nothing() -> None:
    model = local("resnet20", 4, lg.MAN())
    before = [t.clone() for t in model.state_dict().values()]
    found = lg.predict_peak(model, 100_000, sgd)  # tens of gigabytes, if it were run
    assert found.total > 2**34
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert not any("Fake" in type(t).__name__ for t in model.state_dict().values())


class Recurrent(nn.Module):
    """A recurrent layer as a unit: [B, T, C] -> [B, T, C]."""

    def __init__(self, kind: Any, inputs: int, hidden: int, *, first: bool = True, **how: Any) -> None:
        super().__init__()
        self.first, self.layer = first, kind(inputs, hidden, batch_first=first, **how)

    def forward(self, h: Tensor) -> Tensor:
        return self.layer(h)[0] if self.first else self.layer(h.transpose(0, 1))[0].transpose(0, 1)


class Tokens(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h.flatten(2).transpose(1, 2)


class Mean(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h.mean(1)


def recurrent(kind: Any, hidden: int = 48, out: int = 48, **how: Any) -> nn.Module:
    units = [Recurrent(kind, 32, hidden, **how), *[Recurrent(kind, out, hidden, **how) for _ in range(3)]]
    return nn.Sequential(nn.Conv2d(3, 32, 4, 4), Tokens(), nn.Sequential(*units), Mean(), nn.Linear(out, 10))


LAYERS: list[Any] = [
    (nn.LSTM, {}),
    (nn.LSTM, {"hidden": 64, "out": 64, "first": False}),  # Rows of a multiple of 256 numbers.
    (nn.LSTM, {"out": 96, "bidirectional": True, "num_layers": 2, "dropout": 0.1}),
    (nn.LSTM, {"out": 16, "proj_size": 16}),
    (nn.LSTM, {"bias": False}),
    (nn.GRU, {"out": 96, "bidirectional": True}),
    (nn.RNN, {}),
]
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
LONGER = [pytest.param(*layer, d, 32, marks=pytest.mark.slow) for d in DTYPES for layer in LAYERS]


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize(
    ("kind", "how", "dtype", "size"), [*((*layer, torch.float32, 8) for layer in LAYERS), *LONGER], ids=str
)
def test_what_recurrent_layers_keep_is_predicted_to_the_byte(kind: Any, how: Any, dtype: Any, size: int) -> None:
    x = torch.zeros(2, 3, size, size, dtype=dtype)
    same(lg.localize(recurrent(kind, **how).to(dtype), method=lg.bp(), example=x), sgd)


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("coupling", [None, lg.DeepMAN(depth=2)], ids=str)
def test_recurrent_layers_in_couplings_and_recomputed_are_predicted_too(
    coupling: lg.MAN | None, recomputed: bool
) -> None:
    x = torch.zeros(2, 3, 8, 8)
    model = lg.localize(recurrent(nn.LSTM), blocks=3, method=lg.dgl("0c1f"), coupling=coupling, example=x)
    lg.recompute(model, units=recomputed, couplings=recomputed)
    same(model, sgd)
    same(model, sgd, autocast=torch.bfloat16)


def same(model: lg.LocalModel, make: Any, **how: Any) -> None:
    """The predicted peak is the measured one to the byte."""
    assert lg.predict_peak(model, BATCH, make, **how).total == measured(model, make, **how).total


def test_a_recurrent_layer_of_another_build_is_said_to_be_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fakes, "_is_as_computed", lambda dtype: False)
    x = torch.zeros(2, 3, 8, 8)
    model = lg.localize(recurrent(nn.LSTM), method=lg.bp(), example=x)
    with pytest.warns(UserWarning, match="needs more memory than predicted"):
        lg.predict_peak(model, 2, sgd)


def test_sparse_gradients_are_measured_and_predicted() -> None:
    class Signs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.layer = nn.Embedding(2, 16, sparse=True), nn.Conv2d(16, 16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.table((x[:, 0] > 0).long()).permute(0, 3, 1, 2))

    x = torch.zeros(2, 3, 16, 16)
    network = nn.Sequential(Signs(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    model = lg.localize(network, method=lg.bp(), example=x)
    same(model, lambda own: [torch.optim.SGD(lg.param_groups(own), lr=0.1)])
    found = lg.measure_peak(lambda: lg.local_backward(model, x, torch.zeros(2).long()), model=model)
    assert found.split["gradients"] > 0


def test_a_network_with_a_list_of_tensors_is_predicted() -> None:
    """Torchvision's detectors keep their anchors in one."""

    class Shifted(nn.Conv2d):
        def __init__(self) -> None:
            super().__init__(3, 8, 3)
            self.table = [torch.ones(()), torch.full((8, 1, 1), 2.0)]

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.table[0] + self.table[1]

    network = nn.Sequential(Shifted(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    same(lg.localize(network, method=lg.bp(), example=torch.zeros(2, 3, 16, 16)), sgd)


def of_the_known(logits: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(logits[y != 255], y[y != 255])


def of_sequences(logits: Tensor, y: Tensor) -> Tensor:
    lengths: Any = [len(y)], [2]
    return functional.ctc_loss(logits.log_softmax(-1)[:, None], y[None, :2] + 1, *lengths)


@pytest.mark.parametrize("criterion", [of_the_known, of_sequences])
def test_a_criterion_that_depends_on_values_is_refused_with_a_sentence(criterion: Any) -> None:
    class Other(lg.Classification):
        def criterion(self, logits: Tensor, targets: Tensor) -> Tensor:
            return criterion(logits, targets)

    x = torch.randn(4, 3, 8, 8)
    network = lg.CifarResNet(8)
    model = lg.localize(network, method=lg.bp(), example=x, task=Other(10))
    lg.local_backward(model, x, torch.arange(4))
    for predict in (
        lambda: lg.predict_peak(model, 4, sgd),
        lambda: lg.plan(network, x, 2**30, method=lg.bp(), task=Other(10)),
    ):
        with pytest.raises(UserError, match="cannot be predicted where it depends on values, as that of aten"):
            predict()
