"""Two dimensions a sample: a map of one row [B, C, L], as `nn.Conv1d` reads it, or tokens [B, L, C]. Layers tell."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from localgrad.core.segments import Segment


def reads_row(shape: tuple[int, ...], reader: Segment | None) -> str | None:
    """Whether a segment reads [B, *shape] as a map of one row or as tokens, as far as what it gives to its first layer
    with parameters, and that layer, tell."""
    if reader is None or reader.reads is None or len(shape) != 2:
        return None
    module, given = reader.reads
    if shape[0] != shape[1] and given in ((shape[0],), (shape[1],)):  # pooled over the other dimension
        return "NCL" if given == (shape[0],) else "NLC"
    if len(given) != 2:
        return None
    if given[0] == given[1] and any(type(m) in (nn.LayerNorm, nn.MultiheadAttention) for m in module.modules()):
        return "NLC"  # a convolution in such a layer is given the tokens turned
    turned = given == shape[::-1] != shape
    for layer in module.modules():
        if (reads := _channels(layer)) is not None:
            first, channels = reads
            if channels not in given:
                return None
            within = channels != given[0 if first else 1]  # the module turns it itself
            return "NCL" if first != (turned != within) else "NLC"
    return None


def writes_row(shape: tuple[int, ...], writer: Segment) -> str | None:
    """The same by the last convolution of a segment."""
    made = [m.out_channels for m in writer.module.modules() if isinstance(m, nn.Conv1d | nn.ConvTranspose1d)]
    return "NCL" if made and made[-1] == shape[0] != shape[1] else None


def _channels(layer: nn.Module) -> tuple[bool, int] | None:
    """Whether a layer reads channels first, [B, C, L], and how many they are; None where it does not tell."""
    match layer:
        case _ConvNd():
            return True, layer.in_channels
        case _NormBase():
            return True, layer.num_features
        case nn.GroupNorm():
            return True, layer.num_channels
        case nn.LayerNorm() | nn.RMSNorm():
            return False, layer.normalized_shape[-1]
        case nn.Linear():
            return False, layer.in_features
        case nn.MultiheadAttention():
            return False, layer.embed_dim
        case nn.RNNBase():
            return False, layer.input_size
    return None
