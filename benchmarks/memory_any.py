"""Peak memory and time of a step of a U-Net, a 3D U-Net and a language model: exactly and in blocks.

    pip install -e '.[families]'
    python benchmarks/memory_any.py [--rounds 0]

The networks have random weights: Unet with ResNet-34 of segmentation_models_pytorch (8 images of 256x256, 3 classes),
MONAI's UNet (one volume of 96x96x96, 2 classes) and GPT-2 small of transformers (8 texts of 256 tokens, a vocabulary of
50,257). They are trained in float32 with SGD and momentum by

- BP: backpropagation.
- exact: the fastest plan of backpropagation that takes half of BP's bytes, or where there is none, that of the fewest.
- DGL, 2 and 4 blocks: local losses with DGL's own heads, cut where the step takes the fewest bytes.

Everything that is live counts: parameters, optimizer state, gradients, activations. Writes results/memory_any.csv, one
row for each network and way, and results/memory_any_times.csv, with the time of a step: the ways of a network take
turns. Both keep the rows that they have, and the same command continues. `--rounds 0` leaves the times out.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from common import Table, medians_in_turn, seconds_of
from torch import Tensor, nn
from torch.nn import functional as F

import localgrad as lg
from localgrad.core.sizes import mib
from localgrad.run.folder import environment

KEY = ("network", "way")
SGD = partial(torch.optim.SGD, lr=0.01, momentum=0.9, nesterov=True)


@dataclass(frozen=True)
class Settings:
    """Measure what is missing. The tiny size tries the script out and writes where `out` says."""

    networks: tuple[str, ...] = ("Unet", "UNet 3D", "GPT-2")
    rounds: int = 5
    tiny: bool = False
    out: Path = Path("results/memory_any.csv")


@dataclass(frozen=True)
class Case:
    """A network with a batch, its targets and its criterion."""

    network: nn.Module
    x: Tensor
    y: Tensor
    criterion: Callable[[Any, Tensor], Tensor]


def unet(*, tiny: bool) -> Case:
    import segmentation_models_pytorch as smp

    size, batch = (64, 2) if tiny else (256, 8)
    network = smp.Unet("resnet34", encoder_weights=None, classes=3)
    return Case(
        network, torch.randn(batch, 3, size, size), torch.randint(3, (batch, size, size)), nn.CrossEntropyLoss()
    )


def volumes(*, tiny: bool) -> Case:
    from monai.networks.nets.unet import UNet

    size = 32 if tiny else 96
    steps: dict[str, Any] = {"channels": (16, 32, 64, 128, 256), "strides": (2, 2, 2, 2), "num_res_units": 2}
    network = UNet(3, in_channels=1, out_channels=2, **steps)
    x, y = torch.randn(1, 1, size, size, size), torch.randint(2, (1, size, size, size))
    return Case(network, x, y, nn.CrossEntropyLoss())


def text(*, tiny: bool) -> Case:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes: dict[str, Any] = {"n_embd": 32, "n_head": 2, "vocab_size": 100} if tiny else {}
    config = GPT2Config(use_cache=False, **sizes)
    words = torch.randint(config.vocab_size, (2, 17) if tiny else (8, 257))
    return Case(GPT2LMHeadModel(config), words[:, :-1], words[:, 1:], next_words)


def next_words(output: Any, words: Tensor) -> Tensor:
    return F.cross_entropy(output.logits.flatten(0, 1), words.flatten())


CASES: dict[str, Callable[..., Case]] = {"Unet": unet, "UNet 3D": volumes, "GPT-2": text}


def plans(case: Case) -> dict[str, lg.Plan]:
    """The plan of each way."""
    how: dict[str, Any] = {"criterion": case.criterion, "targets": case.y, "optimizer": SGD, "accumulate": "never"}
    whole, local = (lg.Planner(case.network, case.x, method=method, **how) for method in (lg.bp(), lg.dgl()))
    exact = whole.within(whole.bytes_of("50%"), 1, several=False, as_you_go=False)
    return {
        "BP": whole.exactly(whole.bp),
        "exact": whole.exactly(exact or whole.frontier(1, as_you_go=False)[-1]),
        **{f"DGL, {blocks} blocks": local.exactly(local.balanced(blocks)) for blocks in (2, 4)},
    }


def step_of(plan: lg.Plan, make: Callable[[], Case]) -> Callable[[], None]:
    """A training step of a network of its own. It has been taken once, which makes the optimizer's state."""
    torch.manual_seed(0)
    case = make()
    model = plan.localize(case.network, case.x)
    optimizer = SGD(lg.param_groups(model))

    def step() -> None:
        lg.local_backward(model, case.x, case.y)
        optimizer.step()
        optimizer.zero_grad()

    step()
    return step


def measure_peaks(table: Table, name: str, chosen: dict[str, lg.Plan], make: Callable[[], Case]) -> None:
    for way, plan in chosen.items():
        if (name, way) in table:
            continue
        peak = lg.measure_peak(step_of(plan, make)).total
        told = {"blocks": len(plan.blocks), "cuts": " ".join(plan.blocks[:-1]), "recomputed": len(plan.units)}
        table.add({"network": name, "way": way, **told, "peak_bytes": peak, "predicted_peak_bytes": plan.peak})
        print(f"{name}, {way}: {mib(peak)}, predicted {mib(plan.peak)}", flush=True)


def measure_times(table: Table, name: str, chosen: dict[str, lg.Plan], make: Callable[[], Case], rounds: int) -> None:
    if all((name, way) in table for way in chosen):
        return
    steps = [partial(seconds_of, step_of(plan, make)) for plan in chosen.values()]
    medians = medians_in_turn(steps, rounds, warm_up=1)
    for way, seconds in zip(chosen, medians, strict=True):
        table.add({"network": name, "way": way, "rounds": rounds, "seconds_of_step": f"{seconds:.3f}"})
        print(f"{name}, {way}: {seconds:.2f} s", flush=True)


def main(settings: Settings) -> None:
    torch.manual_seed(0)
    peaks = Table(settings.out, KEY, same=environment())
    times = Table(settings.out.with_stem(f"{settings.out.stem}_times"), KEY, same=environment())
    for name in settings.networks:
        make = partial(CASES[name], tiny=settings.tiny)
        chosen = plans(make())
        measure_peaks(peaks, name, chosen, make)
        if settings.rounds:
            measure_times(times, name, chosen, make, settings.rounds)


if __name__ == "__main__":
    main(tyro.cli(Settings))
