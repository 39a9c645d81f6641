"""Replays recorded training steps of a published implementation, in float64, through the public API.

Every pair of files in the folder that LOCALGRAD_GOLDEN names (default: tests/golden) is one test.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import localgrad as lg
from localgrad.core.auxiliary import Auxiliary

FOLDER = Path(os.environ.get("LOCALGRAD_GOLDEN") or Path(__file__).parent / "golden")
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))


def test_the_folder_holds_golden_files() -> None:
    assert NAMES


def close(got: float, recorded: float) -> bool:
    return abs(got - recorded) <= 1e-9 * abs(recorded) + 1e-12


def method_of(record: dict, tensors: dict[str, Tensor]) -> lg.Method:
    if record["method"].startswith("dgl"):
        hidden = tensors["aux.0.classifier.11.weight"].shape[0]
        return lg.dgl(channels=record["feature_dim"], hidden=hidden)
    weights = list(zip(record["reconstruction_weight"], record["classification_weight"], strict=True))
    contrast = record["classification_objective"] == "supervised_contrastive"
    return lg.infopro(
        contrast=contrast, temperature=record["temperature"], features=record["feature_dim"], weights=weights
    )


def golden_parameters(model: lg.LocalModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our parameters under the golden names. Layers of a head correspond by their order."""
    found: dict[str, Tensor] = {f"backbone.{name}": p for name, p in model.backbone.named_parameters()}
    for k, auxiliary in enumerate(model.auxiliaries):
        assert isinstance(auxiliary, Auxiliary)
        if auxiliary.coupling is not None:  # "links.0.learnable.conv1.weight", "links.0.scale"
            own = auxiliary.coupling.named_parameters()
            found |= {f"aux.{k}.{name.removeprefix('links.0.')}": p for name, p in own}
        for head, module in auxiliary.heads.items():
            prefix = f"aux.{k}.{head}."
            places = sorted(
                {int(name.removeprefix(prefix).split(".")[0]) for name in tensors if name.startswith(prefix)}
            )
            layers = [m for m in module.modules() if not list(m.children()) and list(m.parameters())]
            for place, layer in zip(places, layers, strict=True):
                found |= {f"{prefix}{place}.{name}": p for name, p in layer.named_parameters()}
    return found


# The recorded averages started from weights of their own.
@pytest.mark.filterwarnings("ignore:the auxiliary of block 0 has copied other weights:UserWarning")
@pytest.mark.parametrize("name", NAMES)
def test_replays(name: str) -> None:
    record = json.loads((FOLDER / f"{name}.json").read_text())
    tensors = load_file(FOLDER / f"{name}.safetensors")
    images = tensors["pixels"].double() / 255
    mean, std = (torch.tensor(record[f"normalize_{s}"], dtype=torch.float64).view(-1, 1, 1) for s in ("mean", "std"))
    inputs, targets = (images - mean) / std, tensors["targets"]

    classes = tensors["backbone.fc.weight"].shape[0]
    couplings = {"man": lg.MAN, "manpp": lg.MANPlusPlus}
    coupling = couplings.get(record["method"].partition("_")[2])
    backbone = lg.build(record["arch"], classes=classes).double()
    model = lg.localize(
        backbone,
        blocks=record["blocks_end_at"],
        method=method_of(record, tensors),
        coupling=coupling and coupling(momentum=record["momentum"], buffers=record["ema_buffers"]),
        example=inputs[0],
    )
    assert len(model.blocks) == len(record["blocks_end_at"])
    parameters = golden_parameters(model, tensors)
    recorded = {n for n in tensors if n.startswith(("backbone.", "aux."))}
    assert parameters.keys() == recorded
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(tensors[key])

    settings = {k: v for k, v in record["optimizer"].items() if k not in ("name", "weight_decay")}
    optimizer = torch.optim.SGD(lg.param_groups(model, weight_decay=record["optimizer"]["weight_decay"]), **settings)
    for step, want in enumerate(record["steps"]):
        out = lg.local_backward(model, inputs[step], targets[step], images=images[step])
        for head, key in (("classifier", "classification_loss"), ("decoder", "reconstruction_loss")):
            got = [float(part[head]) for part in out.parts if head in part]
            assert len(got) == len(want[key])
            assert all(map(close, got, want[key])), (step, key)
        assert close(float(out.losses[-1]), want["final_loss"])
        check_logits(out.logits, want["logits"])
        gradients = {key: p.grad for key, p in parameters.items() if p.grad is not None}
        assert gradients.keys() == want["grad_norm"].keys()
        for key, norm in want["grad_norm"].items():
            got = float(gradients[key].norm())
            assert close(got, norm) if norm >= 1e-8 else got < 1e-8, (step, key, got, norm)
        optimizer.step()
        optimizer.zero_grad()
        for key, norm in want["param_norm_after"].items():
            got = float(parameters[key].detach().norm())
            assert close(got, norm), (step, key, got, norm)

    model.eval()
    with torch.no_grad():
        logits = model(inputs[0])
    check_logits(logits, record["eval"]["logits"])
    assert close(float(nn.functional.cross_entropy(logits, targets[0])), record["eval"]["loss"])


def check_logits(got: Tensor, want: list[list[float]]) -> None:
    expected = torch.tensor(want, dtype=torch.float64)
    assert bool(((got - expected).abs() <= 1e-9 * expected.abs() + 1e-9).all())
