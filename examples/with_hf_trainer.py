"""Hugging Face's Trainer trains a ViT in four blocks: by `compute_loss`, or by `training_step`.

    python examples/with_hf_trainer.py     # under a minute on two CPU cores; needs pip install 'localgrad[examples]'

The ViT learns scikit-learn's images of digits, enlarged to 32x32, also by backpropagation in the same trainer.
"""
# pyright: reportMissingImports=false, reportIncompatibleMethodOverride=false

import argparse
import tempfile
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import localgrad as lg


def digits() -> list[dict[str, Tensor]]:
    """All images [1, 32, 32], normalised, with their labels."""
    x, y = (torch.tensor(array) for array in load_digits(return_X_y=True))
    x = ((x - x.mean()) / x.std()).to(torch.get_default_dtype()).view(-1, 1, 8, 8)
    x = nn.functional.interpolate(x, 32)
    return [{"x": image, "labels": label} for image, label in zip(x, y, strict=True)]


class Logits(nn.Module):
    """Pixels to logits, because `lg.localize` takes a network from one tensor to another."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(pixel_values=x).logits


class Backpropagation(Trainer):
    """Its `model` is what clears, clips and steps: for the blocks that is the LocalModel, with all auxiliaries."""

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any) -> Any:
        logits = model(inputs["x"])
        loss = nn.functional.cross_entropy(logits, inputs["labels"])
        return (loss, {"logits": logits}) if return_outputs else loss


class ByLoss(Backpropagation):
    def compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any) -> Any:
        if not model.training:  # an evaluation
            return super().compute_loss(model, inputs, return_outputs)
        last = self.accelerator.sync_gradients  # the last batch before the optimizer steps
        out = lg.as_loss(model, inputs["x"], inputs["labels"], move_averages=last)
        return (out.loss, {"logits": out.logits}) if return_outputs else out.loss


class ByBlocks(Backpropagation):
    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        model.train()
        inputs = self._prepare_inputs(inputs)
        scale, last = 1 / self.current_gradient_accumulation_steps, self.accelerator.sync_gradients
        how: Any = {"scale": scale, "move_averages": last, "backward": self.accelerator.backward}
        out = lg.local_backward(model, inputs["x"], inputs["labels"], **how)
        return torch.stack(out.losses).sum() * scale


def train(kind: type[Trainer], model: nn.Module, steps: int, **settings: Any) -> list[float]:
    """Trains for some steps of 64 images, and returns the training losses."""
    with tempfile.TemporaryDirectory() as folder:
        how: dict[str, Any] = {"per_device_train_batch_size": 64, "learning_rate": 1e-3, "label_names": ["labels"]}
        how |= {"remove_unused_columns": False, "report_to": "none", "save_strategy": "no", "logging_steps": 1}
        arguments = TrainingArguments(folder, max_steps=steps, use_cpu=True, disable_tqdm=True, **(how | settings))
        trainer = kind(model, arguments, train_dataset=digits())
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    steps = parser.parse_args().steps
    size: Any = {"image_size": 32, "patch_size": 4, "num_channels": 1, "hidden_size": 96, "num_attention_heads": 3}
    size |= {"num_labels": 10}
    config = ViTConfig(num_hidden_layers=6, intermediate_size=384, **size)
    for kind in (ByLoss, ByBlocks, Backpropagation):
        torch.manual_seed(0)
        model: Any = Logits(ViTForImageClassification(config))
        if kind is not Backpropagation:
            how: Any = {"method": lg.dgl("0c1f"), "coupling": lg.MAN(momentum=0.99)}
            model = lg.localize(model, blocks=4, example=torch.zeros(2, 1, 32, 32), **how)
        losses: list[float] = []
        peak = lg.measure_peak(lambda k=kind, m=model, kept=losses: kept.extend(train(k, m, steps))).total
        print(f"{kind.__name__}: the loss went from {losses[0]:.3f} to {losses[-1]:.3f}, peak {peak / 2**20:.1f} MiB")
    print("What to conclude: both ways give the same losses (sums over the blocks), in less memory than the last way.")


if __name__ == "__main__":
    main()
