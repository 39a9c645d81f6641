"""Folders of images with a mask for each: images/train/*, masks/train/*.png, the same with val, and classes.txt.

classes.txt names the classes, one a line. A pixel of a mask is the number of its line, from 0, or 255 for none. A set
is read into memory: 4 bytes for each pixel of a crop.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from localgrad.core.errors import RunError, UserError
from localgrad.run.image_folder import ENDINGS, printable
from localgrad.run.readers import decode

NO_CLASS = 255  # The value of a pixel that does not count.


class Split(NamedTuple):
    """Images uint8 [N, 3, size, size] and masks uint8 [N, size, size]."""

    images: Tensor
    masks: Tensor


def read_names(folder: Path) -> list[str]:
    """The names of the classes. Raises UserError unless classes.txt has 2 to 255 of them, and no two alike."""
    path = folder / "classes.txt"
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not 2 <= len(names) <= NO_CLASS or len(set(names)) < len(names):
        raise UserError(
            f"{path} must name 2 to {NO_CLASS} classes, one a line and no two alike, and has {len(names)} names"
        )
    return names


def read_split(folder: Path, split: str, size: int, classes: int) -> Split:
    """Reads a split. The shorter side of each image is resized to `size`, and the middle is cropped.

    Args:
        folder: The folder that has images, masks and classes.txt.
        split: "train" or "val".
        size: The side of the crops in pixels.
        classes: The number of classes.

    Raises:
        UserError: There is no image, one has no mask or is turned by its EXIF data, or a mask has another size or a
            value that is no class.
        RunError: A file is no readable image.
    """
    top = folder / "images" / split
    paths = sorted(p for p in top.iterdir() if p.suffix.lower() in ENDINGS and not p.name.startswith("."))
    if not paths:
        raise UserError(f"{top} holds no image: what is read ends in {', '.join(ENDINGS)}")
    images = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)
    masks = torch.empty(len(paths), size, size, dtype=torch.uint8)
    for i, path in enumerate(paths):
        images[i], masks[i] = _pair(path, folder / "masks" / split / f"{path.stem}.png", size, classes)
    return Split(images, masks)


def _pair(path: Path, mask_path: Path, size: int, classes: int) -> tuple[Tensor, Tensor]:
    """The crops of an image and of its mask."""
    from torchvision import tv_tensors
    from torchvision.transforms import v2

    from localgrad.core.task import other_values

    if not mask_path.is_file():
        raise UserError(f"{printable(str(path))} has no mask: {printable(str(mask_path))} is wanted")
    image, mask = _readable(path, decode), _readable(mask_path, _decode_mask)
    if _is_turned(path):
        raise UserError(
            f"{printable(str(path))} is turned or mirrored by its EXIF data, and its mask may not be: turn the pixels "
            "themselves or remove the orientation from the EXIF data, whichever fits the mask"
        )
    if image.size != mask.size:
        raise UserError(
            f"the mask {printable(str(mask_path))} is {mask.width}x{mask.height} pixels, but its image is "
            f"{image.width}x{image.height}: give each image a mask of its own size"
        )
    values = torch.from_numpy(np.array(mask))
    if wrong := other_values(values, classes, NO_CLASS):
        raise UserError(
            f"the mask {printable(str(mask_path))} has the value {wrong[0]}, but classes.txt names the classes 0 to "
            f"{classes - 1}, and {NO_CLASS} is a pixel without one"
        )
    crop = v2.Compose([v2.Resize(size, antialias=True), v2.CenterCrop(size)])
    pixels, cut = crop(tv_tensors.Image(v2.functional.pil_to_tensor(image)), tv_tensors.Mask(values))
    return pixels, cut


def _is_turned(path: Path) -> bool:
    """Whether the EXIF data of an image say that it is shown in another position than its pixels have."""
    from PIL import ExifTags, Image

    with warnings.catch_warnings(), Image.open(path) as image:
        warnings.simplefilter("ignore")
        try:
            return image.getexif().get(ExifTags.Base.Orientation) in range(2, 9)
        except Exception:  # Damaged EXIF data raise various kinds of errors, and `decode` ignores them.
            return False


def _decode_mask(path: Path) -> Any:
    """A mask as PIL's image of one byte a pixel. A palette is ignored, because its numbers are the classes."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path) as image:
            if image.mode not in ("L", "P"):
                raise UserError(
                    f"the mask {printable(str(path))} has pixels of mode {image.mode}, but one byte a pixel is wanted, "
                    "the number of its class"
                )
            return image.copy()


def _readable(path: Path, read: Any) -> Any:
    try:
        return read(path)
    except UserError:
        raise
    except Exception as error:  # Each image format raises other kinds of errors for damaged files.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RunError(f"{printable(str(path))} is not a readable image: {reason}") from error
