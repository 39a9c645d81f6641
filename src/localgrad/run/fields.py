"""The fields of a recipe, in the groups in which `--help` shows their flags. The docstrings are the help texts, each on
one line, because tyro would keep a line break in them.

This module imports no PyTorch, so that `--help` is quick.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ModelFields:
    """The network, and what it starts from."""

    model: str = "resnet32"
    """resnet20/32/44/56/110/1202, torchvision:NAME, timm:NAME, or PACKAGE.MODULE:FUNCTION for a network of your own."""
    model_args: str | None = None
    """Arguments of the network's constructor: img_size=28,patch_size=7."""
    init: str | None = None
    """Checkpoint of the backbone to start from. A head for another number of classes is drawn anew."""
    freeze: str | None = None
    """Units that stay as they are, batch norm statistics too: stem,layer1.0:layer1.4. A wrong name lists all names."""


@dataclass(frozen=True, kw_only=True)
class DataFields:
    """The images."""

    data: str = "digits"
    """digits, fashion-mnist, cifar10, cifar100, svhn, stl10, image-folder; of masks: fashion-scenes, mask-folder."""
    data_dir: str | None = None
    """Folder of the data. Each set has a default, which localgrad list shows."""
    download: bool = False
    """Fetch a missing data set."""
    image_size: int | None = None
    """Side of the images in pixels (image-folder and mask-folder only)."""
    limit_train: int | None = None
    """Number of training images to use, balanced over the classes."""
    mixup: float = 0.0
    """Mixup: alpha of the beta distribution that gives the shares of two images, such as 0.2; 0 mixes none."""
    cutmix: float = 0.0
    """CutMix: the same for a box of another image and its area. With both, chance takes one of them for each batch."""
    workers: int = 0
    """Processes that decode images (image-folder only)."""
    on_bad_image: Literal["error", "skip"] = "error"
    """error: an unreadable image ends the run; skip: it is replaced and listed (image-folder only)."""


@dataclass(frozen=True, kw_only=True)
class MethodFields:
    """The cut into blocks, and what gives each block its loss."""

    method: str = "dgl"
    """bp, which trains exactly, or the losses of the blocks: dgl, predsim, infopro or auglocal."""
    coupling: str = "man"
    """none, man, man++ or deep-man."""
    blocks: str = "4"
    """How many blocks, or the last unit of each: layer1.4,layer2.4; auto fits a --budget."""
    head: str = "auto"
    """Local classifier: dgl, 0c1f, 1c1f, 1c2f (1 convolution, 2 linear), 1c3f, 2c2f; 1c2f@4 pools to 4x4; or auto."""
    momentum: float = 0.995
    """Momentum of the coupling's EMA: 0 copies the source, 1 never moves."""
    branches: Literal["both", "learnable", "ema"] = "both"
    """Which branches of the coupling exist."""
    form: Literal["branches", "pull"] = "branches"
    """branches: the coupling of the published code; pull: that of the ECCV text, one branch pulled to its source."""
    depth: int | None = None
    """How many units deep-man or auglocal uses. Each has a default of its own."""
    learnable_units: int = 1
    """How many units the learnable branch of man and man++ has; those after the first stand alone."""
    lag: int = 0
    """Steps by which the coupling's EMA is behind its source, so that a pipeline need not wait."""
    ema_every: int = 1
    """The coupling's EMA reads its source once in this many steps."""
    contrast: bool = False
    """InfoPro: supervised contrastive instead of cross-entropy."""


@dataclass(frozen=True, kw_only=True)
class OptimizerFields:
    """The steps, and how large they are."""

    epochs: int = 20
    """Passes over the training images."""
    batch_size: int = 128
    """Images of one forward pass."""
    accumulate: int = 1
    """Number of batches whose gradients are averaged for a step."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """sgd has Nesterov momentum 0.9."""
    lr: float = 0.1
    """The peak of the cosine schedule."""
    block_lr: str | None = None
    """Factors on lr, one for each block with its auxiliary: 1,1,0.5,0.5."""
    backbone_lr: float = 1.0
    """Factor on lr for the network without its head, besides those of --block-lr: 0.1 is usual after --init."""
    warmup: float = 0.05
    """Share of the steps in which lr rises linearly."""
    weight_decay: float = 1e-4
    """Weight decay of blocks and auxiliaries."""
    decay_norms: bool = True
    """Weight decay on norms, biases and scales too."""
    label_smoothing: float = 0.0
    """Label smoothing of all cross-entropies, the auxiliaries' too."""
    clip: float | None = None
    """Largest gradient norm of a block with its auxiliary."""
    skip_nonfinite: bool = False
    """Leave out steps whose losses or gradients are not finite, instead of ending the run."""


@dataclass(frozen=True, kw_only=True)
class MemoryFields:
    """What takes less memory, and the number format."""

    recompute: str | None = None
    """Units to recompute in the backward pass, FIRST:LAST of them together, couplings as coupling.K, or all."""
    step_as_you_go: bool = False
    """Step each block right after its backward pass, so that gradients are freed too."""
    precision: Literal["auto", "bf16", "fp16", "float32"] = "auto"
    """auto is bf16 where the processor is fast at it."""
    channels_last: bool = True
    """Memory format of images and weights."""


@dataclass(frozen=True, kw_only=True)
class MachineFields:
    """Where it runs, and what makes it repeatable."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    seed: int = 0
    """Seed of the weights, the order, the augmentation and the subset."""
    deterministic: bool = False
    """Only deterministic kernels."""
    sync_batch_norm: bool = False
    """With several processes: batch norm over the images of all processes."""
