"""One network of each other library: its blocks are the network, all of it learns, and its memory is known before.

They are small networks of transformers, segmentation_models_pytorch, MONAI, diffusers and torchvision's detectors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from small import assert_same, sgd
from small_networks import of_transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import localgrad as lg
from localgrad.core.inputs import arguments
from localgrad.scale.memory import training_step

WORDS = 40
COUPLINGS = [
    pytest.param(None, marks=pytest.mark.slow, id="none"), pytest.param(lg.MAN(), marks=pytest.mark.slow, id="man"),
    pytest.param(lg.DeepMAN(), id="deep man"),
]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """library: what must be installed. batch: makes a batch and its targets. how: a criterion, or a task."""

    library: str
    make: Callable[[], nn.Module]
    batch: Callable[[], tuple[Any, Any]]
    how: dict[str, Any]


@dataclass(frozen=True)
class Level:
    """A task for a feature pyramid: the mean of all its features, or the number of a head, is a given number."""

    classes: int | None = None

    def criterion(self, output: Any, targets: Tensor) -> Tensor:
        values = torch.stack([t.flatten(1).mean(1) for t in tree_leaves(output)])
        return F.mse_loss(values.mean(0), targets)

    def metrics(self, output: Any, targets: Tensor) -> dict[str, Tensor]:
        return {"loss": self.criterion(output, targets) * len(targets)}

    def check_targets(self, targets: Any) -> None:
        assert targets.ndim == 1

    def output(self, features: int) -> nn.Module:
        return nn.Linear(features, 1)


def language_model(kind: str, **config: Any) -> nn.Module:
    sizes = {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 16}
    return of_transformers("AutoModelForCausalLM", kind, **sizes, **special, **config)


def texts() -> tuple[dict[str, Tensor], Tensor]:
    """Two texts of 12 tokens, the second of which is shorter, with the labels among the inputs."""
    ids = torch.randint(3, WORDS, (2, 12))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids}, ids


def next_words(output: Any, labels: Tensor) -> Tensor:
    return F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def unet_of_smp() -> nn.Module:
    import segmentation_models_pytorch as smp  # pyright: ignore[reportMissingImports]

    return smp.Unet("tu-resnet10t", encoder_depth=3, encoder_weights=None, classes=3, decoder_channels=(16, 8, 8))


def unet_of_monai() -> nn.Module:
    from monai.networks.nets.unet import UNet  # pyright: ignore[reportMissingImports]

    return UNet(3, in_channels=1, out_channels=2, channels=(4, 8, 16), strides=(2, 2), num_res_units=1)


def unet_of_diffusers() -> nn.Module:
    from diffusers import UNet2DModel  # pyright: ignore[reportMissingImports,reportPrivateImportUsage]

    return UNet2DModel(
        sample_size=16, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    )  # fmt: skip


def pyramid_of_torchvision() -> nn.Module:
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    return resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5)


def images(*size: int, classes: int) -> tuple[Tensor, Tensor]:
    return torch.randn(2, *size), torch.randint(classes, (2, *size[1:]))


PIXELS: dict[str, Any] = {"criterion": nn.CrossEntropyLoss()}
CASES = {
    "GPT-2": Case("transformers", partial(language_model, "gpt2"), texts, {"criterion": next_words}),
    "Llama": Case(
        "transformers",
        partial(language_model, "llama", num_key_value_heads=2, intermediate_size=48, tie_word_embeddings=True),
        texts,
        {"criterion": next_words},
    ),
    "U-Net of smp": Case("segmentation_models_pytorch", unet_of_smp, partial(images, 3, 64, 64, classes=3), PIXELS),
    "U-Net of MONAI": Case("monai", unet_of_monai, partial(images, 1, 16, 16, 16, classes=2), PIXELS),
    "U-Net of diffusers": Case(
        "diffusers",
        unet_of_diffusers,
        lambda: ((torch.randn(2, 3, 16, 16), torch.randint(1000, (2,))), torch.randn(2, 3, 16, 16)),
        {"criterion": lambda output, noise: F.mse_loss(output.sample, noise)},
    ),
    "feature pyramid": Case(
        "torchvision", pyramid_of_torchvision, lambda: (torch.randn(2, 3, 64, 64), torch.rand(2)), {"task": Level()}
    ),
}


def tensors(output: Any) -> list[Tensor]:
    """What a network returns. Language models return their caches beside the logits."""
    return [output.logits] if hasattr(output, "logits") else tree_leaves(output)


def optimizers(model: lg.LocalModel) -> list[torch.optim.Optimizer]:
    return [sgd(lg.param_groups(model))]


def trained_by_bp(network: nn.Module, case: Case, x: Any, y: Any) -> set[str]:
    """The parameters that get a gradient."""
    args, kwargs = arguments(x)
    loss = case.how["criterion"] if "criterion" in case.how else case.how["task"].criterion
    loss(network.train()(*args, **kwargs), y).backward()
    return {name for name, p in network.named_parameters() if p.grad is not None}


def assert_blocks_are_the_network(model: lg.LocalModel, network: nn.Module, x: Any) -> None:
    args, kwargs = arguments(x)
    for training in (False, True):
        h: Any = model.train(training).inputs.crossing(x)
        torch.manual_seed(1)
        for block in model.blocks:
            h = block(h)
        torch.manual_seed(1)
        own, its = tensors(h), tensors(network.train(training)(*args, **kwargs))
        assert len(own) == len(its)
        assert all(map(torch.equal, own, its))
    assert_same(model.backbone.state_dict(), network.state_dict())


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Case:
    found = CASES[request.param]
    pytest.importorskip(found.library, reason=f"{found.library} is missing: pip install 'localgrad[families]'")
    torch.manual_seed(0)
    return found


@pytest.mark.filterwarnings("ignore")  # The libraries themselves warn.
@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("case", CASES, indirect=True)
def test_a_network_of_another_library_is_trained_in_blocks(case: Case, coupling: lg.MAN | None) -> None:
    network, (x, y) = case.make(), case.batch()
    same, fresh = copy.deepcopy(network), copy.deepcopy(network)
    expected = trained_by_bp(copy.deepcopy(network), case, x, y)
    model = lg.localize(network, blocks=3, method=lg.dgl("0c1f"), coupling=coupling, example=x, **case.how)
    assert_blocks_are_the_network(model, same, x)
    model.train()
    made = optimizers(model)
    lg.local_backward(model, x, y)
    assert {name for name, p in network.named_parameters() if p.grad is not None} == expected
    made[0].step()
    made[0].zero_grad()
    fresh.load_state_dict(network.state_dict(), strict=True)
    measured = lg.measure_peak(lambda: training_step(model, made, x, y), model=model, optimizers=made)
    assert lg.predict_peak(model, 2, optimizers, targets=y).total == pytest.approx(measured.total, rel=0.01)


def test_a_unit_that_returns_several_tensors_is_not_copied() -> None:
    x = torch.randn(2, 3, 64, 64)
    how: dict[str, Any] = {"method": lg.dgl("0c1f"), "coupling": lg.MAN(), "example": x, "task": Level()}
    text = "a coupling has no effect before 'fpn', which returns several tensors or a dictionary"
    with pytest.warns(UserWarning, match=text):
        model = lg.localize(pyramid_of_torchvision(), blocks=[*lg.units(pyramid_of_torchvision(), x)[-3:-1]], **how)
    assert [auxiliary.coupling is not None for _, auxiliary in model.isolated] == [True, False]
    lg.local_backward(model, x, torch.rand(2))
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
