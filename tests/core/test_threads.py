"""A trace leaves the other threads and the children of its process alone."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from small import Net, batch, resnet, vgg
from torch import Tensor, nn
from torch.nn import functional as F

import localgrad as lg
from localgrad.core.errors import UserError
from localgrad.core.threads import ONE_TRACE

CALL, GETATTR = nn.Module.__call__, nn.Module.__getattr__
X, Y = batch()


@contextmanager
def meanwhile(work: Callable[[], object]) -> Iterator[list[BaseException]]:
    """Another thread does `work` over and over, at least once. Gives what it raised."""
    over, once, raised = threading.Event(), threading.Event(), []

    def again() -> None:
        while not over.is_set():
            try:
                work()
            except BaseException as error:  # whatever it is, the test shows it
                raised.append(error)
                over.set()
            once.set()

    thread = threading.Thread(target=again)
    thread.start()
    try:
        once.wait()
        yield raised
    finally:
        over.set()
        thread.join()


def unchanged() -> bool:
    return nn.Module.__call__ is CALL and nn.Module.__getattr__ is GETATTR


def training() -> Callable[[], object]:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(144, 10))
    return lambda: F.cross_entropy(network(X), Y).backward()


def evaluation() -> Callable[[], object]:
    network: Any = resnet(20).eval()
    with torch.no_grad():
        expected = network(X)

    def serve() -> None:
        with torch.no_grad():
            assert torch.equal(network(X), expected)
        assert network.get_parameter("fc.weight") is network.fc.weight

    return serve


def drawing() -> Callable[[], object]:
    return lambda: (random.random(), np.random.rand(2), torch.rand(2))  # noqa: NPY002


def compiling() -> Callable[[], object]:
    def compiled() -> None:
        torch.compiler.reset()
        torch.compile(nn.Linear(3, 3), backend="eager")(torch.ones(2, 3))

    return compiled


@pytest.mark.parametrize("work", [training, evaluation, drawing, compiling])
def test_another_thread_goes_on_and_changes_no_cut(work: Callable[[], Callable[[], object]]) -> None:
    expected = lg.units(resnet(20), X)
    with meanwhile(work()) as raised:
        for _ in range(3):
            assert lg.units(resnet(20), X) == expected
    assert not raised
    assert unchanged()


def test_threads_may_cut_and_train_networks_of_their_own() -> None:
    def trial(backbone: nn.Module) -> list[str]:
        model = lg.localize(backbone, blocks=2, method=lg.dgl("0c1f"), coupling=lg.MAN(), example=X)
        lg.local_backward(model, X, Y)
        return [name for block in model.blocks for name in block.names]

    backbones = [resnet(20), vgg(), resnet(20), vgg(), resnet(32)]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(trial, backbones))
    assert found == [lg.units(backbone, X) for backbone in backbones]
    assert unchanged()
    assert nn.Linear(2, 2)(torch.ones(1, 2)).shape == (1, 2)


def test_a_trace_within_a_trace_does_not_wait_for_itself() -> None:
    class Curious(nn.Sequential):
        def forward(self, h: Tensor) -> Tensor:
            assert len(lg.units(vgg(), X)) == 4
            return super().forward(h)

    network = nn.Sequential(
        *(Curious(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1)) for _ in range(2)), nn.Flatten(), nn.Linear(192, 5)
    )
    assert lg.units(network, X) == ["0", "1"]
    assert unchanged()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_child_of_a_process_that_traces_is_whole() -> None:
    # Neither side draws: a fork while another thread draws leaves PyTorch's generator locked in the child.
    networks, module, x = [resnet(20) for _ in range(3)], nn.Flatten(), torch.ones(1, 2)

    def fork() -> None:
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            whole = unchanged() and ONE_TRACE.acquire(timeout=5)
            os._exit(0 if whole and module(x).shape == (1, 2) else 1)
        assert os.waitpid(child, 0)[1] == 0

    with meanwhile(fork) as raised:
        for network in networks:
            lg.units(network, X)
    assert not raised


@pytest.mark.parametrize("draw", [random.random, lambda: float(torch.rand(1)), lambda: float(np.random.rand())])  # noqa: NPY002
@pytest.mark.parametrize("work", [None, evaluation, drawing])
def test_what_a_forward_draws_is_told_from_what_others_draw(
    draw: Callable[[], float], work: Callable[[], Callable[[], object]] | None
) -> None:
    sentence = "it draws random numbers that do not follow its input"
    with meanwhile(work() if work else lambda: time.sleep(0.01)) as raised, pytest.raises(UserError, match=sentence):
        lg.units(Net(lambda net, h, x: h if draw() < 2 else -h), X)
    assert not raised


def test_a_layer_that_is_dropped_by_chance_is_found_beside_another_thread() -> None:
    dropped = Net(lambda net, h, x: h if random.random() < 0.5 else h + 1)
    with meanwhile(lambda: time.sleep(0.01)):
        for _ in range(8):
            with pytest.raises(UserError, match="it draws random numbers that do not follow its input"):
                lg.units(dropped, X)


def test_branches_in_threads_are_named() -> None:
    class Branches(Net):
        def body(self, h: Tensor, x: Tensor) -> Tensor:
            with ThreadPoolExecutor(2) as pool:
                return sum(pool.map(lambda unit: unit(h), self.units))  # pyright: ignore

    with pytest.raises(UserError, match="it runs its parts in threads of their own"):
        lg.units(Branches(), X)
