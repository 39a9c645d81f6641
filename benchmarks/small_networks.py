"""Small random networks of other libraries, each with an example of its input, for the benchmark `cut_networks.py`.

They are the architectures of transformers, segmentation_models_pytorch, MONAI, diffusers and torchvision with few
channels and random weights. Nothing is downloaded. Options of a library keep their defaults, `use_cache` among them.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import detection, get_model, list_models

WORDS = 100  # The size of the vocabulary.
BATCH = 2
TOKENS = 16
ENCODERS = ("resnet34", "efficientnet-b0", "mobilenet_v2")


@dataclass(frozen=True)
class Small:
    """A small network.

    Attributes:
        library: The distribution that defines it, such as "transformers".
        build: Makes it, with random weights.
        example: Makes an example of its input, a batch of two: a tensor, a tuple of the arguments of its forward, or a
            dictionary of them by name.
    """

    library: str
    build: Callable[[], nn.Module]
    example: Callable[[], Any]


def networks() -> dict[str, Small]:
    """All small networks by name."""
    return {name: small for group in (_text, _vision, _unets, _torchvision) for name, small in group()}


def ids() -> Tensor:
    """Numbers of tokens [2, 16], none of which is a special token."""
    return torch.randint(3, WORDS, (BATCH, TOKENS))


def padded() -> dict[str, Tensor]:
    """Numbers of tokens with a mask by which the second text is shorter."""
    mask = torch.ones(BATCH, TOKENS, dtype=torch.int64)
    mask[1, TOKENS - 4 :] = 0
    return {"input_ids": ids(), "attention_mask": mask}


def images(size: int) -> Tensor:
    """Images [2, 3, size, size]."""
    return torch.randn(BATCH, 3, size, size)


def of_transformers(auto: str, kind: str, **config: Any) -> nn.Module:
    """The network of transformers of this kind, made by its class `auto`."""
    transformers = import_module("transformers")
    return getattr(transformers, auto).from_config(transformers.AutoConfig.for_model(kind, **config))


def _text() -> Iterator[tuple[str, Small]]:
    """Language models of six layers of 64 channels."""
    sizes = {
        "vocab_size": WORDS, "hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4,
        "intermediate_size": 128, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2,
    }  # fmt: skip
    grouped = {"num_key_value_heads": 2, "head_dim": 16}
    special = {"cls_token_id": 1, "sep_token_id": 2}
    decoders: dict[str, dict[str, Any]] = {
        "gpt2": {}, "gpt_neox": {}, "llama": grouped, "mistral": grouped, "qwen3": grouped, "gemma": grouped,
        "phi": {}, "falcon": {}, "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64}, "bloom": {},
        "mamba": {"state_size": 8},
    }  # fmt: skip
    encoders: dict[str, dict[str, Any]] = {"bert": {}, "roberta": {}, "modernbert": special}

    def small(auto: str, kind: str, config: dict[str, Any], example: Callable[[], Any] = ids) -> Small:
        return Small("transformers", partial(of_transformers, auto, kind, **{**sizes, **config}), example)

    for kind, config in encoders.items():
        yield kind, small("AutoModelForSequenceClassification", kind, config)
        yield f"{kind} without a head", small("AutoModel", kind, config)
        yield f"{kind}, masked words", small("AutoModelForMaskedLM", kind, config)
    for kind, config in decoders.items():
        yield kind, small("AutoModelForCausalLM", kind, config)
    t5 = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 6, "num_heads": 4, "vocab_size": WORDS}
    yield "t5 encoder", Small("transformers", partial(_t5_encoder, **t5), ids)
    for kind in ("bert", "gpt2", "llama"):
        auto = "AutoModelForSequenceClassification" if kind in encoders else "AutoModelForCausalLM"
        yield f"{kind} with a mask", small(auto, kind, {**encoders, **decoders}[kind], padded)


def _t5_encoder(**config: Any) -> nn.Module:
    transformers = import_module("transformers")
    return transformers.T5EncoderModel(transformers.T5Config(**config))


def _vision() -> Iterator[tuple[str, Small]]:
    """Classifiers and one segmenter of images, and a classifier of sounds."""
    layers = {"hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 128}
    patches = {**layers, "image_size": 32, "patch_size": 8}
    depths, widths = [2, 2, 2, 2], [16, 32, 48, 64]
    shifted = {"image_size": 64, "patch_size": 2, "embed_dim": 16, "depths": depths, "num_heads": [1, 2, 4, 4]}
    pyramid = {"hidden_sizes": widths, "depths": depths, "num_attention_heads": [1, 2, 2, 4], "decoder_hidden_size": 64}
    sounds = {
        **layers, "vocab_size": WORDS, "conv_dim": (32, 32, 32), "conv_stride": (5, 2, 2), "conv_kernel": (10, 3, 3),
        "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
        "classifier_proj_size": 32,
    }  # fmt: skip
    classify, segment = "AutoModelForImageClassification", "AutoModelForSemanticSegmentation"
    kinds: dict[str, tuple[str, dict[str, Any], int]] = {
        "vit": (classify, patches, 32),
        "swin": (classify, {**shifted, "window_size": 4}, 64),
        "convnext": (classify, {"hidden_sizes": widths, "depths": depths}, 64),
        "dinov2": (classify, patches, 32),
        "segformer": (segment, pyramid, 64),
        "beit": (classify, patches, 32),
    }
    for kind, (auto, config, size) in kinds.items():
        yield kind, Small("transformers", partial(of_transformers, auto, kind, **config), partial(images, size))
    hear = partial(of_transformers, "AutoModelForAudioClassification", "wav2vec2", **sounds)
    yield "wav2vec2", Small("transformers", hear, partial(torch.randn, BATCH, 1600))


def _unets() -> Iterator[tuple[str, Small]]:
    """Networks with long skips: those of segmentation_models_pytorch, MONAI and diffusers."""

    def made(library: str, path: str, name: str, *args: Any, **how: Any) -> Callable[[], nn.Module]:
        return lambda: getattr(import_module(path), name)(*args, **how)

    library = "segmentation-models-pytorch"
    for name in ("Unet", "UnetPlusPlus", "FPN", "DeepLabV3Plus"):
        for encoder in ENCODERS:
            build = made(library, "segmentation_models_pytorch", name, encoder, encoder_weights=None, classes=3)
            yield f"{name}, {encoder}", Small(library, build, partial(images, 64))
    space = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2}
    volumes = {
        "UNet": {"channels": (8, 16, 32, 64), "strides": (2, 2, 2), "num_res_units": 2},
        "BasicUNet": {"features": (8, 8, 16, 32, 64, 8)},
        "SwinUNETR": {"feature_size": 12},
    }
    for name, how in volumes.items():
        build = made("monai", "monai.networks.nets", name, **space, **how)
        yield f"{name} 3D", Small("monai", build, partial(torch.randn, BATCH, 1, 64, 64, 64))
    widths = {"block_out_channels": (16, 32, 32, 64), "norm_num_groups": 8, "sample_size": 32}
    build = made("diffusers", "diffusers", "UNet2DModel", **widths)
    yield "UNet2DModel", Small("diffusers", build, lambda: (images(32), torch.randint(1000, (BATCH,))))


def _torchvision() -> Iterator[tuple[str, Small]]:
    """The backbones of torchvision's detectors, most with a feature pyramid, and its video networks of each kind."""

    def backbone(name: str) -> nn.Module:
        network: Any = get_model(name, weights=None, weights_backbone=None)
        return network.backbone

    for name in list_models(module=detection):
        yield f"{name}, backbone", Small("torchvision", partial(backbone, name), partial(images, 320))
    for name in ("r3d_18", "mvit_v2_s", "swin3d_t"):
        size = (16, 224, 224) if name == "mvit_v2_s" else (16, 64, 64)
        build = partial(get_model, name, weights=None, num_classes=10)
        yield name, Small("torchvision", build, partial(torch.randn, BATCH, 3, *size))
