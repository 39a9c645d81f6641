"""Weights from elsewhere: what programs save is read without running any of it, fits under its wrappers' prefixes, and
may have another classifier; what does not fit is refused with a sentence and changes nothing."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import json
import os
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from localgrad.core.backbones import build
from localgrad.core.errors import RunError, UserError
from localgrad.run.build import build_model, machine_for
from localgrad.run.checkpoint import load_backbone
from localgrad.run.data import DATASETS, Data, Images
from localgrad.run.recipe import Recipe
from localgrad.run.weights import read_weights

State = dict[str, Tensor]


def network(classes: int = 10, channels: int = 1, name: str = "resnet8") -> nn.Module:
    return build(name, classes=classes, in_channels=channels)


def loads(path: Path, state: State, classes: int = 10) -> list[str]:
    """Loads the file into a network, which must then hold `state`. What was said."""
    target = network(classes)
    said = load_backbone(target, path, resized=lambda: network(classes + 1))
    found = target.state_dict()
    assert all(torch.equal(found[name], tensor.to(found[name].dtype)) for name, tensor in state.items())
    return said


def refused(path: Path, classes: int = 10) -> str:
    """The sentence with which the file is refused; the network stays as it was."""
    target = network(classes)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    with pytest.raises(UserError) as caught:
        load_backbone(target, path, resized=lambda: network(classes + 1))
    assert all(torch.equal(before[name], tensor) for name, tensor in target.state_dict().items())
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def state() -> State:
    return network().state_dict()


# Prefixes


PREFIXES = "module. _orig_mod. backbone. model. module._orig_mod. _orig_mod.module. model.module.backbone."


@pytest.mark.parametrize("prefix", ["", *PREFIXES.split()])
def test_prefixes_of_wrappers_are_left_away(prefix: str, state: State, tmp_path: Path) -> None:
    torch.save({prefix + name: tensor for name, tensor in state.items()}, tmp_path / "w.pth")
    assert loads(tmp_path / "w.pth", state) == []


def test_a_part_that_was_compiled_fits(state: State, tmp_path: Path) -> None:
    wrapped = {f"module.{name}".replace("layer2.", "layer2._orig_mod."): tensor for name, tensor in state.items()}
    torch.save(wrapped, tmp_path / "w.pth")
    assert loads(tmp_path / "w.pth", state) == []


def test_a_prefix_that_is_the_networks_own_stays(tmp_path: Path) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.fc = nn.Linear(3, 3), nn.Linear(3, 2)

    source, target = Own(), Own()
    torch.save({f"module.{name}": tensor for name, tensor in source.state_dict().items()}, tmp_path / "w.pth")
    assert load_backbone(target, tmp_path / "w.pth") == []
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))


def test_what_lies_beside_the_backbone_is_left_out_and_named(state: State, tmp_path: Path) -> None:
    lightning = {f"model.{name}": tensor for name, tensor in state.items()} | {"loss.weight": torch.ones(10)}
    torch.save({"state_dict": lightning, "hyper_parameters": {"lr": 0.1}, "epoch": 3}, tmp_path / "w.ckpt")
    said = loads(tmp_path / "w.ckpt", state)
    assert said == [f"left out of {tmp_path / 'w.ckpt'}: 1 tensor beside the backbone's, 'loss.weight' first"]


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_larger_network_under_a_prefix_is_no_fit(prefix: str, tmp_path: Path) -> None:
    torch.save({prefix + n: t for n, t in network(name="resnet14").state_dict().items()}, tmp_path / "w.pth")
    says = "36 tensors differ, 'layer1.1.conv1.weight' first, which this network does not have"
    assert refused(tmp_path / "w.pth").endswith(says)


# Another classifier


@pytest.mark.parametrize("prefix", ["", "module._orig_mod."])
@pytest.mark.parametrize("classes", [2, 1000])
def test_another_number_of_classes_keeps_the_networks_own_head(classes: int, prefix: str, tmp_path: Path) -> None:
    other = network(classes).state_dict()
    torch.save({prefix + name: tensor for name, tensor in other.items()}, tmp_path / "w.pth")
    rest = {name: tensor for name, tensor in other.items() if not name.startswith("fc.")}
    (said,) = loads(tmp_path / "w.pth", rest)
    assert f"is left out (fc.weight {classes}x64, fc.bias {classes})" in said
    assert said.endswith("the network has a new one for its own classes (fc.weight 10x64, fc.bias 10)")


@pytest.mark.parametrize(
    "name", ["torchvision:squeezenet1_1", "torchvision:mobilenet_v2", "timm:deit_tiny_distilled_patch16_224"]
)
def test_classifiers_of_other_shapes_and_names(name: str, tmp_path: Path) -> None:
    source, target = (build(name, classes=classes) for classes in (7, 3))
    torch.save(source.state_dict(), tmp_path / "w.pth")
    before = {n: t.clone() for n, t in target.state_dict().items()}
    (said,) = load_backbone(target, tmp_path / "w.pth", resized=lambda: build(name, classes=4))
    new = [n for n, t in target.state_dict().items() if t.shape != source.state_dict()[n].shape]
    assert new
    assert all(f"{n} " in said for n in new)
    for n, tensor in target.state_dict().items():
        assert torch.equal(tensor, before[n] if n in new else source.state_dict()[n])


def test_a_file_without_a_classifier_is_loaded(state: State, tmp_path: Path) -> None:
    rest = {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}
    torch.save(rest, tmp_path / "w.pth")
    (said,) = loads(tmp_path / "w.pth", rest)
    assert "holds no classifier: the network has a new one" in said


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: network(7, channels=3).state_dict(), "'conv1.weight' first, which is 16x1x3x3 here and 16x3x3x3"),
        (lambda s: {**s, "fc.weight": torch.ones(7, 32)}, "'fc.weight' first, which is 10x64 here and 7x32 in the"),
        (lambda s: {**s, "fc.weight": torch.ones(7, 64, 1)}, "'fc.weight' first, which is 10x64 here and 7x64x1"),
        (lambda s: {n: t for n, t in s.items() if n != "fc.bias"}, "1 tensor differs, 'fc.bias' first, which the file"),
        (lambda s: {f"encoder.{n}": t for n, t in s.items()}, "lacks (its first is 'encoder.conv1.weight')"),
        (lambda s: {**s, "fc2.weight": torch.ones(3)}, "'fc2.weight' first, which this network does not have"),
    ],
)  # fmt: skip
def test_what_else_differs_stays_an_error(
    change: Callable[[State], State], says: str, state: State, tmp_path: Path
) -> None:
    torch.save(change(state), tmp_path / "w.pth")
    assert says in refused(tmp_path / "w.pth")


def test_three_classes_are_not_three_channels(tmp_path: Path) -> None:
    """A size that happens to be the number of classes makes no classifier."""
    torch.save(network(5, channels=1).state_dict(), tmp_path / "w.pth")
    target = network(3, channels=3)
    with pytest.raises(UserError, match=r"1 tensor differs, 'conv1.weight' first, which is 16x3x3x3 here"):
        load_backbone(target, tmp_path / "w.pth", resized=lambda: network(4, channels=3))


def test_evaluation_takes_no_other_classifier(tmp_path: Path) -> None:
    torch.save(network(7).state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"2 tensors differ, 'fc.weight' first"):
        load_backbone(network(), tmp_path / "w.pth")


def test_seeds_do_not_depend_on_the_files_classes(tmp_path: Path) -> None:
    """Head and auxiliaries are drawn as without the file, and so is what a training step draws later."""
    info = DATASETS["digits"]
    nothing = Images(torch.zeros(0, 1, 8, 8, dtype=torch.uint8), torch.zeros(0).long())
    drawn, said = [], []
    for classes in (None, 10, 77):
        if classes:
            torch.save(network(classes).state_dict(), tmp_path / f"{classes}.pth")
        recipe = Recipe(model="resnet8", device="cpu", init=str(tmp_path / f"{classes}.pth") if classes else None)
        model = build_model(recipe, Data(info, nothing, nothing), machine_for(recipe), said.append)
        drawn.append([*(p for n, p in model.auxiliaries.named_parameters() if "classifier" in n), torch.rand(3)])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*drawn, strict=True))
    assert len(said) == 1


# Other tensors


def test_old_half_and_tied_weights(state: State, tmp_path: Path) -> None:
    halves = {n: t.half() if t.is_floating_point() else t for n, t in state.items()}
    torch.save({n: t for n, t in halves.items() if "num_batches" not in n}, tmp_path / "w.pth")
    assert loads(tmp_path / "w.pth", halves) == []

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
            self.b.weight = self.a.weight

    source, target = Tied(), Tied()
    save_file({n: t for n, t in source.state_dict().items() if n != "b.weight"}, tmp_path / "w.safetensors")
    assert load_backbone(target, tmp_path / "w.safetensors") == []
    assert torch.equal(target.b.weight, source.a.weight)
    assert target.b.weight is target.a.weight


def test_shards_are_read_by_their_index(state: State, tmp_path: Path) -> None:
    halves = {"a.safetensors": list(state)[:20], "b.bin": list(state)[20:]}
    save_file({n: state[n] for n in halves["a.safetensors"]}, tmp_path / "a.safetensors")
    torch.save({n: state[n] for n in halves["b.bin"]}, tmp_path / "b.bin")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {n: file for file, names in halves.items() for n in names}}))
    assert loads(index, state) == []
    (tmp_path / "b.bin").unlink()
    assert refused(index) == f"no checkpoint at {tmp_path / 'b.bin'}"
    for text in ("{}", "[]", "{", '{"weight_map": 3}', '{"weight_map": {"a": []}}'):
        index.write_text(text)
        assert "is no index of a sharded checkpoint" in refused(index)


@pytest.mark.parametrize("kind", ["quantized", "sparse"])
def test_tensors_that_cannot_be_copied(kind: str, state: State, tmp_path: Path) -> None:
    save_as: dict[str, Callable[[Tensor], Tensor]] = {
        "sparse": Tensor.to_sparse, "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    }  # fmt: skip
    with pytest.warns() if kind == "quantized" else contextlib.nullcontext():
        torch.save({**state, "fc.weight": save_as[kind](state["fc.weight"])}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="of a kind that cannot be copied"):
        load_backbone(network(), tmp_path / "w.pth")


# What else a file holds


class Settings(dict):
    """As EasyDict, CfgNode or Lightning's AttributeDict."""


