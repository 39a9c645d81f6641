"""Language models: the loss in chunks, readouts, the task with each method and coupling, LoPT, and bad input."""

from __future__ import annotations

import copy
import math
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from gpt import GPT
from small import assert_same, auxiliaries, gradients, said, state
from torch import Tensor, nn
from torch.nn import functional as F

import localgrad as lg
from localgrad.core import language_model
from localgrad.core.boundary import Boundary
from localgrad.core.language_model import SharedReadout, Unread, next_token_loss, plain_next_token_loss

VOCABULARY, CONTEXT, WIDTH = 30, 6, 8
TASK = lg.LanguageModel(VOCABULARY)


def gpt(layers: int = 4, **settings: Any) -> GPT:
    torch.manual_seed(0)
    return GPT(
        **{"vocabulary": VOCABULARY, "context": CONTEXT, "width": WIDTH, "layers": layers, "heads": 2, **settings}
    )


def batch(count: int = 3, seed: int = 1) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (count, CONTEXT + 1), generator=made)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def cut(network: nn.Module, method: lg.Method, task: lg.LanguageModel = TASK, **how: Any) -> lg.LocalModel:
    return lg.localize(network, **{"blocks": 3, "method": method, "example": batch()[0], "task": task, **how})


# The loss


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("count", [1, 5, 12, 23])  # One chunk has 8 tokens, the width, which do not divide 23.
def test_the_loss_in_chunks_is_the_plain_one(count: int, biased: bool) -> None:
    h = torch.randn(count, WIDTH, dtype=torch.float64)
    weight = 3 * torch.randn(VOCABULARY, WIDTH, dtype=torch.float64)
    bias = torch.randn(VOCABULARY, dtype=torch.float64) if biased else None
    targets = torch.randint(VOCABULARY, (count,))
    leaves = [t.requires_grad_() for t in (h, weight, bias) if t is not None]
    found, wanted = (
        (loss, *torch.autograd.grad(0.7 * loss, leaves))
        for loss in (make(h, weight, bias, targets) for make in (next_token_loss, plain_next_token_loss))
    )
    naive = 0.0
    for row, target in zip(h @ weight.T + (0 if bias is None else bias), targets, strict=True):
        naive -= (row[target] - row.exp().sum().log()).item()
    assert found[0].item() == pytest.approx(naive, rel=1e-12)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("counted", [0, 1, 9, 23])
