"""Two processes train one model: as replicas that share each batch, as shards, or as a pipeline that shares the blocks.

    python examples/two_processes.py     # half a minute on two CPU cores

It starts its processes itself. Under torchrun, call `dist.init_process_group("gloo")` and the function of your choice.
A ResNet-20 learns scikit-learn's images of digits; one process alone trains the same model first, for comparison.
"""

import argparse
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.multiprocessing.spawn import spawn

import localgrad as lg


def batches(steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The same random batches on every process: normalised images [64, 1, 8, 8] and labels [64]."""
    x, y = (torch.tensor(array) for array in load_digits(return_X_y=True))
    x = ((x - x.mean()) / x.std()).view(-1, 1, 8, 8)
    generator = torch.Generator().manual_seed(0)
    for chosen in torch.randint(len(x), (steps, 64), generator=generator):
        yield x[chosen], y[chosen]


def build() -> lg.LocalModel:
    """The same model on every process, because the seed is the same."""
    torch.set_num_threads(1)  # Results are equal bit for bit only with as many threads in every process.
    torch.set_default_dtype(torch.float64)  # In float32 training would make differences of rounding large.
    torch.manual_seed(0)
    backbone = lg.sync_batch_norm(lg.build("resnet20", classes=10, in_channels=1))
    coupling = lg.MAN(momentum=0.9, lag=2)  # The next process of a pipeline is up to two steps behind.
    return lg.localize(backbone, blocks=4, method=lg.dgl("0c1f"), coupling=coupling, example=torch.zeros(2, 1, 8, 8))


def alone(steps: int) -> dict[str, Any]:
    """One process, for comparison. Like the others, it returns the trained weights of the network."""
    model = build()
    optimizer = torch.optim.SGD(lg.param_groups(model), lr=0.05, momentum=0.9)
    for x, y in batches(steps):
        lg.local_backward(model, x, y)
        optimizer.step()
        optimizer.zero_grad()
    return model.backbone.state_dict()


def replicas(steps: int) -> dict[str, Any]:
    """Each process holds the whole model and reads its own half of each batch."""
    model = build()
    averaging = lg.Replicas(model)
    optimizer = torch.optim.SGD(lg.param_groups(model), lr=0.05, momentum=0.9)
    for x, y in batches(steps):
        x, y = (tensor.chunk(2)[dist.get_rank()] for tensor in (x, y))
        for done in lg.block_steps(model, x, y):
            averaging.start(done.block, done.loss)  # These gradients travel while the next block computes.
        averaging.finish()
        model.move_averages()
        optimizer.step()
        optimizer.zero_grad()
    return model.backbone.state_dict()


def shards(steps: int) -> dict[str, Any]:
    """Each process holds a half of each parameter, and reads its own half of each batch."""
    model = lg.shard(build())
    optimizer = torch.optim.SGD(lg.param_groups(model), lr=0.05, momentum=0.9)
    for x, y in batches(steps):
        lg.local_backward(model, *(tensor.chunk(2)[dist.get_rank()] for tensor in (x, y)))
        optimizer.step()
        optimizer.zero_grad()
    return get_model_state_dict(model.backbone, options=StateDictOptions(full_state_dict=True))


def pipeline(steps: int) -> dict[str, Any]:
    """Each process holds and trains two of the four blocks, reads whole batches, and waits for no gradient."""
    stage = lg.Stage(build, shares=(2, 2))  # It is given the function, so that the other blocks never take memory.
    model = stage.model
    optimizers = {k: torch.optim.SGD(model.members(k), lr=0.05, momentum=0.9) for k in stage.blocks}
    for x, y in batches(steps):
        for done in stage.block_steps(x, y):
            model.move_averages(done.block)
            optimizers[done.block].step()
            optimizers[done.block].zero_grad()
    stage.finish()
    return stage.state_dict(model.backbone)  # On the first process. The others get nothing.


def compare(rank: int, steps: int, expected: dict[str, Tensor], folder: str) -> None:
    """Trains in each way as one of two processes. The first process prints how far the weights are from `expected`."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    for train in (replicas, shards, pipeline):
        found = train(steps)
        if rank == 0:
            apart = max(float((found[name] - expected[name]).abs().max()) for name in expected)
            print(f"{train.__name__}: the weights are at most {apart:.1e} away from those of one process")
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as folder:
        spawn(compare, (steps, alone(steps), folder), nprocs=2)
    print(
        "What to conclude: a pipeline gives the model of one process bit for bit, replicas and shards up to rounding."
    )
    print(
        "Replicas share the images, shards the weights too, and a pipeline the blocks. docs/scaling.md compares them."
    )
