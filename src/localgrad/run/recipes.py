"""Recipes by name: the papers' runs and the small ones of this repository.

Each docstring gives the command, the published figure and the hardware that it needs. Figures are test errors in
percent. Unless another source is named, they are from MAN (ECCV 2024), read in a public summary
(github.com/zhaoyang97/Paper-Notes). None of the papers' runs was repeated here, because they need data that the package
does not bring, and days on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from localgrad.core.errors import unknown
from localgrad.run.recipe import Recipe, read_recipe


def demo() -> Recipe:
    """`localgrad train --recipe demo`: scikit-learn's digits, half a minute on two cores."""
    return Recipe(model="resnet56", data="digits", blocks="4", head="1c2f", epochs=20, lr=0.05, warmup=0.2)


def fashion_small() -> Recipe:
    """`localgrad train --recipe fashion_small`: 20,000 Fashion-MNIST images, 16 blocks, minutes on two cores.
    Measured errors: results/accuracy_fashion_small.csv."""
    return Recipe(
        model="resnet32", data="fashion-mnist", limit_train=20000, blocks="16", head="1c2f", epochs=6, precision="bf16"
    )


def fashion_small_k2() -> Recipe:
    """`localgrad train --recipe fashion_small_k2`: 2 blocks of about the same bytes. As in all our own recipes below,
    the method is DGL, whose heads keep position (`1c1f@4`). The papers' heads do not."""
    return replace(fashion_small_k16(), blocks="layer1.3")


def fashion_small_k4() -> Recipe:
    """`localgrad train --recipe fashion_small_k4`: 4 blocks of about the same bytes."""
    return replace(fashion_small_k16(), blocks="layer1.1,layer1.3,layer2.2")


def fashion_small_k16() -> Recipe:
    """`localgrad train --recipe fashion_small_k16`: each unit is a block."""
    return replace(fashion_small(), coupling="none", head="1c1f@4")


def _cifar(model: str, blocks: int) -> Recipe:
    return Recipe(model=model, data="cifar10", blocks=str(blocks), epochs=400, batch_size=1024, lr=0.8, warmup=0.0)


def cifar10_resnet32_k8() -> Recipe:
    """`localgrad train --recipe cifar10_resnet32_k8`. Published: BP 6.37, DGL 11.63 -> DGL+MAN 8.42, InfoPro
    11.51 -> InfoPro+MAN 9.32. One GPU of 8 GB."""
    return _cifar("resnet32", 8)


def cifar10_resnet32_k16() -> Recipe:
    """`localgrad train --recipe cifar10_resnet32_k16`. Published: DGL 14.08 -> DGL+MAN 9.11, BP 6.37. One GPU of
    8 GB."""
    return _cifar("resnet32", 16)


def cifar10_resnet110_k32() -> Recipe:
    """`localgrad train --recipe cifar10_resnet110_k32`. Published: BP 5.42, DGL 12.51 -> DGL+MAN 9.65, InfoPro
    12.26 -> InfoPro+MAN 9.06. One GPU of 8 GB."""
    return _cifar("resnet110", 32)


def cifar10_resnet110_k55() -> Recipe:
    """`localgrad train --recipe cifar10_resnet110_k55`. Published: DGL+MAN 9.73, InfoPro+MAN 9.77; BP takes 9.26 GB.
    One GPU of 8 GB."""
    return _cifar("resnet110", 55)


def _imagenet(model: str, blocks: str, batch_size: int) -> Recipe:
    """lr follows the linear scaling rule of Goyal et al. (2017), 0.1 for 256 images, with their 5 epochs of warm-up."""
    return Recipe(
        model=f"torchvision:{model}", data="image-folder", data_dir="data/imagenet", method="infopro", blocks=blocks,
        epochs=90, batch_size=batch_size, lr=0.1 * batch_size / 256, warmup=5 / 90, workers=16,
    )  # fmt: skip


def imagenet_resnet101_k2() -> Recipe:
    """`localgrad train --recipe imagenet_resnet101_k2`. Published: BP 22.03 / 5.93 (top-1 / top-5), 19.71 GB a GPU;
    InfoPro K=2 21.85 / 5.89, 12.06 GB (ICLR 2021); with MAN not found. The cut is that of InfoPro's published code. 8
    GPUs in the paper, one here."""
    return _imagenet("resnet101", "layer2.0", 1024)


def imagenet_resnet101_k4() -> Recipe:
    """`localgrad train --recipe imagenet_resnet101_k4`. Published (top-1 / top-5): BP 22.03 / 5.93,
    InfoPro+MAN 21.73 / 5.81 with about 10.5 GB a GPU. 8 GPUs in the paper, one here."""
    return _imagenet("resnet101", "layer2.2,layer3.8,layer3.16", 1024)


def imagenet_resnet152_k2() -> Recipe:
    """`localgrad train --recipe imagenet_resnet152_k2`. Published: BP 21.60 / 5.92, 26.29 GB a GPU; InfoPro K=2
    21.45 / 5.84, 15.53 GB (ICLR 2021); with MAN not found. The cut is that of InfoPro's published code. 8 GPUs in the
    paper, one here."""
    return _imagenet("resnet152", "layer2.5", 1024)


def imagenet_resnet152_k4() -> Recipe:
    """`localgrad train --recipe imagenet_resnet152_k4`. Published (top-1 / top-5): InfoPro 22.21 / 6.26,
    InfoPro+MAN 20.78 / 5.56 with about 13.6 GB a GPU. 8 GPUs in the paper, one here."""
    return _imagenet("resnet152", "layer2.6,layer3.13,layer3.25", 1024)


def imagenet_resnext101_k2() -> Recipe:
    """`localgrad train --recipe imagenet_resnext101_k2`. Published: BP 20.64 / 5.40, 19.22 GB; InfoPro K=2
    20.35 / 5.28, 11.55 GB (ICLR 2021); with MAN not found. The cut is that of InfoPro's published code. 8 GPUs in the
    paper, one here."""
    return _imagenet("resnext101_32x8d", "layer2.2", 512)


def imagenet_resnext101_k4() -> Recipe:
    """`localgrad train --recipe imagenet_resnext101_k4`. Published: InfoPro K=4 about 21.69 / 6.11 (derived from
    HPFF, ECCV 2024); with MAN not found. 8 GPUs in the paper, one here."""
    return _imagenet("resnext101_32x8d", "layer2.2,layer3.8,layer3.16", 512)


RECIPES: dict[str, Callable[[], Recipe]] = {
    f.__name__: f
    for f in (
        demo, fashion_small, fashion_small_k2, fashion_small_k4, fashion_small_k16,
        cifar10_resnet32_k8, cifar10_resnet32_k16, cifar10_resnet110_k32, cifar10_resnet110_k55,
        imagenet_resnet101_k2, imagenet_resnet101_k4, imagenet_resnet152_k2, imagenet_resnet152_k4,
        imagenet_resnext101_k2, imagenet_resnext101_k4,
    )
}  # fmt: skip


def named_recipe(name: str) -> Recipe:
    """A recipe by its name, or read from a YAML file such as a run's config.yaml. Raises UserError."""
    if name.endswith((".yaml", ".yml")):
        return read_recipe(Path(name))
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return RECIPES[name]()