class Slots:
    __slots__ = ("a",)


class Calls:
    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call


HELD = {
    "namespace": argparse.Namespace(lr=0.1, device=torch.device("cpu"), inner=argparse.Namespace(a={1, 2}, b=b"x")),
    "simple": types.SimpleNamespace(a=1, path=Path("x"), day=datetime.date(2020, 1, 2)),
    "dictionary": Settings(a=Path("x"), b=Settings(c=1)),
    "numpy": [np.float64(3), np.int64(2), np.ones(3)],
    "class": Settings,
    "function": os.path.join,
}  # fmt: skip


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "state_dict_ema"])
def test_what_lies_beside_the_tensors_is_left_out(
    key: str, held: str, zipped: bool, state: State, tmp_path: Path
) -> None:
    content = {"epoch": 3, "args": HELD[held], key: {f"module.{n}": t for n, t in state.items()}}
    torch.save(content, tmp_path / "w.pth.tar", _use_new_zipfile_serialization=zipped)
    assert loads(tmp_path / "w.pth.tar", state) == []


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("held", "named"),
    [
        (Calls(os.system, ("touch pwned",)), "posix.system"),
        (Calls(eval, ("open('pwned', 'w')",)), "eval"),
        (Calls(Path.write_text, (Path("pwned"), "x")), "getattr"),
        (functools.partial(str, "x"), "str"),
        (Slots(), "Slots"),
    ],
)
def test_what_would_be_called_is_refused_and_named(
    held: Any, named: str, zipped: bool, state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if isinstance(held, Slots):
        held.a = 1
    torch.save({"state_dict": state, "args": held}, "w.pth", _use_new_zipfile_serialization=zipped)
    said = refused(Path("w.pth"))
    assert said.startswith("w.pth holds other than tensors and plain values (")
    assert named in said
    assert os.listdir(tmp_path) == ["w.pth"]


@pytest.mark.parametrize(
    "content", [{}, {"state_dict": {}}, {0: torch.ones(2)}, torch.ones(2), {"model": 3}, {"optimizer": {"state": {}}}]
)
def test_files_without_a_state_dict(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pth")
    assert refused(tmp_path / "w.pth").endswith("holds no state_dict of tensors: save model.state_dict() alone")


@pytest.mark.parametrize("whole", [True, False])
def test_a_whole_network_is_named(whole: bool, tmp_path: Path) -> None:
    torch.save(network() if whole else {"model": network(), "epoch": 2}, tmp_path / "w.pth")
    said = refused(tmp_path / "w.pth")
    assert "holds no state_dict of tensors, but localgrad.core.backbones.CifarResNet" in said


def test_places_that_are_no_file(tmp_path: Path) -> None:
    assert refused(tmp_path).endswith("is a folder: name the file of weights in it, such as model.safetensors")
    assert "no checkpoint at" in refused(tmp_path / "none")


@pytest.mark.parametrize("share", [0, 0.3, 0.9])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_was_cut_off_is_damaged(zipped: bool, share: float, state: State, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"model": state, "args": HELD["namespace"]}, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(RunError, match="is damaged or no checkpoint"):
        read_weights(path)
