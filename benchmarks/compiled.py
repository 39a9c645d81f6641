"""What PyTorch's memory budget of `torch.compile` gives, in bytes and time: a rival of exact plans.

    python benchmarks/compiled.py

`torch._functorch.config.activation_memory_budget` is the share of activations that the compiler keeps for the backward
pass, from 1 (all that it would keep) to 0. Each budget compiles the network anew. Random images. The rows take turns:
each time is the median of `repeats` rounds after two warm-up rounds. The peak is what the profiler saw allocated in a
step, with the parameters, the optimizer's state and the batch. Writes results/compiled_MODEL.csv.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch._functorch.config as functorch
import tyro
from common import Table, keep_freed_memory, medians_in_turn, seconds_of
from torch import Tensor
from torch._inductor.compile_fx import compile_fx
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import localgrad as lg
from localgrad.core.sizes import mib
from localgrad.run.folder import environment


@dataclass(frozen=True)
class Settings:
    """Measure eager backpropagation and compiled backpropagation with each budget, in float32."""

    model: str = "resnet110"
    batch_size: int = 128
    size: int = 32
    """Height and width of an image."""
    budgets: tuple[float, ...] = (1.0, 0.5, 0.3, 0.2, 0.1)
    repeats: int = 7
    out: Path = Path("results")


def step_of(settings: Settings, x: Tensor, y: Tensor, budget: float | None) -> tuple[Callable[[], None], int]:
    """A step of backpropagation, compiled if it has a budget, and the bytes that are live between steps."""
    torch.manual_seed(0)
    network = lg.build(settings.model, classes=10)
    network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, nesterov=True)

    def compiler(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        with functorch.patch(activation_memory_budget=budget):
            return compile_fx(graph, inputs)  # pyright: ignore[reportReturnType]

    # Each row has a compiler of its own, else the code of the first budget would be used for all.
    forward = network if budget is None else torch.compile(network, backend=compiler)

    def step() -> None:
        F.cross_entropy(forward(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    began = time.perf_counter()
    step()
    print(f"budget {budget}: the first step took {time.perf_counter() - began:.0f} s", flush=True)
    held = [*network.parameters(), *network.parameters(), *network.buffers(), x, y]  # SGD has one state a parameter.
    return step, sum(t.nbytes for t in held)


def allocated(step: Callable[[], None]) -> int:
    """The most bytes that a step had allocated at a time, by the profiler, which sees into compiled code too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
        peak = max(peak, live)
    return peak


def main(settings: Settings) -> None:
    keep_freed_memory()
    torch.manual_seed(0)
    x = torch.randn(settings.batch_size, 3, settings.size, settings.size).contiguous(memory_format=torch.channels_last)
    y = torch.randint(10, (settings.batch_size,))
    budgets = [None, *settings.budgets]
    rows = [step_of(settings, x, y, budget) for budget in budgets]
    medians = medians_in_turn([partial(seconds_of, step) for step, _ in rows], settings.repeats)
    same = {"batch_size": settings.batch_size, "size": settings.size, "repeats": settings.repeats, **environment()}
    table = Table(settings.out / f"compiled_{settings.model.rpartition(':')[2]}.csv", same=same)
    for budget, (step, held), median in zip(budgets, rows, medians, strict=True):
        name = "eager" if budget is None else f"compiled, budget {budget:g}"
        peak = held + allocated(step)
        table.add({"row": name, "times_bp": f"{median / medians[0]:.3f}", "milliseconds": f"{1000 * median:.0f}",
                   "peak_bytes": peak})  # fmt: skip
        print(f"{name:25} {median / medians[0]:.3f}x {mib(peak)}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Settings))
