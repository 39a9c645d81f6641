"""Object detection, a task of one's own: RetinaNet learns to find garments, in one block and in MAN++'s four blocks.

python examples/detection.py     # seven minutes on one CPU core
"""

from typing import Any

import torch
import tyro
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models.detection import anchor_utils, backbone_utils, retinanet
from torchvision.ops import box_iou
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

import localgrad as lg
from localgrad.run import data as datasets

BATCH, SIZE, CLASSES, WIDTH = 16, 96, 11, 64  # Class 0 is the background. MAN++'s pyramid has 256 channels.
SIDES, STRIDES = (12, 6, 3, 2, 1), (8, 16, 32, 64, 128)  # Those of the pyramid's maps, P3 to P7.
CUTS = [f"backbone.body.layer{stage}.1" for stage in (1, 2, 3)]


def subnets(convolutions: int) -> retinanet.RetinaNetHead:
    """Maps of the pyramid -> "cls_logits" [B, A, 11] and "bbox_regression" [B, A, 4] of their A anchors."""
    made = retinanet.RetinaNetHead(WIDTH, 9, CLASSES, norm_layer=lambda channels: nn.GroupNorm(32, channels))
    made.regression_head._loss_type = "smooth_l1"
    for subnet in (made.classification_head, made.regression_head):
        subnet.conv = subnet.conv[:convolutions]
    return made


class Detector(retinanet.RetinaNet):
    """RetinaNet (Lin et al., ICCV 2017) that returns what its subnets give, because the loss is the task's."""

    def __init__(self) -> None:
        stages, top = {f"layer{i}": str(i) for i in (2, 3, 4)}, LastLevelP6P7(WIDTH, WIDTH)
        backbone = backbone_utils.BackboneWithFPN(resnet18(), stages, [128, 256, 512], WIDTH, top)
        anchors = anchor_utils.AnchorGenerator(
            tuple((2 * s, 2.52 * s, 3.17 * s) for s in STRIDES), ((0.5, 1.0, 2.0),) * 5
        )
        super().__init__(backbone, CLASSES, anchor_generator=anchors, head=subnets(4), detections_per_img=100)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.head(list(self.backbone(x).values()))


class LocalHead(nn.Module):
    """MAN++'s head: a convolution, and subnets of two more on a map of the pyramid's size, at its end on three."""

    def __init__(self, boundary: lg.Boundary) -> None:
        super().__init__()
        level = next(level for level, side in enumerate(SIDES) if side <= boundary.size[0])
        size = 1 if boundary.size[0] == SIDES[level] else 3  # Without a coupling, the first map is too large.
        self.reduce = nn.Sequential(nn.Conv2d(boundary.channels, WIDTH, size, 1 + size // 2, size // 2), nn.ReLU())
        self.top, self.subnets = LastLevelP6P7(WIDTH, WIDTH) if level == 2 else None, subnets(2)

    def forward(self, h: Tensor) -> dict[str, Tensor]:
        maps = [self.reduce(h)]
        return self.subnets(maps if self.top is None else self.top(maps, maps, [""])[0])


class Detection:
    """The task. Targets are "boxes" [B, N, 4] and "labels" [B, N]. Rows without a box have the label -1."""

    head = LocalHead  # Called with a boundary, it makes the head.

    def __init__(self, network: Detector) -> None:
        maps = network.anchor_generator.grid_anchors([[s, s] for s in SIDES], [[torch.tensor(s)] * 2 for s in STRIDES])
        self.network, self.maps = network, maps
        self.anchors = {sum(map(len, read)): torch.cat(read) for read in (maps, maps[:1], maps[1:2], maps[2:])}

    def criterion(self, output: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
        objects, grid = self.objects(targets), self.anchors[output["cls_logits"].shape[1]].to(targets["boxes"].device)
        return torch.stack([*self.network.compute_loss(objects, output, [grid] * len(objects)).values()]).sum()

    def metrics(self, output: dict[str, Tensor], targets: dict[str, Tensor]) -> dict[str, Tensor]:
        """How many objects one of the ten best boxes shows: its class is right, and at least half of both overlaps."""
        pairs = zip(self.objects(targets), self.detections(output), strict=True)
        fit = [box_iou(t["boxes"], d["boxes"][:10]) * (t["labels"][:, None] == d["labels"][:10]) for t, d in pairs]
        return {"found": torch.cat([(f >= 0.5).any(1) for f in fit]).sum(), "count": (targets["labels"] > 0).sum()}

    def check_targets(self, targets: dict[str, Tensor]) -> None:
        b, k = targets["boxes"], targets["labels"]
        if b.shape != (*k.shape, 4) or (k >= CLASSES).any() or not (b[k > 0, 2:] > b[k > 0, :2]).all():
            raise lg.UserError("targets take boxes [B, N, 4], left < right, top < bottom, and labels [B, N] below 11")

    def output(self, features: int) -> nn.Module:
        raise lg.UserError("boxes need whole heads")

    def objects(self, targets: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        pairs = zip(targets["boxes"], targets["labels"], strict=True)
        return [{"boxes": boxes[labels > 0], "labels": labels[labels > 0]} for boxes, labels in pairs]

    def detections(self, output: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """The boxes, labels and scores that the network finds in each image, the best first."""
        maps, count = [anchors.to(output["cls_logits"].device) for anchors in self.maps], len(output["cls_logits"])
        split = {name: list(tensor.split([*map(len, maps)], 1)) for name, tensor in output.items()}
        return self.network.postprocess_detections(split, [maps] * count, [(SIZE, SIZE)] * count)


def main(steps: int = 250) -> None:
    data: Any = datasets.load("fashion-scenes")
    x, test = (datasets.normalize(split.images, data.info) for split in (data.train, data.test))
    for blocks, man in ((1, None), (CUTS, lg.MANPlusPlus())):  # One block is backpropagation.
        torch.manual_seed(0)
        net = Detector()
        model = lg.localize(net, blocks=blocks, method=lg.dgl(), coupling=man, example=x[:BATCH], task=Detection(net))
        optimizer = torch.optim.AdamW(lg.param_groups(model), lr=2e-3)
        for rows in torch.arange(steps * BATCH).view(steps, BATCH) % len(x):
            lg.local_backward(model, x[rows], {name: t[rows] for name, t in data.train.objects.items()})
            optimizer.step()
            optimizer.zero_grad()
        told = model.task.metrics(net.eval().requires_grad_(False)(test), data.test.objects)
        print(f"blocks: {len(model.blocks)}, garments found: {100 * told['found'] / told['count']:.1f}%")
    print("What to conclude: so few steps find some garments, both ways. docs/tasks.md compares longer runs.")


if __name__ == "__main__":
    tyro.cli(main)
