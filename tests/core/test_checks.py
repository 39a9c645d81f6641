"""Mistakes of callers get one sentence each, before anything has changed. What looks odd but is right is taken."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import timm
import torch
from small import ALL_COUPLINGS, Net, assert_same, batch, gradients, local, resnet, sgd, state, vgg
from torch import Tensor, nn
from torch.nn import functional as F

import localgrad as lg
from localgrad.core.errors import UserError
from localgrad.scale.memory import optimizers_for, training_step

# What localize is given


X, Y = batch()


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ((X, Y), r"takes \(too many positional arguments\): give all inputs and no labels, as x of a batch"),
        ({"pixel_values": X}, "example is not what the forward of CifarResNet takes"),
        ([X], "not a list"),
        (X.numpy(), "not an array of numpy"),
        (None, "example takes a tensor, or a tuple or dictionary of tensors .* not a NoneType"),
        (torch.tensor(1.0), r"one sample or more, such as \[B, C, H, W\], not shape \(\)"),
        (X[0, 0, 0], r"not shape \(8,\)"),
        (X[:0], r"not shape \(0, 3, 8, 8\)"),
        (X[:, :, :0], r"not shape \(4, 3, 0, 8\)"),
    ],
)
def test_an_example_is_one_batch_of_inputs(example: Any, message: str) -> None:
    how: dict[str, Any] = {"method": lg.dgl("0c1f")}
    for call in (
        lambda: lg.localize(resnet(), example=example, **how),
        lambda: lg.units(resnet(), example),
        lambda: lg.Planner(resnet(), example, **how),
    ):
        with pytest.raises(UserError, match=message):
            call()


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (lambda: torch.compile(resnet(), backend="eager"), "torch.compile has wrapped cannot be cut"),
        (lambda: nn.Linear, "is an nn.Module, not the class Linear"),
        (lambda: resnet().state_dict(), "is an nn.Module, not an OrderedDict"),
    ],
)
def test_what_is_no_network_is_refused(network: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        lg.localize(network(), method=lg.dgl(), example=X)


def test_blocks_are_a_number_or_names_of_numpy_too_and_nothing_else() -> None:
    def cut(blocks: Any) -> lg.LocalModel:
        return lg.localize(vgg(), blocks=blocks, method=lg.dgl("0c1f"), example=X)

    for blocks in (np.int64(3), np.uint8(3), np.array(["0", "7"])):
        assert len(cut(blocks).blocks) == 3
    wrong = [True, np.bool_(True), 3.0, np.float32(3), np.array([1, 2]), [1, 2], len, {}.items, torch.tensor(2)]
    for blocks in (*wrong, np.array(2.0)):
        with pytest.raises(UserError, match="blocks takes a whole number or names of units"):
            cut(blocks)


@pytest.mark.parametrize("task", [nn.CrossEntropyLoss(), F.cross_entropy, lg.Classification, 10])
def test_a_task_is_no_loss_function(task: Any) -> None:
    with pytest.raises(UserError, match=r"task takes an object with the methods of lg.Classification\(classes\)"):
        lg.localize(resnet(), method=lg.dgl(), example=X, task=task)


def test_nothing_is_made_in_inference_mode() -> None:
    with torch.inference_mode(), pytest.raises(UserError, match="cannot be trained: make the network and localize it"):
        lg.localize(resnet(), method=lg.dgl(), example=X)
    with torch.inference_mode():
        network = resnet()
    with pytest.raises(UserError, match="cannot be trained"):
        lg.localize(network, method=lg.dgl(), example=X)


def test_a_model_that_is_made_without_gradients_learns_unless_a_block_is_frozen() -> None:
    with torch.no_grad():
        model = local(lg.MAN())
    model.blocks[1].requires_grad_(False)
    model.auxiliaries[1].requires_grad_(False)
    lg.local_backward(model, X, Y)
    assert all(p.grad is not None for k in (0, 2, 3) for p in model.members(k))
    assert not model.members(1)


# What a step is given


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": X.numpy()}, "x takes a tensor, not an array of numpy"),
        ({"x": (X, Y)}, "x is a tuple of x0, x1, and this model was localized for a tensor"),
        ({"x": (99 * X).to(torch.uint8)}, r"x is torch.uint8, and this network takes torch.float32.*x.float\(\) / 255"),
        ({"x": X.long()}, "x is torch.int64, and this network takes torch.float32"),
        ({"x": X.double()}, r"x is torch.float64, and this network takes torch.float32: x.to\(torch.float32\)"),
        ({"x": X.to("meta"), "y": Y.to("meta")}, r"x is on meta and the model on cpu: x.to\('cpu'\)"),
        ({"y": Y.to("meta")}, r"x is on cpu and y on meta: y.to\(x.device\)"),
        ({"x": X[:0], "y": Y[:0]}, "an empty batch has no loss"),
        ({"y": Y.numpy()}, "targets must be a tensor of one int64 class a sample, not a ndarray"),
        ({"y": Y.tolist()}, "targets must be a tensor of one int64 class a sample, not a list"),
        ({"autocast": True}, "autocast takes a dtype, such as torch.bfloat16, or None, not True"),
        ({"autocast": torch.int8}, "not torch.int8"),
        ({"backward": 2.0}, "backward takes a function of a loss.* not 2.0"),
        ({"scale": "2"}, "scale takes a number or a tensor of one"),
        ({"scale": True}, "not a bool"),
        ({"scale": float("nan")}, "not nan"),
        ({"scale": torch.ones(4)}, "not a Tensor"),
        ({"scale": torch.amp.GradScaler("cpu")}, r"such as scaler.scale\(torch.ones\(\(\)\)\), not a GradScaler"),
    ],
)
def test_a_step_of_the_wrong_kind_is_refused_before_anything_moves(change: dict[str, Any], message: str) -> None:
    model = local(lg.MAN(0.0))
    given: dict[str, Any] = {"x": X, "y": Y} | change
    kept, drawn = state(model), torch.get_rng_state()
    for _ in range(2):
        with pytest.raises(UserError, match=message):
            lg.local_backward(model, **given)
    assert_same(model.state_dict(), kept)
    assert not gradients(model)
    assert torch.equal(torch.get_rng_state(), drawn)


def test_images_are_those_of_the_inputs() -> None:
    model = lg.localize(resnet(), method=lg.infopro(), example=X)
    wrong: list[Any] = [X.numpy(), X[:2], X[:, :1], [X]]
    for images in wrong:
        with pytest.raises(UserError, match="images"):
            lg.local_backward(model, X, Y, images=images)
    assert not gradients(model)


def test_every_number_is_a_scale() -> None:
    model = local()
    found = []
    for scale in (2, 2.0, np.float32(2), np.float64(2), torch.tensor(2.0), torch.tensor([2.0])):
        lg.local_backward(model, X, Y, scale=scale)  # pyright: ignore[reportArgumentType]
        found.append(gradients(model))
        model.zero_grad()
    for other in found[1:]:
        assert_same(found[0], other)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.set_grad_enabled(False)])
def test_a_step_needs_gradients(mode: Callable[[], Any]) -> None:
    model = local()
    with mode(), pytest.raises(UserError, match="gradients are switched off"):
        lg.local_backward(model, X, Y)
    with torch.inference_mode():
        made = X + 1
    with pytest.raises(UserError, match=r"x was made under torch.inference_mode\(\): train on x.clone\(\)"):
        lg.local_backward(model, made, Y)
    lg.local_backward(model, made.clone(), Y)


@pytest.mark.parametrize("step", [lg.local_backward, lg.as_loss])
def test_what_is_compared_with_requires_no_gradient(step: Callable[..., Any]) -> None:
    teacher = nn.Linear(10, 10)
    soft = teacher(torch.ones(len(X), 10)).softmax(1)
    with pytest.raises(UserError, match=r"y requires a gradient.*: y.detach\(\)"):
        step(local(), X, soft)
    step(local(), X, soft.detach())
    model = lg.localize(resnet(), blocks=3, method=lg.infopro(), example=X)
    with pytest.raises(UserError, match=r"images require a gradient.*: images.detach\(\)"):
        step(model, X, Y, images=torch.rand_like(X).requires_grad_())


def test_a_network_that_converts_its_input_gets_it_as_it_is() -> None:
    class Bytes(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.float() / 255)

    network = Bytes()
    x = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    for example in (x, X):
        model = lg.localize(copy.deepcopy(network), blocks=2, method=lg.dgl("0c1f"), example=example)
        plain = lg.localize(copy.deepcopy(network), blocks=1, method=lg.bp(), example=example)
        for _ in range(2):
            assert torch.equal(lg.local_backward(model, x, Y).logits, lg.local_backward(plain, x.double(), Y).logits)


def test_a_network_of_whole_numbers_is_told_where_it_gets_others() -> None:
    network = nn.Sequential(nn.Embedding(20, 6), nn.Flatten(), nn.Linear(48, 6), nn.ReLU(), nn.Linear(6, 10))
    tokens = torch.randint(20, (4, 8))
    model = lg.localize(network, blocks=2, method=lg.dgl("0c1f"), example=tokens)
    lg.local_backward(model, tokens, Y)
    lg.local_backward(model, tokens.int(), Y)
    with pytest.raises(UserError, match=r"x is torch.float32, and this network takes torch.int64"):
        lg.local_backward(model, tokens.float(), Y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_of_another_dtype_takes_it(dtype: torch.dtype) -> None:
    model = local(lg.MAN()).to(dtype)
    lg.local_backward(model, X.to(dtype), Y)
    with pytest.raises(UserError, match=f"x is torch.float32, and this network takes {dtype}"):
        lg.local_backward(model, X, Y)
    lg.local_backward(local(), X.bfloat16(), Y, autocast=torch.bfloat16)


def test_what_a_hook_sees_is_a_step_and_no_try() -> None:
    seen: list[Any] = []
    model = local()
    of_one = lg.localize(model.backbone, blocks=2, method=lg.dgl("0c1f"), example=X)
    for module in (m for m in model.backbone.modules() if not list(m.children())):  # those of containers are not called
        module.register_forward_hook(lambda m, args, out: seen.append(out))
    with pytest.raises(UserError):
        lg.local_backward(model, X.double(), Y)
    lg.local_backward(of_one, X[:1], Y[:1])
    assert all(tensor.device.type == "cpu" for tensor in seen)
    seen.clear()
    lg.local_backward(model, X.bfloat16(), Y, autocast=torch.bfloat16)
    calls = len(seen)
    seen.clear()
    lg.local_backward(model, X.bfloat16(), Y, autocast=torch.bfloat16)
    assert len(seen) == calls > 20


def test_where_everything_is_frozen_nothing_can_be_trained() -> None:
    for blocks, method in ((1, lg.bp()), (3, lg.dgl("0c1f"))):
        model = lg.localize(resnet(), blocks=blocks, method=method, example=X).requires_grad_(False)
        with pytest.raises(UserError, match="every parameter is frozen, so nothing can be trained"):
            lg.local_backward(model, X, Y)
        x = X.clone().requires_grad_()
        lg.local_backward(model, x, Y)  # as for an image that shall fool the network
        assert x.grad is not None


# What only a LocalModel can do


def everything(model: Any) -> dict[str, Callable[[], object]]:
    return {
        "local_backward": lambda: lg.local_backward(model, X, Y),
        "param_groups": lambda: lg.param_groups(model),
        "recompute": lambda: lg.recompute(model),
        "predict_peak": lambda: lg.predict_peak(model, 4, lambda m: []),
        "block_seconds": lambda: lg.block_seconds(model, X, Y),
        "Replicas": lambda: lg.Replicas(model),
        "Stage": lambda: lg.Stage(model, (1,)),
    }


@pytest.mark.parametrize("name", everything(None))
def test_another_model_is_named_with_what_to_do(name: str) -> None:
    wrapped = {
        "lg.localize.* makes one of a network": resnet(),
        "averages nothing of K separate backward passes.*lg.Replicas": nn.DataParallel(local()),
        "not a Sequential: give it the one within": nn.Sequential(local()),
        "gives, not a NoneType$": None,
        "gives, not the class LocalModel$": lg.LocalModel,
    }
    for message, model in wrapped.items():
        with pytest.raises(UserError, match=f"{name} takes the LocalModel that lg.localize gives, not .*"):
            everything(model)[name]()
        with pytest.raises(UserError, match=message):
            everything(model)[name]()


def test_a_compiled_model_is_the_model() -> None:
    model = local()
    twin = copy.deepcopy(model)
    lg.local_backward(cast(lg.LocalModel, torch.compile(model, backend="eager")), X, Y)
    lg.local_backward(twin, X, Y)
    assert_same(gradients(model), gradients(twin))


# A batch of one sample


def vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=8, patch_size=4, depth=4, num_classes=10)


def to_one_pixel() -> nn.Module:
    """Its last units have batch norms on maps of one pixel."""

    def unit(stride: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 3, 3, stride, padding=1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))

    units = nn.Sequential(*[unit(s) for s in (1, 2, 2, 2, 1)])
    return nn.Sequential(units, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10))


REFUSED = {
    "the head 'classifier' of the auxiliary of block 0 .behind 'blocks.0'.*lg.dgl": (vit, lg.dgl(), None),
    "the head 'classifier' of the auxiliary of block 0 .behind 'layer2.0'.*lg.dgl": (resnet, lg.dgl(), lg.MAN()),
    "the coupling of the auxiliary of block 0": (to_one_pixel, lg.dgl("0c1f"), lg.DeepMAN(depth=3)),
    "block 1 .up to '0.4'": (to_one_pixel, lg.predsim(), None),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_batch_of_one_is_refused_where_it_cannot_be_trained(message: str) -> None:
    make, method, coupling = REFUSED[message]
    model = lg.localize(make(), blocks=2, method=method, coupling=coupling, example=X)
    lg.local_backward(model, X, Y)
    model.zero_grad()
    kept, drawn = state(model), torch.get_rng_state()
    for _ in range(2):
        with pytest.raises(UserError, match=f"a batch of one sample cannot train {message}.*"):
            lg.local_backward(model, X[:1], Y[:1])
        with pytest.raises(UserError, match="drop_last=True"):
            lg.predict_peak(model, 1, lambda m: [sgd(lg.param_groups(m))])
    assert_same(model.state_dict(), kept)
    assert not gradients(model)
    assert torch.equal(torch.get_rng_state(), drawn)
    model.eval()  # in which a batch norm asks for no other value
    lg.local_backward(model, X[:1], Y[:1])
    model.train()
    with pytest.raises(UserError, match=message):
        lg.local_backward(model, X[:1], Y[:1])


@pytest.mark.parametrize("coupling", ALL_COUPLINGS, ids=str)
def test_a_batch_of_one_is_trained_where_it_can_be(coupling: lg.MAN | None) -> None:
    for make in (vit, resnet):
        model = lg.localize(make(), blocks=2, method=lg.dgl("0c1f"), coupling=coupling, example=X)
        twin = copy.deepcopy(model)
        drawn = torch.get_rng_state()
        out = lg.local_backward(lg.recompute(model, couplings=True), X[:1], Y[:1])
        torch.set_rng_state(drawn)
        twin.checks = model.checks  # so that nothing is tried
        assert torch.equal(out.logits, lg.local_backward(twin, X[:1], Y[:1]).logits)
        assert_same(gradients(model), gradients(twin))


@pytest.mark.slow
def test_plans_for_one_image_say_what_they_cannot_train() -> None:
    with pytest.raises(UserError, match="a batch of one sample cannot train the head 'classifier'"):
        lg.plan(vit(), X[:1], 2**40, method=lg.dgl(), coupling=lg.MAN())
    with pytest.raises(UserError, match=r"a batch of one sample cannot train block \d"):
        lg.Planner(to_one_pixel(), X[:1], method=lg.bp())
    assert lg.plan(vit(), X[:1], 2**40, method=lg.dgl("0c1f"), coupling=lg.MAN()).blocks


# An optimizer that knows nothing of the auxiliaries


def steps(model: lg.LocalModel, optimizer: torch.optim.Optimizer, clear: Callable[[], object], count: int) -> int:
    """How many steps were taken until the warning came."""
    for n in range(count):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            lg.local_backward(model, X, Y)
        if said:
            assert [w.filename for w in said] == [__file__]
            assert "the optimizer steps block 0 but not its auxiliary" in str(said[0].message)
            assert "make the optimizer after localize, of lg.param_groups(model)" in str(said[0].message)
            return n
        optimizer.step()
        clear()
    return count


@pytest.mark.parametrize("coupling", ALL_COUPLINGS, ids=str)
def test_an_optimizer_made_before_localize_is_told_at_its_second_step_and_once(coupling: lg.MAN | None) -> None:
    network = resnet()
    optimizer = sgd(network.parameters())
    model = local(coupling, backbone=network)
    assert steps(model, optimizer, optimizer.zero_grad, 4) == 1
    assert steps(model, optimizer, optimizer.zero_grad, 4) == 4  # it was said


@pytest.mark.parametrize("to_none", [True, False])
def test_it_is_told_a_little_later_where_all_gradients_are_cleared(to_none: bool) -> None:
    network = resnet()
    optimizer = sgd(network.parameters())
    model = local(lg.MAN(), backbone=network)
    assert steps(model, optimizer, lambda: model.zero_grad(set_to_none=to_none), 6) == 3


def test_it_is_told_where_blocks_step_as_they_go() -> None:
    model = local()
    own = [sgd(block.parameters()) for block in model.blocks]
    for done in lg.block_steps(model, X, Y):
        own[done.block].step()
        own[done.block].zero_grad()
    with pytest.warns(UserWarning, match="block 0 but not its auxiliary"):
        lg.block_steps(model, X, Y)


@pytest.mark.parametrize("coupling", ALL_COUPLINGS, ids=str)
def test_who_trains_the_auxiliaries_is_told_nothing(coupling: lg.MAN | None) -> None:
    """Warnings are errors here."""
    model = local(coupling)
    optimizer = torch.optim.AdamW(lg.param_groups(model), lr=1e-3)
    start = state(model.backbone)
    for n in range(8):
        for _ in range(2):  # accumulated
            assert len(list(lg.block_steps(model, X, Y, scale=0.5))) == len(model.blocks)
        model.move_averages()
        if n == 3:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=n % 2 == 0)
        if n % 3 == 2:
            model.backbone.load_state_dict(start)
        if n == 4:
            model.load_state_dict(state(model))


def test_who_only_looks_at_gradients_is_told_nothing() -> None:
    model = local()
    others = [state(resnet()) for _ in range(2)]
    for weights in others:
        model.backbone.load_state_dict(weights)
        lg.local_backward(model, X, Y)
        model.zero_grad()
    lg.local_backward(model, X, Y)
    model.backbone.load_state_dict(others[0])
    lg.local_backward(model, X, Y)  # nothing was cleared


@pytest.mark.parametrize("from_now_on", [False, True])
def test_frozen_auxiliaries_are_told_nothing(from_now_on: bool) -> None:
    model = local()
    optimizer = sgd(model.parameters())
    if from_now_on:
        lg.local_backward(model, X, Y)
    model.auxiliaries.requires_grad_(False)
    optimizer.step()
    optimizer.zero_grad()
    assert steps(model, optimizer, optimizer.zero_grad, 5) == 5


def test_a_copy_begins_anew() -> None:
    model = local()
    optimizer = sgd(lg.param_groups(model))
    for _ in range(2):
        lg.local_backward(model, X, Y)
        optimizer.step()
        optimizer.zero_grad()
        model = copy.deepcopy(model)
        optimizer = sgd(lg.param_groups(model))


# Weights that are loaded after localize


LOADED = "the auxiliary of block 0 has copied other weights than the network has now: .* call model.refresh()"
COPYING = [lg.MAN(), lg.MAN(form="pull"), lg.DeepMAN(lag=2), lg.MAN(learnable=False)]


@pytest.mark.parametrize("coupling", COPYING, ids=str)
def test_weights_loaded_after_localize_are_told_of_once(coupling: lg.MAN) -> None:
    model = local(coupling)
    model.backbone.load_state_dict(state(resnet()))
    with pytest.warns(UserWarning, match=LOADED) as seen:
        lg.local_backward(model, X, Y)
    lg.local_backward(model, X, Y)
    assert len(seen) == 1
    assert seen[0].filename == __file__


@pytest.mark.parametrize("as_you_go", [False, True])
def test_weights_loaded_between_two_steps_are_told_of(as_you_go: bool) -> None:
    model = local(lg.MAN())
    own = optimizers_for(lg.param_groups(model), sgd, as_you_go=as_you_go)
    for _ in range(3):
        training_step(model, own, X, Y, step_as_you_go=as_you_go)
    model.backbone.load_state_dict(state(resnet()))
    with pytest.warns(UserWarning, match=LOADED):
        training_step(model, own, X, Y, step_as_you_go=as_you_go)


@pytest.mark.parametrize("coupling", COPYING, ids=str)
def test_where_copies_fit_nothing_is_told(coupling: lg.MAN) -> None:
    trained = local(coupling)
    optimizer = torch.optim.AdamW(lg.param_groups(trained), lr=0.01)
    for _ in range(3):
        lg.local_backward(trained, X, Y)
        optimizer.step()
    for load in (
        lambda model: model.load_state_dict(trained.state_dict()),  # averages and all
        lambda model: model.backbone.load_state_dict(state(model.backbone)),  # the same weights once more
        lambda model: (model.backbone.load_state_dict(trained.backbone.state_dict()), model.refresh()),
    ):
        model = local(coupling)
        load(model)
        lg.local_backward(model, X, Y)
        lg.local_backward(copy.deepcopy(model), X, Y)


def test_other_values_of_frozen_weights_are_told_of_however_near_they_are() -> None:
    network = resnet().requires_grad_(False)
    for stage in (network.layer1, network.layer2, network.layer3):  # pyright: ignore[reportAttributeAccessIssue]
        for part in stage:  # pyright: ignore[reportGeneralTypeIssues]
            part.bn2.requires_grad_(True)
    model = local(lg.MAN(), backbone=network)
    with torch.no_grad():
        model.blocks[1][0].conv1.weight[0] += 1e-3  # pyright: ignore[reportAttributeAccessIssue, reportIndexIssue]
    with pytest.warns(UserWarning, match=LOADED):
        lg.local_backward(model, X, Y)
