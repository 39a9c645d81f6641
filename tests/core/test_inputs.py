"""Networks of several inputs: batches in a tuple or a dictionary, labels, and what of another structure is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import said
from torch import Tensor, nn
from torch.nn import functional as F

import localgrad as lg

B, L, WIDTH, WORDS = 4, 6, 8, 11
IDS, MASK = torch.randint(0, WORDS, (B, L)), torch.ones(B, L)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, h: Tensor, mask: Tensor) -> Tensor:
        return h + self.outer(self.inner(h).relu()) * mask[..., None]


class Text(nn.Module):
    """Reads numbers of words with a mask. Its readout shares the table of its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.readout = nn.Linear(WIDTH, WORDS)
        self.readout.weight = self.embed.weight

    def forward(self, ids: Tensor, mask: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        assert labels is None
        h = self.embed(ids)
        for layer in self.layers:
            h = layer(h, mask)
        return {"logits": self.readout(h)}


def loss(output: dict[str, Tensor], target: Tensor) -> Tensor:
    return F.cross_entropy(output["logits"].flatten(0, 1), target.flatten())


def model_of(example: Any, **how: Any) -> lg.LocalModel:
    torch.manual_seed(0)
    how = {"blocks": 3, "method": lg.dgl(), "criterion": loss, **how}
    return lg.localize(Text(), example=example, **how)


BATCHES = {"a tuple": (IDS, MASK), "a dictionary": {"mask": MASK, "ids": IDS}}


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("coupling", [None, lg.MAN(), lg.DeepMAN()])
def test_blocks_read_what_the_network_reads(kind: str, coupling: lg.MAN | None) -> None:
    batch = BATCHES[kind]
    model = model_of(batch, coupling=coupling)
    result = lg.local_backward(model, batch, IDS)
    expected = model.backbone(**batch) if isinstance(batch, dict) else model.backbone(*batch)
    assert torch.equal(result.logits["logits"], expected["logits"])
    assert all(p.grad is not None for k in range(3) for p in model.members(k))


def test_labels_in_a_dictionary_are_the_targets() -> None:
    batch = {"ids": IDS, "mask": MASK, "labels": IDS}
    model = model_of(batch)
    assert torch.equal(lg.local_backward(model, batch).losses[2], lg.local_backward(model, batch, IDS).losses[2])
    assert torch.equal(lg.as_loss(model, batch).losses[0], lg.local_backward(model, batch).losses[0])


def test_parts_of_a_batch_have_their_own_rows_of_all_inputs() -> None:
    mask = torch.rand(B, L)
    model = model_of((IDS, mask), method=lg.bp(), blocks=None)
    whole = lg.local_backward(model, (IDS, mask), IDS)
    model.accumulate = 2
    parts = lg.local_backward(model, (IDS, mask), IDS)
    torch.testing.assert_close(parts.logits, whole.logits)
    torch.testing.assert_close(parts.losses, whole.losses)


def test_the_first_block_trains_a_shared_table_and_backpropagation_trains_it_whole() -> None:
    batch = (IDS, MASK)
    model = model_of(batch)
    lg.local_backward(model, batch, IDS)
    table = model.backbone.get_parameter("embed.weight")
    assert [any(p is table for p in model.members(k)) for k in range(3)] == [True, False, False]
    whole = model_of(batch, method=lg.bp(), blocks=None)
    lg.local_backward(whole, batch, IDS)
    plain = Text()
    plain.load_state_dict(whole.backbone.state_dict())
    loss(plain(*batch), IDS).backward()
    torch.testing.assert_close(whole.backbone.get_parameter("embed.weight").grad, plain.embed.weight.grad)


def test_plans_take_several_inputs() -> None:
    fitted = lg.fit(Text(), (IDS, MASK), budget="150%", criterion=loss, targets=IDS)
    lg.local_backward(fitted.model, (IDS, MASK), IDS)
    planner = lg.Planner(Text(), (IDS, MASK), method=lg.dgl(), criterion=loss, targets=IDS)
    plan, targets = planner.even(3), IDS.clone()
    model = plan.localize(Text(), (IDS, MASK))
    optimizer = torch.optim.SGD(lg.param_groups(model), lr=0.1, momentum=0.9)

    def step() -> None:
        lg.local_backward(model, (IDS, MASK), targets)
        optimizer.step()
        optimizer.zero_grad()

    step()
    assert planner.exactly(plan).peak == pytest.approx(
        lg.measure_peak(step, model=model, optimizers=[optimizer]).total, rel=0.01
    )


def test_another_structure_than_the_examples_is_told() -> None:
    model = model_of((IDS, MASK))
    text = "x is a tensor, and this model was localized for a tuple of x1, x0"
    assert said(lg.local_backward, model, IDS, IDS) == text
    text = said(lg.local_backward, model, {"ids": IDS, "mask": MASK}, IDS)
    assert text.startswith("x is a dictionary of mask, ids, and this model was localized for a tuple of")
    assert said(lg.local_backward, model, (IDS, 3), IDS).startswith("x takes a tensor, or a tuple or dictionary of")
    assert said(lg.units, Text(), [IDS]).startswith("example takes a tensor, or a tuple or dictionary of tensors")


class Places(nn.Module):
    """Reads the sum of the places of words, which are the same for all samples, divided by their number."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.readout = nn.Linear(WIDTH, 3)

    def forward(self, ids: Tensor, places: Tensor) -> Tensor:
        h = self.embed(ids)
        for layer in self.layers:
            h = layer(h, (places.sum() / len(places)).expand(ids.shape))
        return self.readout(h.mean(1))


def test_what_belongs_to_no_sample_stays_whole_where_a_batch_is_divided() -> None:
    places, ids, targets = torch.arange(float(L)), torch.randint(0, WORDS, (L, L)), torch.arange(L) % 3
    model = lg.localize(Places(), blocks=2, method=lg.dgl("0c1f"), example=(ids[:B], places))
    model.accumulate = L  # There are as many samples as places.
    result = lg.local_backward(model, (ids, places), targets)
    torch.testing.assert_close(result.logits, model.backbone(ids, places))
    by_name = lg.localize(Places(), blocks=2, method=lg.dgl("0c1f"), example={"ids": ids[:B], "places": places})
    by_name.accumulate = L
    result = lg.local_backward(by_name, {"ids": ids, "places": places}, targets)
    torch.testing.assert_close(result.logits, by_name.backbone(ids, places))


def test_another_shape_than_the_examples_is_told_of_each_input() -> None:
    model, targets = lg.localize(Places(), method=lg.bp(), example=(IDS, torch.ones(L))), torch.zeros(B).long()
    # The blocks would divide by the number of the example's places.
    text = said(lg.local_backward, model, (IDS, torch.ones(L + 1)), targets)
    assert text.startswith("x1 of shape (7,): this model was localized for (6,) in a batch of 4: pad, crop or resize")
    assert said(lg.local_backward, model, (IDS[:, 1:], torch.ones(L)), targets).endswith("resize each batch to that")
    masked = model_of((IDS, MASK.long()))
    for mask in (MASK[:, 1:], MASK[:3], MASK[0]):
        text = said(lg.local_backward, masked, (IDS, mask.long()), IDS)
        assert text.startswith(f"x1 of shape {tuple(mask.shape)}: this model was localized for (4, 6) in a batch of 4")


def test_one_row_may_stand_for_all_samples() -> None:
    model = model_of((IDS, MASK.long()))
    result = lg.local_backward(model, (IDS, MASK[:1].long()), IDS)
    assert torch.equal(result.logits["logits"], model.backbone(IDS, MASK[:1].long())["logits"])


@pytest.mark.parametrize("counts", [(1, 0, 3, 2), (B,) * B], ids=["some boxes", "as many boxes as samples"])
def test_a_dictionary_for_each_sample_is_refused(counts: tuple[int, ...]) -> None:
    """Torchvision's form of boxes. In the second case each tensor has as many rows as there are samples."""
    x, targets = torch.rand(B, 3), [{"boxes": torch.rand(n, 4), "labels": torch.ones(n)} for n in counts]
    how = {"blocks": 2, "method": lg.dgl("0c1f"), "example": x, "criterion": lambda output, y: output.mean()}
    network = nn.Sequential(*(nn.Linear(3, 3) for _ in range(3)))
    model = lg.localize(network, **how)
    for call in (lambda: lg.local_backward(model, x, targets), lambda: lg.localize(network, **how, targets=targets)):
        assert said(call).startswith("targets are a list with a dictionary for each sample, but each tensor must")
    lg.local_backward(model, x, [{"weight": torch.ones(B)} for _ in range(B)])