def test_targets_of_the_ignored_value_do_not_count_in_chunks(counted: int) -> None:
    h = torch.randn(23, WIDTH, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, WIDTH, dtype=torch.float64)
    bias = torch.randn(VOCABULARY, dtype=torch.float64)
    targets = torch.randint(VOCABULARY, (23,))
    targets[torch.randperm(23)[counted:]] = -100
    leaves = [t.requires_grad_() for t in (h, weight, bias)]
    loss = next_token_loss(h, weight, bias, targets)
    wanted = F.cross_entropy(F.linear(h, weight, bias), targets, ignore_index=-100, reduction="sum")
    for a, b in zip(
        (loss, *torch.autograd.grad(loss, leaves)), (wanted, *torch.autograd.grad(wanted, leaves)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    of_h = torch.autograd.grad(next_token_loss(h, weight, bias, targets), h)[0]
    assert not bool(of_h[targets == -100].any())


def test_a_readout_that_is_not_trained_gets_no_gradient_and_large_logits_stay_finite() -> None:
    h = torch.full((4, WIDTH), 200.0, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH)
    loss = next_token_loss(h, weight, None, torch.arange(4))
    loss.backward()
    assert bool(loss.isfinite())
    assert h.grad is not None
    assert bool(h.grad.isfinite().all())
    assert not weight.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(next_token_loss(h, weight, None, torch.arange(4)), loss)


def test_the_loss_in_chunks_never_holds_all_logits() -> None:
    tokens, width, vocabulary = 512, 32, 4096
    h, weight = torch.randn(tokens, width, requires_grad=True), torch.randn(vocabulary, width, requires_grad=True)
    targets, logits = torch.zeros(tokens, dtype=torch.int64), 4 * tokens * vocabulary

    def peak(loss: Any) -> int:
        return lg.measure_peak(lambda: loss(h, weight, None, targets).backward()).total

    assert peak(plain_next_token_loss) > 2 * logits
    # Features and readout, their gradients now and before, and the logits of a chunk, as large as the readout.
    assert peak(next_token_loss) < 3 * 4 * (tokens + vocabulary) * width + 1.1 * 4 * vocabulary * width < logits / 3


@pytest.mark.parametrize(
    ("tokens", "width", "vocabulary", "chunks"), [(512, 32, 4096, 16), (600, 300, 1024, 3), (64, 16, 32, 2)]
)
def test_the_loss_passes_over_the_readout_a_few_times(
    monkeypatch: pytest.MonkeyPatch, tokens: int, width: int, vocabulary: int, chunks: int
) -> None:
    made = []
    monkeypatch.setattr(language_model, "_add", lambda *chunk: made.append(chunk))
    h, weight = torch.zeros(tokens, width, requires_grad=True), torch.zeros(vocabulary, width)
    next_token_loss(h, weight, None, torch.zeros(tokens, dtype=torch.int64))
    assert len(made) == chunks


def test_blocks_hold_no_logits_of_a_whole_batch() -> None:
    network = gpt(vocabulary=2048, width=16)
    x, y = torch.zeros(8, CONTEXT, dtype=torch.int64), torch.ones(8, CONTEXT, dtype=torch.int64)
    peaks = {}
    for blocks in (2, 4):
        model = cut(network, lg.dgl(), lg.LanguageModel(2048), blocks=blocks, example=x)
        lg.local_backward(model, x, y)  # makes all gradients
        peaks[blocks] = lg.measure_peak(lambda m=model: lg.local_backward(m, x, y), model=model)
    logits = 4 * 8 * CONTEXT * 2048
    beyond = {k: p.total - p.timeline[0][1] for k, p in peaks.items()}
    assert all(found < 1.5 * logits for found in beyond.values())  # of which the gradient of one readout is a third
    assert beyond[4] <= beyond[2]


# Readouts


def test_a_readout_gives_logits_in_evaluation_alone() -> None:
    readout, h = lg.Readout(WIDTH, VOCABULARY), torch.randn(2, 3, WIDTH)
    made = readout(h)
    assert isinstance(made, Unread)
    assert torch.equal(made.logits(), readout.eval()(h))
    assert torch.equal(readout(h), F.linear(h, readout.weight, readout.bias))


@pytest.mark.parametrize("every", [1, 3])
def test_a_shared_readout_is_refreshed_every_n_steps(every: int) -> None:
    network = gpt()
    model = cut(network, lg.dgl(), lg.LanguageModel(VOCABULARY, network.readout, every))
    shared = [m for m in model.auxiliaries.modules() if isinstance(m, SharedReadout)]
    assert len(shared) == 2
    assert not any(p is network.readout.weight for p in model.auxiliaries.parameters())
    optimizer = torch.optim.SGD(lg.param_groups(model), lr=0.5)
    x, y = batch()
    before = [network.readout.weight.detach().clone()]  # at the beginning of each step
    for step in range(7):
        lg.local_backward(model, x, y)
        for copied in shared:
            assert torch.equal(copied.weight, before[step // every * every])
        optimizer.step()
        optimizer.zero_grad()
        before.append(network.readout.weight.detach().clone())
        assert not torch.equal(before[-1], before[-2])
    model.refresh()
    assert torch.equal(shared[0].weight, network.readout.weight)


def test_a_copy_of_a_model_shares_its_own_readout_and_goes_on_to_the_same_bits() -> None:
    network = gpt()
    model = cut(network, lg.dgl(), lg.LanguageModel(VOCABULARY, network.readout, 2))
    x, y = batch()
    twins = [model, copy.deepcopy(model)]
    for each in twins:
        optimizer = torch.optim.SGD(lg.param_groups(each), lr=0.5)
        for _ in range(3):
            lg.local_backward(each, x, y)
            optimizer.step()
            optimizer.zero_grad()
    assert_same(state(model), state(twins[1]))
    shared = next(m for m in twins[1].auxiliaries.modules() if isinstance(m, SharedReadout))
    assert shared.source.module is twins[1].backbone.readout is not network.readout


def test_a_resumed_model_refreshes_its_shared_readouts_in_the_same_steps(tmp_path: Path) -> None:
    x, y = batch()

    def made() -> tuple[lg.LocalModel, torch.optim.Optimizer]:
        network = gpt()
        torch.manual_seed(1)
        model = cut(network, lg.dgl(), lg.LanguageModel(VOCABULARY, network.readout, 3))
        return model, torch.optim.SGD(lg.param_groups(model), lr=0.5)

    def train(model: lg.LocalModel, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            lg.local_backward(model, x, y)
            optimizer.step()
            optimizer.zero_grad()

    straight, first, resumed = made(), made(), made()
    train(*straight, 7)
    train(*first, 4)
    torch.save(first[0].state_dict(), tmp_path / "state.pt")
    resumed[0].load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    train(*resumed, 3)
    assert_same(state(straight[0]), state(resumed[0]))
    shared = [m for m in resumed[0].auxiliaries.modules() if isinstance(m, SharedReadout)]
    assert [m.turn for m in shared] == [7, 7]


def test_large_embeddings_begin_with_small_logits() -> None:
    embedding, tokens = nn.Embedding(VOCABULARY, WIDTH), Boundary((CONTEXT, WIDTH), "NLC", 0)
    head = lg.LanguageModel(VOCABULARY, embedding).head(tokens).eval()
    assert float(head(torch.randn(64, CONTEXT, WIDTH)).detach().std()) < 1.3
    assert float((nn.LayerNorm(WIDTH)(torch.randn(64, WIDTH)) @ embedding.weight.T).detach().std()) > 1.5


# The task


class Logits(nn.Module):
    """A network that gives plain logits in a dictionary, as those of transformers do."""

    def __init__(self, network: GPT) -> None:
        super().__init__()
        self.network, self.readout = network, nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.readout.weight = network.readout.weight

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        h = self.network.embedding(tokens)
        for layer in self.network.layers:
            h = layer(h)
        return {"logits": self.readout(self.network.norm(h))}


def test_the_logits_of_a_dictionary_are_taken() -> None:
    x, y = batch()
    found = []
    for named in (True, False):
        network = gpt().double()
        backbone = Logits(network) if named else network
        torch.manual_seed(1)
        model = cut(backbone, lg.dgl(), targets=y)
        lg.local_backward(model, x, y)
        scores = TASK.scores(TASK.metrics(model.eval()(x), y))
        found.append(([p.grad for p in network.parameters()], scores))
    assert found[0][1] == pytest.approx(found[1][1])
    for a, b in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("coupling", [None, lg.MAN(0.9), lg.DeepMAN(0.9, depth=2)], ids=str)
@pytest.mark.parametrize("shared", [None, "embedding", "readout"])
@pytest.mark.parametrize("method", [lg.dgl(), lg.auglocal(depth=2), lg.lopt()], ids=lambda m: m.name)
def test_every_parameter_of_a_block_learns_from_its_own_loss(
    method: lg.Method, shared: str | None, coupling: lg.MAN | None
) -> None:
    network = gpt()
    source = {None: None, "embedding": network.embedding.token, "readout": network.readout}[shared]
    model = cut(network, method, lg.LanguageModel(VOCABULARY, source), coupling=coupling)
    x, y = batch()
    trained = {p: k for k in range(3) for p in model.members(k)}
    assert set(trained) == {p for p in model.parameters() if p.requires_grad}
    reached: set[nn.Parameter] = set()
    for done in lg.block_steps(model, x, y):
        now = {p for p in trained if p.grad is not None}
        assert {trained[p] for p in now - reached} == {done.block}
        reached = now
    assert reached == set(trained)
    assert all(bool(p.grad.any()) for p in network.parameters() if p.grad is not None)


def test_each_block_has_the_gradients_of_its_own_plain_loss() -> None:
    """Blocks with heads of their own, written with plain PyTorch."""
    network = gpt().double()
    model = cut(network, lg.dgl())
    assert [block.names for block in model.blocks] == [
        ("embedding",),
        ("layers.0", "layers.1"),
        ("layers.2", "layers.3"),
    ]
    x, y = batch()
    out = lg.local_backward(model, x, y)
    found = gradients(model)
    model.zero_grad()
    e = network.embedding(x)
    h = network.layers[1](network.layers[0](e.detach()))
    last = network.layers[3](network.layers[2](h.detach()))
    norms: Any = [a.heads["classifier"] for a in auxiliaries(model)]
    readouts = [
        *(
            (F.layer_norm(t, (WIDTH,), n[0][0].weight, n[0][0].bias), n[0][1].weight)
            for t, n in zip((e, h), norms, strict=True)
        ),
        (network.norm(last), network.readout.weight),
    ]
    losses = [F.cross_entropy((t @ w.T).flatten(0, 1), y.flatten()) for t, w in readouts]
    torch.stack(losses).sum().backward()
    for a, b in zip(out.losses, losses, strict=True):
        assert a.item() == pytest.approx(b.item(), rel=1e-12)
    wanted = gradients(model)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-12)


def test_a_network_with_plain_logits_trains_alike_and_accumulates() -> None:
    x, y = batch(4)
    found = []
    for plain in (False, True):
        network = gpt().double()
        if plain:
            readout = nn.Linear(WIDTH, VOCABULARY, bias=False, dtype=torch.float64)
            readout.load_state_dict(network.readout.state_dict())
            network.readout = readout  # pyright: ignore[reportAttributeAccessIssue]
        torch.manual_seed(1)
        model = cut(network, lg.dgl())
        whole = lg.local_backward(model, x, y)
        parts = gradients(model)
        model.zero_grad()
        model.accumulate = 2
        out = lg.local_backward(model, x, y)
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(gradient, parts[name], rtol=1e-10, atol=1e-12)
        logits = whole.logits if plain else whole.logits.logits()
        torch.testing.assert_close(out.logits if plain else out.logits.logits(), logits)
        found.append((logits, parts))
    torch.testing.assert_close(found[0][0], found[1][0])
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(gradient, found[1][1][name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("plain", [False, True])
def test_padding_does_not_count(plain: bool) -> None:
    network, (x, y) = gpt().double(), batch()
    if plain:
        network.readout = nn.Linear(WIDTH, VOCABULARY, dtype=torch.float64)  # pyright: ignore[reportAttributeAccessIssue]
    padded = y.clone()
    padded[:, 4:] = -100
    model = cut(network, lg.dgl())
    out = lg.local_backward(model, x, padded)
    found = gradients(model)
    logits = (out.logits if plain else out.logits.logits()).detach()
    wanted = F.cross_entropy(logits.flatten(0, 1), padded.flatten())
    assert out.losses[-1].item() == pytest.approx(wanted.item(), rel=1e-12)
    scores = TASK.scores(TASK.metrics(logits, padded))
    assert scores == pytest.approx(TASK.scores(TASK.metrics(logits[:, :4], y[:, :4])))
    assert scores["loss"] == pytest.approx(wanted.item())
    other = torch.full_like(y, VOCABULARY + 5)
    other[:, :4] = y[:, :4]
    model.zero_grad()
    with_other = cut(network, lg.dgl(), lg.LanguageModel(VOCABULARY, ignore_index=VOCABULARY + 5))
    with_other.auxiliaries.load_state_dict(model.auxiliaries.state_dict())
    lg.local_backward(with_other, x, other)
    assert_same(found, gradients(with_other))
    model = cut(network, lg.dgl())
    network.zero_grad()
    nothing = lg.local_backward(model, x, torch.full_like(y, -100))
    assert not any(bool(loss) for loss in nothing.losses)
    assert not any(bool(p.grad.any()) for p in model.parameters() if p.grad is not None)
    assert TASK.scores(TASK.metrics(logits, torch.full_like(y, -100)))["loss"] == 0


def test_metrics_add_up_to_bits_and_perplexity() -> None:
    logits, (_, y) = torch.randn(3, CONTEXT, VOCABULARY), batch()
    sums = TASK.metrics(logits, y)
    parts = [TASK.metrics(logits[a:b], y[a:b]) for a, b in ((0, 1), (1, 3))]
    assert {name: float(value) for name, value in sums.items()} == pytest.approx(
        {name: sum(float(p[name]) for p in parts) for name in sums}
    )
    nats = -logits.log_softmax(2).gather(2, y[..., None]).mean()
    scores = TASK.scores(sums)
    assert scores["loss"] == pytest.approx(float(nats))
    assert scores["bits"] == pytest.approx(float(nats) / math.log(2))
    assert scores["perplexity"] == pytest.approx(math.exp(float(nats)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_metrics_of_half_precision_are_summed_in_float32(dtype: torch.dtype) -> None:
    task, y = lg.LanguageModel(256), torch.randint(256, (8, 512))
    logits = (torch.randn(8, 512, 256) / 2).to(dtype)
    wanted = task.scores(task.metrics(logits.double(), y))["bits"]
    assert task.scores(task.metrics(logits, y))["bits"] == pytest.approx(wanted, rel=1e-6)
    unread = lg.Readout(WIDTH, 256, dtype=dtype)(torch.randn(8, 512, WIDTH).to(dtype))
    exact = Unread(*(t.double() for t in unread))
    wanted = task.scores(task.metrics(exact, y))["bits"]
    assert task.scores(task.metrics(unread, y))["bits"] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("way", ["coupled", "shared", "wide", "padded"])
def test_peaks_and_plans_take_tokens(way: str) -> None:
    network, (x, y) = gpt(2, vocabulary=600 if way == "wide" else VOCABULARY), batch(64)
    if way == "padded":
        y[:, 3:] = -100
    task = lg.LanguageModel(600 if way == "wide" else VOCABULARY, network.readout if way == "shared" else None, 1)
    model = cut(network, lg.dgl(), task, coupling=lg.MAN() if way == "coupled" else None)

    def optimizers(own: lg.LocalModel) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(lg.param_groups(own), lr=0.1, momentum=0.9)]

    made = optimizers(model)

    def step() -> None:
        lg.local_backward(model, x, y)
        made[0].step()
        made[0].zero_grad()

    step()
    measured = lg.measure_peak(step, model=model, optimizers=made).total
    assert lg.predict_peak(model, len(x), optimizers, targets=y).total == measured
    planner = lg.Planner(network, x, method=lg.dgl(), targets=y, task=task, accumulate="never")
    for plan in (planner.checkpointing, planner.even(2)):
        planned = plan.localize(network, x)
        assert planned.task is task
        lg.local_backward(planned, x, y)
    assert planner.checkpointing.peak < planner.bp.peak
    assert "no plan can be made" in said(lg.plan, network, x, 2**20, method=lg.lopt(), targets=y, task=task)


def test_the_code_of_the_page_on_tasks_runs(tmp_path: Path) -> None:
    page = Path(__file__).parents[2] / "docs" / "tasks.md"
    (code,) = re.findall(
        r"^```python\n(import torch\nimport localgrad.*?LanguageModel.*?)^```$", page.read_text(), re.M | re.S
    )
    script = tmp_path / "page.py"
    script.write_text(code)
    names = runpy.run_path(str(script))
    assert len(names["out"].losses) == len(names["model"].blocks) == 2
    assert all(p.grad is not None for p in names["model"].parameters() if p.requires_grad)
    assert 5 < names["scores"]["bits"] < 12


# LoPT


class Noisy(nn.Module):
    """An embedding that drops features out and counts its calls."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding, self.dropout = embedding, nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.dropout(self.embedding(x))


def test_lopt_rebuilds_what_enters_a_block() -> None:
    network = gpt().double()
    network.embedding = Noisy(network.embedding)  # pyright: ignore[reportAttributeAccessIssue]
    model = cut(network, lg.lopt(weight=7.0), blocks=["layers.0", "layers.2", "layers.3"])
    x, y = batch()
    torch.manual_seed(3)
    out = lg.local_backward(model, x, y)
    assert float(network.embedding.calls) == 1  # pyright: ignore[reportArgumentType]
    found = gradients(model)
    model.zero_grad()
    torch.manual_seed(3)
    h = network.embedding(x)
    losses = []
    for auxiliary, layers in zip(auxiliaries(model), (network.layers[:1], network.layers[1:3]), strict=True):
        target = h.detach()
        for layer in layers:
            h = layer(h)
        rebuild: Any = auxiliary.heads["features"]
        norm, first, _, last = rebuild
        assert (first.out_features, last.out_features) == (WIDTH // 4, WIDTH)
        z = F.layer_norm(h, (WIDTH,), norm.weight, norm.bias)
        rebuilt = F.gelu(z @ first.weight.T + first.bias) @ last.weight.T + last.bias
        losses.append(7 * (rebuilt - target).square().mean())
        h = h.detach()
    torch.stack(losses).sum().backward()
    for k, loss in enumerate(losses):
        assert out.losses[k].item() == pytest.approx(loss.item(), rel=1e-12)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-12)


def test_lopt_sees_no_targets_below_the_last_block() -> None:
    found = []
    for seed in (1, 2):
        torch.manual_seed(5)
        model = cut(gpt(), lg.lopt())
        lg.local_backward(model, batch()[0], batch(seed=seed)[1])
        found.append([gradients(block) for block in model.blocks])
    for k in (0, 1):
        assert_same(found[0][k], found[1][k])
    assert not torch.equal(found[0][2]["1.mixed.weight"], found[1][2]["1.mixed.weight"])


# Bad input


def test_what_does_not_fit_is_said_in_one_sentence() -> None:
    network, (x, y) = gpt(), batch()
    model = cut(network, lg.dgl())
    beyond = torch.full_like(x, VOCABULARY)
    assert said(lg.local_backward, model, beyond, y) == (
        "inputs have tokens from 30 to 30, and the vocabulary has those from 0 to 29"
    )
    assert said(lg.local_backward, model, x, beyond) == (
        "targets have tokens from 30 to 30, and the vocabulary has those from 0 to 29; -100 is a target that does not "
        "count"
    )
    assert "targets have tokens from -1 to -1" in said(lg.local_backward, model, x, torch.full_like(y, -1))
    assert "inputs have tokens from -100 to -100" in said(lg.local_backward, model, torch.full_like(x, -100), y)
    assert "targets must be the token behind each token" in said(lg.local_backward, model, x, y[:, 0])
    assert "targets must be the token behind each token" in said(lg.local_backward, model, x, y.float())
    padded = x.clone()
    padded[:, 3:] = -100
    for copied in (x, padded):
        assert said(lg.local_backward, model, x, copied) == (
            "targets are a copy of the inputs, which a network learns by reading one token: give the token behind "
            "each, x = tokens[:, :-1] and y = tokens[:, 1:]"
        )
    one = torch.zeros_like(x)
    lg.local_backward(model, one, one)  # The same token over and over does follow itself.
    for wrong in (y[:, 1:], y[:, :1], torch.cat((y, y), 1)):
        expected = f"targets of shape {tuple(wrong.shape)} do not belong to an output for tokens of shape (3, 6): give"
        assert expected in said(lg.local_backward, model, x, wrong)
        assert expected in said(TASK.metrics, torch.zeros(3, CONTEXT, VOCABULARY), wrong)
    larger = lg.LanguageModel(VOCABULARY + 1)
    assert said(cut, Logits(network), lg.dgl(), larger) == (
        "the backbone gives 30 logits a token for a vocabulary of 31: make it with 31 outputs"
    )
    assert "gives 30 logits a token for a vocabulary of 31" in said(cut, network, lg.dgl(), larger, targets=y)
    assert "gives 30 logits a token" in said(lg.local_backward, cut(network, lg.dgl(), larger), x, y)
    first = nn.Sequential(network.embedding, *network.layers, nn.Flatten(), nn.Linear(CONTEXT * WIDTH, VOCABULARY))
    assert "gives (30,) for a sample, and a language model takes logits [length, 30]" in said(cut, first, lg.dgl())
    assert "2 tokens or more" in said(lg.LanguageModel, 1)
    assert "every 1 step or more" in said(lg.LanguageModel, 5, None, 0)
    assert "a value that is no token, and 29 is one of 30" in said(lg.LanguageModel, VOCABULARY, ignore_index=29)
    assert "a module with one matrix" in said(lg.LanguageModel, VOCABULARY, network.norm)
    assert "shared has 30 tokens, and the vocabulary 31" in said(lg.LanguageModel, 31, network.readout)
    other = lg.LanguageModel(VOCABULARY, nn.Embedding(VOCABULARY, WIDTH + 1))
    assert "the shared readout reads 9 features a token, and 8 cross" in said(cut, network, lg.dgl(), other)
    assert "read tokens [L, width]" in said(TASK.head, Boundary((3, 8, 8), "NCHW", 0))
    assert "above 0, not 0" in said(lg.lopt, weight=0)
    assert "take lg.dgl()" in said(cut, network, lg.predsim())
    rebuilds = cut(network, lg.infopro())
    assert "the inputs are torch.int64, as tokens are" in said(lg.local_backward, rebuilds, x, y)
    images = torch.zeros(2, 3, 8, 8)
    maps = nn.Sequential(*[nn.Conv2d(3, 3, 3, padding=1) for _ in range(3)], nn.Flatten(), nn.Linear(192, 4))
    assert "lopt rebuilds tokens of tokens" in said(lg.localize, maps, blocks=2, method=lg.lopt(), example=images)
