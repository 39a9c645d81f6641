"""What the dimensions of a boundary mean, as the layers around it tell.

Two dimensions a sample are a map of one row [B, C, L], as `nn.Conv1d` reads it ("NCL"), or tokens [B, L, C] ("NLC").
Three are a map, with channels first ("NCHW") or last ("NHWC"), and four a map of a volume or a video ("NCDHW"). One
dimension is a vector ("NC").
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from localgrad.core.boundary import Boundary
from localgrad.core.errors import UserError
from localgrad.core.segments import Segment

MOST_PREFIX = 5  # So many class, distillation and register tokens may come before those of the image.


def reads_row(shape: tuple[int, ...], reader: Segment | None) -> str | None:
    """Whether a segment reads [B, *shape] as a map of one row or as tokens.

    Its first module with parameters tells, and the shape of what that module is given.

    Args:
        shape: The shape of one sample.
        reader: The segment that reads it.

    Returns:
        "NCL", "NLC", or None where the layers do not tell.
    """
    if reader is None or reader.reads is None or len(shape) != 2:
        return None
    module, given = reader.reads
    if shape[0] != shape[1] and given in ((shape[0],), (shape[1],)):  # It was pooled over the other dimension.
        return "NCL" if given == (shape[0],) else "NLC"
    if len(given) != 2:
        return None
    if given[0] == given[1] and any(type(m) in (nn.LayerNorm, nn.MultiheadAttention) for m in module.modules()):
        return "NLC"  # Such a layer transposes the tokens for a convolution in it.
    turned = given == shape[::-1] != shape
    for layer in module.modules():
        if (reads := _channels(layer)) is not None:
            first, channels = reads
            if channels not in given:
                return None
            within = channels != given[0 if first else 1]  # The module itself transposes it.
            return "NCL" if first != (turned != within) else "NLC"
    return None


def writes_row(shape: tuple[int, ...], writer: Segment) -> str | None:
    """ "NCL" if the last convolution of a segment has written [B, *shape] as a map of one row. Else None."""
    made = [m.out_channels for m in writer.module.modules() if isinstance(m, nn.Conv1d | nn.ConvTranspose1d)]
    return "NCL" if made and made[-1] == shape[0] != shape[1] else None


def _channels(layer: nn.Module) -> tuple[bool, int] | None:
    """Whether a layer reads channels first, [B, C, L], and the number of channels. None for other layers."""
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


def boundary_behind(
    segment: Segment, before: Boundary, following: Segment | None, stage: int, image: tuple[int, int] | None
) -> Boundary:
    """The boundary behind a segment.

    The layout is the one in which the next segment reads it. If that does not tell, it is the one in which this segment
    has read the same shape or has written it.

    Args:
        segment: The segment.
        before: The boundary before it.
        following: The next segment, or None.
        stage: The stage of the boundary, counted by changes of shape.
        image: Height and width of the network's input, or None where it has none, as text and series.

    Raises:
        UserError: One sample has more than four dimensions.
    """
    shape = segment.leaves
    itself = segment if segment.enters == shape else None
    if len(shape) == 1:
        return Boundary(shape, "NC", stage)
    if len(shape) == 2:
        told = reads_row(shape, following) or (itself and before.layout) or writes_row(shape, segment) or before.layout
        return (
            Boundary(shape, "NCL", stage) if told == "NCL" else Boundary(shape, "NLC", stage, *_grid(shape[0], image))
        )
    if len(shape) == 4:
        return Boundary(shape, "NCDHW", stage)
    if len(shape) != 3:
        raise UserError(f"behind '{segment.name}', {shape} crosses: neither a map, nor tokens, nor a vector")
    return Boundary(shape, _read_as(shape, following) or _read_as(shape, itself) or "NCHW", stage)


def _grid(tokens: int, image: tuple[int, int] | None) -> tuple[int, tuple[int, int]]:
    """Divides tokens into those before the image's and a grid (rows, columns) of the image's proportions. Tokens of no
    image are one column, and none of them comes before the others."""
    if image is None:
        return 0, (tokens, 1)
    for prefix in range(min(tokens, MOST_PREFIX + 1)):
        height = round(((tokens - prefix) * image[0] / image[1]) ** 0.5)
        if height and (tokens - prefix) % height == 0 and (tokens - prefix) // height * image[0] == height * image[1]:
            return prefix, (height, (tokens - prefix) // height)
    return 0, (tokens, 1)


def _read_as(shape: tuple[int, ...], reader: Segment | None) -> str | None:
    """The layout in which a segment reads a map [B, *shape], or None where its first layer does not tell."""
    if reader is None or reader.reads is None:
        return None
    module, given = reader.reads
    if given != shape:
        return "NHWC" if given == (shape[-1], *shape[:-1]) else None
    first = next(m for m in module.modules() if next(m.parameters(recurse=False), None) is not None)
    if isinstance(first, nn.LayerNorm) and first.normalized_shape[-1] == shape[-1]:
        # Subclasses of LayerNorm may be norms over the channels of NCHW.
        return "NHWC" if type(first) is nn.LayerNorm or shape[0] != shape[-1] else "NCHW"
    if isinstance(first, nn.Linear) and first.in_features == shape[-1]:
        return "NHWC"
    channels = getattr(first, "in_channels", None) or getattr(first, "num_features", None)
    return "NCHW" if channels == shape[0] else None
