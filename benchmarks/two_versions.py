"""PipeDream-2BW on two processes (Narayanan et al., ICML 2021, section 3.1), for `race.py`. It has no command and
writes nothing.

An asynchronous pipeline of backpropagation: batches follow each other without a flush, so a gradient is exact, but of
weights that are one step old:

    w(t + 1) = w(t) - step(gradient of batch t at w(t - 1))

A process keeps two versions of its weights for this. The micro-batches of batch t + 1 may enter while those of batch t
are underway, which have the other version. The first process has `micro` + 1 micro-batches underway before it waits for
a gradient. That is the most that two versions allow: the first micro-batch of batch t + 1 needs w(t), so it needs all
gradients of batch t - 1. The paper has as many underway as it has processes, which is enough on fast links.

The paper counts its versions by micro-batches and wants at least as many of them in a batch as there are processes.
With two processes the rule holds with one of them too.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from two_processes import Part

from localgrad.scale.messages import Layouts


@dataclass
class _Underway:
    """A micro-batch whose gradient the first process waits for."""

    output: Tensor
    sent: Any
    gradient: Tensor
    received: Any


class TwoVersions:
    """This process's half of the network, which both processes step through the same number of batches.

    Args:
        half: The half, made for a micro-batch. It has the newest weights, and its statistics of batch norm are those of
            both versions.
        micro: The number of micro-batches in a batch.
        optimizer: Makes an optimizer of parameters.
        criterion: The loss of the last half's outputs and their targets, a mean over images.
    """

    def __init__(
        self,
        half: Part,
        micro: int,
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        criterion: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
    ) -> None:
        self.half, self.micro, self.criterion = half, micro, criterion
        self.optimizer = optimizer(list(half.parameters()))
        self.layouts = cast(Layouts, half.leaves or half.enters)  # What crosses between the halves.
        self.versions = [copy.deepcopy(half) for _ in range(2)]
        for version in self.versions:
            for own, shared in zip(version.modules(), half.modules(), strict=True):
                own._buffers = shared._buffers
        self._count = 0  # The number of micro-batches that have entered.
        self._underway: deque[_Underway] = deque()
        self._inputs: deque[tuple[Tensor, Any]] = deque()  # The receives that are posted.
        self._sent: deque[tuple[Tensor, Any]] = deque()

    def step(self, x: Tensor, y: Tensor) -> None:
        """Lets a batch enter. The first process reads x, and the last one reads y."""
        enter = self._last if self.half.number else self._first
        for part in (y if self.half.number else x).chunk(self.micro):
            enter(self.versions[self._count // self.micro % 2], part)
            self._count += 1

    def finish(self) -> None:
        """Waits until all that is underway is done and all messages have arrived. Then the weights are those after the
        last batch. More steps may follow."""
        if self.half.number:
            self._wait(self._inputs)
            self._wait(self._sent)
        elif self._count:
            while self._underway:
                self._backward()
            (nothing,) = self.layouts.empty(torch.device("cpu"))
            # They answer the receives that the other process has posted.
            answers = deque((nothing, dist.isend(nothing, 1)) for _ in range(self.micro))
            self._wait(answers)

    def _first(self, version: nn.Module, x: Tensor) -> None:
        if len(self._underway) > self.micro:
            self._backward()
        output = version(x)
        gradient = torch.empty_like(output)
        received = dist.irecv(gradient, 1)
        self._underway.append(_Underway(output, dist.isend(output.detach(), 1), gradient, received))

    def _backward(self) -> None:
        """The backward pass of the oldest micro-batch that is underway."""
        number = self._count - len(self._underway)
        oldest = self._underway.popleft()
        oldest.received.wait()
        oldest.output.backward(oldest.gradient)
        oldest.sent.wait()
        self._update_after(number)

    def _last(self, version: nn.Module, y: Tensor) -> None:
        while len(self._inputs) <= self.micro:  # They travel while this process computes.
            (tensor,) = self.layouts.empty(y.device)
            self._inputs.append((tensor, dist.irecv(tensor, 0)))
        h, received = self._inputs.popleft()
        received.wait()
        (self.criterion(version(h.requires_grad_()), y) / self.micro).backward()
        assert h.grad is not None
        if len(self._sent) > self.micro:
            self._sent.popleft()[1].wait()
        self._sent.append((h.grad, dist.isend(h.grad, 0)))
        self._update_after(self._count)

    def _update_after(self, number: int) -> None:
        """Takes an optimizer step if this micro-batch is the last of its batch. The version that the batch had is not
        underway any more, and becomes the newest."""
        batch, place = divmod(number, self.micro)
        if place < self.micro - 1:
            return
        newest, version = (list(module.parameters()) for module in (self.half, self.versions[batch % 2]))
        for parameter, old in zip(newest, version, strict=True):
            parameter.grad, old.grad = old.grad, None
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for parameter, old in zip(newest, version, strict=True):
                old.copy_(parameter)

    @staticmethod
    def _wait(messages: deque[tuple[Tensor, Any]]) -> None:
        for _, work in messages:
            work.wait()
        messages.clear()
