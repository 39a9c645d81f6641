"""The steps of a traced network, and the tensors that flow between them: where it can be cut, and why not elsewhere.

A network can be cut behind a step if one tensor that depends on the input crosses there:

    x -> conv -> norm -> relu -+-> conv -> norm -+-> add -> relu -> fc -> out
                               |                 |
                               +-----------------+       no cut between these: two tensors cross

With `several=True` it can be cut where several tensors cross, too. Then the main one is the last that was made with
parameters, and the others are passengers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from localgrad.core.boundary import MAIN, Passenger
from localgrad.core.pairs import BATCHES
from localgrad.core.rebuild import Rebuild, base_of, name_of
from localgrad.core.steps import VALUE, WRITES, draws, has_tensor

Crossing = fx.Node | dict[str, fx.Node]  # The step whose tensor crosses, or several by name, the main one first.


class Flow:
    """The steps of a network, and the tensors that flow between them.

    Attributes:
        nodes: All steps, up to the last one whose value the network returns.
        output: The step that returns it.
        depends: The steps whose tensors depend on the input's values.
        steps: `depends` in order, the inputs first.
        entering: The input, or several by name, the main one first.
        index: The number of each step in `nodes`.
        last_use: The number of the last step that reads the tensor of a step.
        several: Whether several tensors may cross at a cut, and units may share a table of an embedding.
        shared: Pairs of steps that share parameters, the first and the last step that use them.
        learned: `depends` without those that no parameter has changed, such as a mask of the input.
    """

    def __init__(self, backbone: nn.Module, nodes: list[fx.Node], output: fx.Node, *, several: bool) -> None:
        last = max(nodes.index(node) for node in output.all_input_nodes)
        self.backbone, self.nodes, self.output, self.several = backbone, nodes[: last + 1], output, several
        self.depends = self._dependent()
        self.rebuild = Rebuild(backbone, self.nodes, self.depends)
        self.index, self.module = self.rebuild.index, self.rebuild.module
        self.steps = [node for node in self.nodes if node in self.depends]
        main, *others = [node for node in self.nodes if node.op == "placeholder"]
        self.entering: Crossing = {MAIN: main, **{n.name: n for n in others}} if others else main
        self.last_use = {
            node: max((self.index[u] for u in self._users(node)), default=self.index[node]) for node in self.steps
        } | dict.fromkeys(output.all_input_nodes, len(self.nodes))
        self.shared = self._shared()
        self.learned = self._learned()

    def _dependent(self) -> set[fx.Node]:
        """The steps that return tensors computed from the input's values, and those that must not run twice. A step
        that returns no tensor, such as a size or a device, is not among them."""
        found: set[fx.Node] = set()
        for node in self.nodes:
            made = node.op == "placeholder" or any(n in found for n in node.all_input_nodes)
            if (made or self._once(node)) and has_tensor(node.meta[VALUE]):
                found.add(node)
        return found

    def _once(self, node: fx.Node) -> bool:
        """Whether a step must not run twice, because it draws random numbers or changes the network."""
        held = [id(n.meta[VALUE][0]) for n in node.all_input_nodes if n.op == "get_attr"]
        if any(id(written) in held for written in node.meta[WRITES]):
            return True
        if node.op == "call_module":
            parts = self.backbone.get_submodule(name_of(node)).modules()
            return any(isinstance(m, _NormBase) or (isinstance(m, _DropoutNd) and m.p > 0) for m in parts)
        return draws(node.target)

    def _shared(self) -> list[tuple[fx.Node, fx.Node]]:
        """The first and the last step that use a parameter, for each parameter of a module that several steps use."""
        uses: dict[int, set[fx.Node]] = {}
        for node in self.steps:
            for parameter in (self.module(node) or nn.Identity()).parameters():
                uses.setdefault(id(parameter), set()).add(node)
        for node in self.steps:  # A step may also read the parameter of another step's module as a tensor.
            for parameter in self.rebuild.parameters_read(node) & uses.keys():
                uses[parameter].add(node)
        found = set()
        for parameter, nodes in uses.items():
            first, *others = sorted(nodes, key=self.index.__getitem__)
            if others and self.several and _is_table(parameter, self.module(first)):
                self.rebuild.tied.add(parameter)
            elif others:
                found.add((first, others[-1]))
        return list(found)

    def _users(self, node: fx.Node) -> Iterable[fx.Node]:
        """The steps of the chain that read what `node` returns."""
        return (u for u in node.users if u in self.depends and u in self.index)

    def _learned(self) -> set[fx.Node]:
        found: set[fx.Node] = set()
        for node in self.steps:
            own = has_parameters(self.module(node)) or bool(self.rebuild.parameters_read(node))
            if own or any(n in found for n in node.all_input_nodes):
                found.add(node)
        return found

    def crossing(self, after: int) -> list[fx.Node]:
        """The steps whose tensors are still needed behind step number `after`."""
        return [n for n in self.steps if self.index[n] <= after < self.last_use[n]]

    def leaving(self, after: int) -> Crossing | None:
        """What crosses behind step number `after`, or None if the network cannot be cut there.

        It can be cut if no parameters are used on both sides, and if one floating-point tensor crosses, whose first
        dimension is the batch.

        With `several`, others may cross beside it, which no later step may change in place.
        """
        crossing = self.crossing(after)
        if not crossing or any(self.index[a] <= after < self.index[b] for a, b in self.shared):
            return None
        if len(crossing) == 1:
            return crossing[0] if _is_main(crossing[0]) else None
        main = next((n for n in reversed(crossing) if n in self.learned and _is_main(n)), None)
        others = [n for n in crossing if n is not main]
        if not self.several or main is None or any(map(self._kept_back, others)) or self._overwritten(others, after):
            return None
        return {MAIN: main, **{n.name: n for n in others}}

    def _kept_back(self, node: fx.Node) -> bool:
        """Whether a step gives no tensor that could cross alone."""
        return not all(isinstance(value, Tensor) for value in node.meta[VALUE])

    def _overwritten(self, crossing: Iterable[fx.Node], after: int) -> fx.Node | None:
        """The first step behind number `after` that changes one of the tensors that cross in place."""
        bases = {id(base_of(n.meta[VALUE][0])) for n in crossing}
        later = (n for n in self.nodes[after + 1 :] for written in n.meta[WRITES] if id(base_of(written)) in bases)
        return next(later, None)

    def passengers(self, crossing: Crossing) -> tuple[Passenger, ...]:
        """Describes the tensors that cross beside the main one."""
        if isinstance(crossing, fx.Node):
            return ()
        return tuple(
            Passenger(name, _by_batch(node.meta[VALUE]), node.meta[VALUE][0].dtype, self.maker(node))
            for name, node in crossing.items()
            if name != MAIN
        )

    def reason(self, after: int) -> str:
        for a, b in self.shared:
            if self.index[a] <= after < self.index[b]:
                again = name_of(a) == name_of(b)
                return (
                    f"'{name_of(a)}' runs again" if again else f"'{name_of(b)}' shares parameters with '{name_of(a)}'"
                )
        crossing = self.crossing(after)
        others = [n for n in crossing if n is not self.nodes[after]]
        if not crossing:
            return "nothing crosses there"
        if others and (writer := self._overwritten(others, after)) is not None:
            maker = self.maker(others[0])
            return f"the tensor of '{maker}' is read later, and '{writer.name}' changes it in place before that"
        if not others:
            value = crossing[0].meta[VALUE][0]
            if isinstance(value, Tensor) and not value.is_floating_point():
                return (
                    f"a tensor of {str(value.dtype).removeprefix('torch.')} numbers crosses, and heads read real ones"
                )
            given = (
                f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            )
            return f"for {BATCHES[0]} samples {given} crosses, not one tensor whose first dimension is the samples"
        skips = self.maker(others[0])
        later = [u for u in self._users(others[0]) if self.index[u] > after]
        if not later:
            return f"the network gives the tensor of '{skips}' at its end"
        to = min(later, key=self.index.__getitem__)
        return f"the tensor of '{skips}' skips over it to '{name_of(to)}'"

    def maker(self, node: fx.Node) -> str:
        """The name of the module that made a step's tensor, or of the last module before it."""
        while node.op != "call_module" and any(n in self.depends for n in node.all_input_nodes):
            node = next(n for n in node.all_input_nodes if n in self.depends)
        return "the input" if node.op == "placeholder" else name_of(node)


def _is_main(node: fx.Node) -> bool:
    """Whether a step gives a floating-point tensor whose first dimension is the batch."""
    values = node.meta[VALUE]
    tensors = all(isinstance(v, Tensor) and v.ndim > 1 and v.is_floating_point() for v in values)
    return tensors and [len(v) for v in values] == list(BATCHES)


def _is_table(parameter: int, module: nn.Module | None) -> bool:
    """Whether a parameter, by its id, is the table of an embedding in a module."""
    parts = module.modules() if module is not None else ()
    return any(isinstance(part, nn.Embedding) and id(part.weight) == parameter for part in parts)


def _by_batch(values: tuple[Any, ...]) -> tuple[int, ...]:
    """The shape of a tensor that was made for each of BATCHES, as `Passenger.shape` has it."""
    first, other = (value.shape for value in values)
    return tuple(a if a == b else -(a // BATCHES[0]) for a, b in zip(first, other, strict=True))


def has_parameters(module: nn.Module | None) -> bool:
    """Whether a module, if there is one, has parameters."""
    return module is not None and next(module.parameters(), None) is not None
