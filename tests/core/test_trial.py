"""A criterion of one's own: what it computes in each block, that it trains, and what is refused before a step."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small import assert_same, auxiliaries, gradients, resnet, said, sgd, state
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

import localgrad as lg

B, N = 6, 5
X = torch.randn(B, 3, 8, 8, generator=torch.Generator().manual_seed(1))
CLASSES = torch.tensor([0, 4, 2, 1, 3, 0])


def small(outputs: int = N, *, squeezed: bool = False, norm: bool = True) -> nn.Sequential:
    def unit(a: int, b: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b) if norm else nn.Identity(), nn.ReLU(), nn.Conv2d(b, b, 1)
        )

    torch.manual_seed(0)
    end = [nn.Flatten(0)] if squeezed else []
    units = [unit(3, 6), unit(6, 6), unit(6, 8)]
    return nn.Sequential(*units, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, outputs), *end)


# A criterion, its targets, the shape that the network gives, and the loss of one output, by hand.


def log_softmax(row: Tensor) -> list[float]:
    values = row.tolist()
    top = max(values)
    total = top + math.log(sum(math.exp(v - top) for v in values))
    return [v - total for v in values]


def mixup(output: Tensor, targets: Any) -> Tensor:
    first, second, share = targets
    return share * F.cross_entropy(output, first) + (1 - share) * F.cross_entropy(output, second)


def mixup_by_hand(output: Tensor, targets: Any) -> float:
    rows = [log_softmax(row) for row in output]
    first, second, share = targets
    pairs = zip(rows, first.tolist(), second.tolist(), strict=True)
    return -sum(share * row[a] + (1 - share) * row[b] for row, a, b in pairs) / B


def soft_by_hand(output: Tensor, targets: Tensor) -> float:
    rows = [log_softmax(row) for row in output]
    return -sum(t * v for row, ts in zip(rows, targets.tolist(), strict=True) for t, v in zip(ts, row, strict=True)) / B


def labels_by_hand(output: Tensor, targets: Tensor) -> float:
    total = 0.0
    for value, target in zip(output.flatten().tolist(), targets.flatten().tolist(), strict=True):
        p = 1 / (1 + math.exp(-value))
        total -= target * math.log(p) + (1 - target) * math.log(1 - p)
    return total / output.numel()


def squares_by_hand(output: Tensor, targets: Tensor) -> float:
    pairs = zip(output.flatten().tolist(), targets.flatten().tolist(), strict=True)
    return sum((a - b) ** 2 for a, b in pairs) / output.numel()


def weighted(output: Tensor, targets: Any) -> Tensor:
    each = F.cross_entropy(output, targets["class"], reduction="none")
    return (targets["weight"] * each).sum() / targets["weight"].sum()


def weighted_by_hand(output: Tensor, targets: Any) -> float:
    weights = targets["weight"].tolist()
    rows = zip(weights, output, targets["class"].tolist(), strict=True)
    return -sum(w * log_softmax(row)[c] for w, row, c in rows) / sum(weights)


def known_by_hand(output: Tensor, targets: Tensor) -> float:
    known = [(row, c) for row, c in zip(output, targets.tolist(), strict=True) if c != -100]
    return -sum(log_softmax(row)[c] for row, c in known) / len(known)


ONES = torch.eye(N, dtype=torch.float64)[CLASSES]
CASES: dict[str, tuple[Any, Any, dict[str, Any], Callable[[Tensor, Any], float]]] = {
    "mixup": (mixup, (CLASSES, CLASSES.flip(0), 0.3), {}, mixup_by_hand),
    "soft": (nn.CrossEntropyLoss(), 0.8 * ONES + 0.04, {}, soft_by_hand),
    "multi-label": (nn.BCEWithLogitsLoss(), (ONES + ONES.flip(0)).clamp(max=1), {}, labels_by_hand),
    "regression": (nn.MSELoss(), torch.linspace(-1, 1, 3 * B).double().view(B, 3), {"outputs": 3}, squares_by_hand),
    "one number": (
        F.mse_loss, torch.linspace(-1, 1, B).double(), {"outputs": 1, "squeezed": True}, squares_by_hand,
    ),
    "weights": (weighted, {"class": CLASSES, "weight": torch.arange(1.0, B + 1).double()}, {}, weighted_by_hand),
    "ignored": (nn.CrossEntropyLoss(), torch.tensor([0, -100, 2, -100, 3, 0]), {}, known_by_hand),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("coupling", [None, lg.MAN(0.9)], ids=["none", "man"])
def test_each_blocks_loss_is_the_criterion_of_what_its_head_gives(name: str, coupling: lg.MAN | None) -> None:
    criterion, targets, how, by_hand = CASES[name]
    x = X.double()
    model = lg.localize(
        small(**how).double(), blocks=3, method=lg.dgl("1c1f"), coupling=coupling, example=x, criterion=criterion,
        targets=targets,
    )  # fmt: skip
    out = lg.local_backward(model, x, targets)
    h = x
    for block, auxiliary, loss in zip(model.blocks, auxiliaries(model), out.losses, strict=False):
        h = block(h)
        given = auxiliary(h)["classifier"]
        assert given.shape == out.logits.shape
        assert float(loss) == pytest.approx(by_hand(given.detach(), targets), rel=1e-12)
    assert float(out.losses[-1]) == pytest.approx(by_hand(model.blocks[-1](h).detach(), targets), rel=1e-12)
    first = [float(loss) for loss in out.losses]
    optimizer = sgd(lg.param_groups(model))
    for _ in range(25):
        optimizer.step()
        optimizer.zero_grad()
        out = lg.local_backward(model, x, targets)
    assert all(float(now) < before for now, before in zip(out.losses, first, strict=True))


def test_the_default_is_the_criterion_that_it_names() -> None:
    plain = lg.localize(small(), blocks=3, method=lg.dgl("0c1f"), example=X)
    given = lg.localize(small(), blocks=3, method=lg.dgl("0c1f"), example=X, criterion=F.cross_entropy)
    given.load_state_dict(plain.state_dict())
    for model in (plain, given):
        lg.local_backward(model, X, CLASSES)
    assert_same(gradients(plain), gradients(given))


@pytest.mark.parametrize("name", ["mixup", "multi-label", "one number"])
def test_a_batch_in_parts_splits_all_targets(name: str) -> None:
    criterion, targets, how, _ = CASES[name]
    method = lg.dgl("0c1f")  # No batch norm is left, so parts change nothing.
    model = lg.localize(small(norm=False, **how).double(), blocks=3, method=method, example=X, criterion=criterion)
    twin = copy.deepcopy(model)
    twin.accumulate = 3
    whole, parts = (lg.local_backward(m, X.double(), targets) for m in (model, twin))
    torch.testing.assert_close(whole.losses, parts.losses, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients(model), gradients(twin), rtol=1e-9, atol=1e-15)


# Objectives that compare classes


def test_similarity_matching_takes_soft_and_multi_label_targets() -> None:
    x, targets = X.double(), CASES["multi-label"][1]
    model = lg.localize(
        small().double(), blocks=2, method=lg.predsim(beta=0.5), example=x, criterion=nn.BCEWithLogitsLoss(),
        targets=targets,
    )  # fmt: skip
    out = lg.local_backward(model, x, targets)
    h = model.blocks[0](x)
    maps = auxiliaries(model)[0].heads["similarity"](h).flatten(2)
    features = maps.var(dim=2).sqrt().detach()
    total = 0.0
    for i in range(B):
        for j in range(B):
            pair = []
            for rows in (features, targets):
                a, b = (rows[k] - rows[k].mean() for k in (i, j))
                pair.append(float(a @ b / max(float(a.norm()), 1e-8) / max(float(b.norm()), 1e-8)))
            total += (pair[0] - pair[1]) ** 2
    assert float(out.parts[0]["similarity"]) == pytest.approx(total / B**2, rel=1e-9)


COMPARE = {
    "similarity matching compares samples by their classes.*not by a tuple": (lg.predsim(), "mixup"),
    "similarity matching compares samples by their classes.*not by a dict": (lg.predsim(), "weights"),
    "similarity matching cannot leave samples out": (lg.predsim(), "ignored"),
    r"the supervised contrastive loss compares samples by one class each.*\(6, 5\) torch.float64": (
        lg.infopro(contrast=True), "multi-label",
    ),
    "the supervised contrastive loss cannot leave samples out": (lg.infopro(contrast=True), "ignored"),
}  # fmt: skip


@pytest.mark.parametrize("message", COMPARE)
def test_objectives_that_compare_classes_refuse_other_targets(message: str) -> None:
    method, name = COMPARE[message]
    criterion, targets = CASES[name][:2]
    how: Any = {"blocks": 3, "method": method, "example": X.double(), "criterion": criterion}
    with pytest.raises(lg.UserError, match=message):
        lg.localize(small().double(), **how, targets=targets)
    model = lg.localize(small().double(), **how)
    kept = state(model)
    with pytest.raises(lg.UserError, match=message):
        lg.local_backward(model, X.double(), targets)
    assert_same(model.state_dict(), kept)
    assert not gradients(model)


def test_an_ignored_index_that_comes_later_is_refused_before_that_step_moves_anything() -> None:
    model = lg.localize(small(), blocks=3, method=lg.predsim(), example=X, criterion=nn.CrossEntropyLoss())
    lg.local_backward(model, X, CLASSES)
    kept = state(model)
    assert "cannot leave samples out" in said(lg.local_backward, model, X, CASES["ignored"][1])
    assert_same(model.state_dict(), kept)


# What does not fit


def scalar_of_another(output: Tensor, targets: Tensor) -> Tensor:
    return torch.tensor(1.0)


REFUSED: dict[str, tuple[Any, Any]] = {
    r"the criterion returns a tensor of shape \(6,\) and not a scalar tensor: let it return a mean": (
        nn.CrossEntropyLoss(reduction="none"), CLASSES,
    ),
    "the criterion returns a float and not a scalar": (lambda output, y: 1.0, CLASSES),
    "a number that does not follow from the output": (scalar_of_another, CLASSES),
    r"does not take an output of shape \(6, 5\) in float32 with targets of shape \(6,\) in int64: .*": (
        nn.BCEWithLogitsLoss(), CLASSES,
    ),
    r"with targets of shape \(6, 4\) in float32": (nn.BCEWithLogitsLoss(), torch.rand(B, 4)),
    r"with targets of \(shape \(6,\) in int64, shape \(6,\) in int64, 0.3\)": (F.cross_entropy, CASES["mixup"][1]),
    "targets take a tensor with the batch first.*not a ndarray": (F.mse_loss, torch.rand(B, N).numpy()),
    "targets take a tensor with the batch first.*not a NoneType": (F.mse_loss, None),
    "targets take a tensor with the batch first.*not a list": (F.mse_loss, [1.0, 2.0]),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_a_criterion_that_does_not_fit_is_refused_before_anything_moves(message: str) -> None:
    criterion, targets = REFUSED[message]
    network = small().eval()
    if targets is not None:
        with pytest.raises(lg.UserError, match=message) as caught:
            lg.localize(network, blocks=3, method=lg.dgl(), example=X, criterion=criterion, targets=targets)
        assert "\n" not in str(caught.value)
        assert not network.training
    model = lg.localize(network, blocks=3, method=lg.dgl(), coupling=lg.MAN(0.0), example=X, criterion=criterion)
    kept, drawn = state(model), torch.get_rng_state()
    for _ in range(2):
        with pytest.raises(lg.UserError, match=message):
            lg.local_backward(model, X, targets)
    assert_same(model.state_dict(), kept)
    assert not gradients(model)
    assert torch.equal(torch.get_rng_state(), drawn)


def log_likelihood(output: Tensor, targets: Tensor) -> Tensor:
    return -(targets * output.log()).sum(1).mean()


def probabilities(last: nn.Module) -> nn.Module:
    return nn.Sequential(*small(norm=False), last)


ZERO_ONE = torch.ones(B, N)
RANGES: dict[str, tuple[Any, Any, Tensor]] = {  # The network, the criterion and targets.
    "linear, one number": (lambda: small(1, squeezed=True), nn.BCELoss(), torch.ones(B)),
    "linear": (small, nn.BCELoss(), ZERO_ONE),
    "linear, with weights": (small, nn.BCELoss(weight=torch.rand(N)), ZERO_ONE),
    "linear, log": (small, log_likelihood, ZERO_ONE),
}


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("case", RANGES)
def test_a_criterion_of_probabilities_is_refused_for_logits(case: str, blocks: int) -> None:
    make, criterion, targets = RANGES[case]
    method: Any = lg.bp() if blocks == 1 else lg.dgl("0c1f")
    how: Any = {"blocks": blocks, "method": method, "example": X, "criterion": criterion}
    network = make().eval()
    message = (
        r"the criterion does not take numbers from -\S* to \S*, which the network may give: .*"
        f"{'the result is nan' if 'log' in case else 'between 0 and 1'}; let the network give logits, and take a "
        r"criterion for them, as nn.BCEWithLogitsLoss\(\)$"
    )
    assert re.match(message, said(lg.localize, network, **how, targets=targets))
    assert not network.training
    model = lg.localize(network, **how)
    kept, drawn = state(model), torch.get_rng_state()
    assert re.match(message, said(lg.local_backward, model, X, targets))
    assert_same(model.state_dict(), kept)
    assert not gradients(model)
    assert torch.equal(torch.get_rng_state(), drawn)


@pytest.mark.parametrize(("last", "criterion"), [(nn.Sigmoid(), nn.BCELoss()), (nn.Softmax(1), log_likelihood)])
def test_a_network_may_give_the_probabilities_that_its_criterion_takes(last: nn.Module, criterion: Any) -> None:
    how: Any = {"example": X, "criterion": criterion, "targets": ZERO_ONE}
    model = lg.localize(probabilities(last), method=lg.bp(), **how)
    assert float(lg.local_backward(model, X, ZERO_ONE).losses[0]) > 0
    text = said(lg.localize, probabilities(last), blocks=3, method=lg.dgl("0c1f"), **how)
    assert text.startswith("the objective of the head 'classifier' of block 0 does not take numbers from -")
    assert "which that head may give" in text


def test_targets_of_another_batch_are_refused() -> None:
    how: Any = {"blocks": 3, "method": lg.dgl("0c1f"), "example": X, "criterion": mixup}
    wrong = (CLASSES, CLASSES[:3], 0.5)
    text = said(lg.localize, small(), **how, targets=wrong)
    assert text == "targets of 3 samples do not belong to an example of 6"
    text = said(lg.local_backward, lg.localize(small(), **how), X, wrong)
    assert text.startswith("inputs of shape (6, 3, 8, 8) for 6 and 3 targets: this model was localized for batch x 3")


def maps() -> nn.Sequential:
    return nn.Sequential(*(nn.Conv2d(c, 2, 1) for c in (3, 2, 2)))


def test_an_output_that_no_head_can_imitate_is_refused_and_trained_in_one_block() -> None:
    class Two(nn.Sequential):
        def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
            h = super().forward(input)
            return h, h.mean((2, 3))

    def loss(output: Any, target: Tensor) -> Tensor:
        return F.mse_loss(output[0], target)

    network = Two(*maps())
    text = said(lg.localize, network, blocks=2, method=lg.dgl(), example=X, criterion=loss)
    assert text.startswith("the backbone gives ((2, 8, 8), (2,)), and a head can give a number or a vector of numbers")
    model = lg.localize(network, method=lg.bp(), example=X, criterion=loss, targets=torch.rand(B, 2, 8, 8))
    (found,) = lg.local_backward(model, X, torch.zeros(B, 2, 8, 8)).losses
    torch.testing.assert_close(found, model.backbone(X)[0].square().mean().detach())


def test_heads_imitate_maps() -> None:
    model = lg.localize(maps(), blocks=2, method=lg.dgl(), example=X, criterion=F.mse_loss)
    losses = lg.local_backward(model, X, torch.zeros(B, 2, 8, 8)).losses
    (output,) = model.auxiliaries[0](model.blocks[0](X)).values()
    assert output.shape == (B, 2, 8, 8)
    torch.testing.assert_close(losses[0], output.square().mean().detach())


def test_arguments_that_are_no_criterion_are_refused() -> None:
    how: Any = {"blocks": 3, "method": lg.dgl(), "example": X}
    assert "not the class MSELoss" in said(lg.localize, small(), **how, criterion=nn.MSELoss)
    assert "as nn.MSELoss(), not a str" in said(lg.localize, small(), **how, criterion="mse")
    both = {"criterion": F.cross_entropy, "task": lg.Classification(N)}
    assert said(lg.localize, small(), **how, **both).startswith("a task has a criterion of its own")
    wide = said(lg.localize, small(1), **how | {"method": lg.predsim()}, criterion=F.mse_loss)
    assert wide.startswith("predsim compares samples by their classes")


def test_trying_moves_nothing_in_a_criterion_with_a_state_of_its_own() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, output: Tensor, targets: Tensor) -> Tensor:
            self.calls += 1
            return self.scale * F.cross_entropy(output, targets)

    own = Counting()
    model = lg.localize(small(), blocks=3, method=lg.dgl("0c1f"), example=X, criterion=own, targets=CLASSES)
    assert float(own.get_buffer("calls")) == 0
    lg.predict_peak(model, B, lambda m: [sgd(lg.param_groups(m))])
    assert own.scale.grad is None
    for calls in (3, 6):
        lg.local_backward(model, X, CLASSES)
        assert float(own.get_buffer("calls")) == calls
    assert own.scale.grad is not None


# A task of one's own


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = small()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        logits = self.body(x)
        return {"logits": logits, "certain": logits.softmax(1)}


class FromNamed:
    """Reads the logits of a dictionary, from the network as from its heads."""

    def criterion(self, output: Any, targets: Any) -> Tensor:
        return F.cross_entropy(output["logits"], targets["class"])

    def metrics(self, output: Any, targets: Any) -> dict[str, Tensor]:
        return {"right": (output["logits"].argmax(1) == targets["class"]).sum()}

    def check_targets(self, targets: Any) -> None:
        if "class" not in targets:
            raise lg.UserError("targets take a class a sample, as {'class': y}")

    def output(self, features: int) -> nn.Module:
        return Logits(features)


class Logits(nn.Linear):
    def __init__(self, features: int) -> None:
        super().__init__(features, N)

    def forward(self, input: Tensor) -> Any:
        return {"logits": super().forward(input)}


def test_a_task_of_ones_own_reads_a_dictionary() -> None:
    how: Any = {"blocks": 3, "method": lg.dgl("1c1f"), "coupling": lg.MAN(), "example": X, "task": FromNamed()}
    model = lg.localize(Named(), **how, targets={"class": CLASSES})
    for autocast in (None, torch.bfloat16):
        out = lg.local_backward(model, X, {"class": CLASSES}, autocast=autocast)
    assert set(out.logits) == {"logits", "certain"}
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert said(lg.local_backward, model, X, {"label": CLASSES}).startswith("targets take a class a sample")
    text = said(lg.localize, Named(), **how | {"method": lg.predsim()})
    assert text.startswith("predsim compares samples by their classes")


def test_results_and_methods_print_as_a_model_does() -> None:
    model = lg.localize(resnet(), blocks=2, method=lg.predsim(), example=X)
    lines = str(lg.local_backward(model, X, CLASSES)).splitlines()
    assert [line.split()[:3] for line in lines] == [["block", "0", "loss"], ["block", "1", "loss"]]
    assert "classifier" in lines[0]
    assert "similarity" in lines[0]
    assert repr(lg.dgl("1c1f")) == "dgl(channels=128, hidden=512, head='1c1f')"
    assert repr(lg.bp()) == "bp()"
    assert eval_free(lg.infopro(temperature=0.1)) == {"contrast": "False", "temperature": "0.1", "features": "128"}


def eval_free(method: lg.Method) -> dict[str, str]:
    inside = repr(method).removeprefix(f"{method.name}(").removesuffix(")")
    return dict(part.split("=") for part in inside.split(", "))  # pyright: ignore[reportReturnType]


def test_inputs_under_inference_mode_are_found_within_targets() -> None:
    model = lg.localize(small(), blocks=3, method=lg.dgl("0c1f"), example=X, criterion=mixup)
    with torch.inference_mode():
        made = tree_map_only(Tensor, torch.clone, CASES["mixup"][1])
    assert said(lg.local_backward, model, X, made).startswith("y was made under torch.inference_mode()")
