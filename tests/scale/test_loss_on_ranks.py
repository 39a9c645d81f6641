"""`as_loss` within DistributedDataParallel: two ranks with half of each batch are one process with whole batches."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from spawned import on_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import localgrad as lg

EXAMPLE = Path(__file__).parents[2] / "examples" / "with_ddp.py"
STEPS, BATCH = 2, 8
CASES = [(blocks, coupling) for blocks in (2, 4) for coupling in (None, lg.MAN(0.9))]
Names = dict[str, Any]


def model_of(names: Names, blocks: int, coupling: lg.MAN | None) -> lg.LocalModel:
    torch.manual_seed(0)
    x = torch.zeros(2, 1, 32, 32)
    return lg.localize(names["network"](), blocks=blocks, method=lg.dgl("0c1f"), coupling=coupling, example=x)


def in_double(call: Callable[..., Any]) -> Any:
    torch.set_default_dtype(torch.float64)
    try:
        names = runpy.run_path(str(EXAMPLE))
        names["batches"].__globals__["BATCH"] = BATCH
        return call(names)
    finally:
        torch.set_default_dtype(torch.float32)


def on_rank() -> list[dict[str, Tensor]]:
    def train(names: Names) -> list[dict[str, Tensor]]:
        found = []
        for case in CASES:
            model = model_of(names, *case)
            names["train"](model, STEPS, dist.get_rank(), dist.get_world_size())
            found.append(model.state_dict())
        return [*found, *hooks_of_a_reducer(names)]

    return in_double(train)


def hooks_of_a_reducer(names: Names) -> list[dict[str, Tensor]]:
    """The gradients and how often the reducer's own hook ran, with accumulation over two batches."""
    model = model_of(names, 4, lg.MAN(0.9))
    wrapped = DistributedDataParallel(names["Loss"](model))
    buckets: list[int] = []

    def average(state, bucket):  # DistributedDataParallel refuses annotations that are text.
        buckets.append(bucket.index())
        work = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True)
        assert work is not None
        return work.get_future().then(lambda done: done.value()[0])

    wrapped.register_comm_hook(None, average)
    (x1, y1), (x2, y2) = names["batches"](2, dist.get_rank(), 2)
    with wrapped.no_sync():
        wrapped(x1, y1)[0].backward()
    assert not buckets
    wrapped(x2, y2)[0].backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return [grads, {"buckets": torch.tensor(buckets)}]


def alone(names: Names) -> list[dict[str, Tensor]]:
    """The same with `local_backward` on whole batches."""
    found = []
    for case in CASES:
        model = model_of(names, *case)
        optimizer = torch.optim.SGD(lg.param_groups(model), lr=0.05, momentum=0.9)
        for x, y in names["batches"](STEPS, 0, 1):
            lg.local_backward(model, x, y)
            optimizer.step()
            optimizer.zero_grad()
        found.append(model.state_dict())
    model = model_of(names, 4, lg.MAN(0.9))
    for x, y in names["batches"](2, 0, 1):
        lg.local_backward(model, x, y)
    return [*found, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}]


def test_two_ranks_are_one_process_with_both_halves(tmp_path: Path) -> None:
    assert not any(isinstance(m, nn.BatchNorm2d) for m in in_double(lambda n: model_of(n, 4, lg.MAN())).modules())
    wanted = in_double(alone)
    for *found, buckets in on_ranks(on_rank, tmp_path):
        assert len(buckets["buckets"])
        for got, expected in zip(found, wanted, strict=True):
            assert got.keys() == expected.keys()
            for name in got:
                torch.testing.assert_close(got[name], expected[name], rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.slow  # The test above runs its functions in the default run.
def test_the_example_under_torchrun_prints_the_same_weights_on_both_ranks() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(EXAMPLE), "--steps", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"rank (\d), ([\w ]+): loss [\d.]+, peak ([\d.]+) MiB, sum of weights (\S+)", done.stdout)
    assert len(rows) == 4
    for kind in ("four blocks", "backpropagation"):
        assert len({weights for _, name, _, weights in rows if name == kind}) == 1
    peaks = {name: float(peak) for _, name, peak, _ in rows}
    assert peaks["four blocks"] < peaks["backpropagation"]
