"""Language models: the next token as a task, its loss in chunks, and readouts that are their own or shared."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from localgrad.core.boundary import Boundary, full_precision
from localgrad.core.errors import UserError
from localgrad.core.sharded import whole

CHUNK = 256  # With fewer tokens in a chunk, reading a wide readout from memory takes longer than computing with it.
COPIED = 8  # By chance, this many targets may equal the inputs at their places.


class Unread(NamedTuple):
    """What logits are made of: `features @ weight.T + bias`. The loss makes them a chunk of tokens at a time.

    Attributes:
        features: [B, L, width].
        weight: [vocabulary, width].
        bias: [vocabulary], or None.
    """

    features: Tensor
    weight: Tensor
    bias: Tensor | None

    def logits(self) -> Tensor:
        """The logits of all tokens at once, [B, L, vocabulary]."""
        return F.linear(*self)


class Readout(nn.Linear):
    """The last layer of a language model, `nn.Linear` to the vocabulary, which makes no logits while it is trained.

    In training mode it returns `Unread`, from which the loss makes the logits in chunks, and in evaluation mode the
    logits. It may be tied to an embedding: `readout.weight = embedding.weight`.
    """

    def forward(self, input: Tensor) -> Any:
        made = Unread(input, self.weight, self.bias)
        return made if self.training else made.logits()


@dataclass(frozen=True, eq=False)
class _Reference:
    """A module of the backbone. A copy of a whole model refers to its own backbone, a copy of a part to this one."""

    module: nn.Module

    def __deepcopy__(self, memo: dict) -> _Reference:
        return _Reference(memo.get(id(self.module), self.module))


class SharedReadout(nn.Module):
    """A read-only copy of the readout or of the embedding of a network, refreshed every n steps of the optimizer.

    Source: SOLO (arXiv 2609.35440), where the heads predict through the readout of the last block.

    Args:
        source: The module to copy. It has a weight [vocabulary, width] and may have a bias.
        every: The number of steps n.

    Attributes:
        source: That module, which is the backbone's.
        turn: The number of steps so far, which is saved and loaded with the state. To read it from a tensor would make
            the device wait.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, source: nn.Module, every: int) -> None:
        super().__init__()
        self.source, self.every, self.turn = _Reference(source), every, 0
        bias = cast("Tensor | None", getattr(source, "bias", None))
        self.register_buffer("weight", cast(Tensor, source.weight).detach().clone())
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def forward(self, h: Tensor) -> Any:
        made = Unread(h, self.weight, self.bias)
        return made if self.training else made.logits()

    def follow(self) -> None:
        """Copies the source after every so many calls. It is called once for each step of the optimizer."""
        if self.turn % self.every == 0:
            self._copy()
        self.turn += 1

    def restart(self) -> None:
        """Copies the source and begins to count anew."""
        self._copy()
        self.turn = 0

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.turn)

    def set_extra_state(self, state: Tensor) -> None:
        self.turn = int(state)

    @torch.no_grad()
    def _copy(self) -> None:
        source = cast(Any, self.source.module)
        self.weight.copy_(whole(source.weight))
        if self.bias is not None:
            self.bias.copy_(whole(source.bias))

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, every={self.every}"


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """The task of a language model: the cross-entropy of the next token, mean over the tokens that count.

    Inputs are tokens, int64 [B, L], and targets the tokens that follow each of them, int64 [B, L]. The network gives
    logits [B, L, vocabulary], alone or as "logits" of a dictionary, or it ends in `Readout`. A head is a layer norm and
    a readout, whatever head a method names.

    Attributes:
        vocabulary: The number of tokens, at least 2.
        shared: The module of the network whose weight all heads read, its readout or its embedding. They get a copy of
            it that they do not train: one that several blocks trained would not be isolated. Default: each head has a
            readout of its own.
        every: The copy is refreshed every so many steps of the optimizer. Default: 10, as SOLO takes 10 to 50.
        ignore_index: The value of targets that do not count, such as those of padding. Default: -100, as in PyTorch.

    Raises:
        UserError: A number is out of its range, the ignored value is a token, or `shared` has no weight [vocabulary,
            width].
    """

    vocabulary: int
    shared: nn.Module | None = None
    every: int = 10
    ignore_index: int = -100

    def __post_init__(self) -> None:
        if self.vocabulary < 2 or self.every < 1:
            raise UserError(
                f"a language model takes 2 tokens or more and refreshes every 1 step or more, not {self.vocabulary} "
                f"and {self.every}"
            )
        if 0 <= self.ignore_index < self.vocabulary:
            raise UserError(
                f"ignore_index takes a value that is no token, and {self.ignore_index} is one of {self.vocabulary}"
            )
        weight = getattr(self.shared, "weight", None)
        if self.shared is not None and not (isinstance(weight, Tensor) and weight.ndim == 2):
            raise UserError("shared takes the readout or the embedding of the network, a module with one matrix")
        if isinstance(weight, Tensor) and len(weight) < self.vocabulary:
            raise UserError(f"shared has {len(weight)} tokens, and the vocabulary {self.vocabulary}")

    def __deepcopy__(self, memo: dict) -> LanguageModel:
        return replace(self, shared=memo.get(id(self.shared), self.shared))

    def criterion(self, output: Any, targets: Tensor) -> Tensor:
        """The cross-entropy in nats, mean over the tokens that count, or 0 if none does, of logits or of `Unread`."""
        return self._loss(output, targets) / self._counted(targets).clamp(min=1)

    def metrics(self, output: Any, targets: Tensor) -> dict[str, Tensor]:
        """Sums over the batch: "nats", the cross-entropy, and "tokens", how many of them count. See `scores`."""
        return {"nats": self._loss(output, targets).detach(), "tokens": self._counted(targets)}

    def scores(self, sums: Mapping[str, Any]) -> dict[str, float]:
        """What the sums of `metrics` over a text say.

        Returns:
            "loss": the cross-entropy of a token, in nats.
            "bits": bits a token, which are bits per byte where tokens are bytes.
            "perplexity": e to the cross-entropy of a token.
        """
        nats = float(sums["nats"]) / max(1.0, float(sums["tokens"]))
        return {"loss": nats, "bits": nats / math.log(2), "perplexity": math.exp(nats)}

    def check_output(self, gives: Any) -> None:
        """Raises UserError unless the network gives logits of the whole vocabulary or more, or what `Readout` gives.

        How many tokens a `Readout` knows is compared by the criterion.
        """
        match _logits(gives):
            case Unread():
                return
            case (int(), int() as count):
                self._check_count(count)
                return
        raise UserError(
            f"the backbone gives {gives} for a sample, and a language model takes logits [length, {self.vocabulary}], "
            "alone or as 'logits' of a dictionary: pass a criterion or a task of your own"
        )

    def _check_count(self, count: int) -> None:
        if count < self.vocabulary:
            raise UserError(
                f"the backbone gives {count} logits a token for a vocabulary of {self.vocabulary}: make it with "
                f"{self.vocabulary} outputs"
            )

    def check_inputs(self, x: Tensor, targets: Tensor) -> None:
        """Raises UserError if inputs are no tokens of the vocabulary, or if targets are a copy of them.

        Values are compared on the CPU only.
        """
        self._check("inputs", x)
        if isinstance(targets, Tensor) and x.device.type == targets.device.type == "cpu" and x.shape == targets.shape:
            counted = targets != self.ignore_index
            if bool((counted & (targets != x)).any()):
                return
            if int((counted[:, :-1] & (x[:, 1:] != x[:, :-1])).sum()) > COPIED:  # A repeated token follows itself.
                raise UserError(
                    "targets are a copy of the inputs, which a network learns by reading one token: give the token "
                    "behind each, x = tokens[:, :-1] and y = tokens[:, 1:]"
                )

    def check_targets(self, targets: Any) -> None:
        """Raises UserError unless targets are int64 [B, L], tokens of the vocabulary or the ignored value.

        Values are compared on the CPU only, because reading them from another device would make it wait.
        """
        if not isinstance(targets, Tensor) or targets.ndim != 2 or targets.dtype != torch.int64:
            found = f"{tuple(targets.shape)} {targets.dtype}" if isinstance(targets, Tensor) else f"{type(targets)}"
            raise UserError(f"targets must be the token behind each token, int64 [B, L], not {found}")
        if targets.device.type == "cpu":
            also = f"; {self.ignore_index} is a target that does not count"
            self._check("targets", targets[targets != self.ignore_index], also)

    def _check(self, what: str, tokens: Tensor, also: str = "") -> None:
        if tokens.is_floating_point() or tokens.device.type != "cpu" or not tokens.numel():
            return
        low, high = int(tokens.min()), int(tokens.max())
        if not 0 <= low <= high < self.vocabulary:
            raise UserError(
                f"{what} have tokens from {low} to {high}, and the vocabulary has those from 0 to "
                f"{self.vocabulary - 1}{also}"
            )

    def head(self, boundary: Boundary) -> nn.Module:
        """The head: [B, L, width] -> `Unread`.

        Raises:
            UserError: No tokens cross there, or they have another width than the shared readout.
        """
        if boundary.layout != "NLC":
            raise UserError(f"the heads of a language model read tokens [L, width], and {boundary.shape} crosses")
        if self.shared is None:
            return nn.Sequential(nn.LayerNorm(boundary.channels), self.output(boundary.channels))
        weight = cast(Tensor, self.shared.weight)
        width = weight.shape[1]
        if width != boundary.channels:
            raise UserError(
                f"the shared readout reads {width} features a token, and {boundary.channels} cross: leave shared out"
            )
        norm = nn.LayerNorm(width)
        if (
            not weight.is_meta
        ):  # Its scale is SOLO's temperature. An embedding of large numbers begins with small logits.
            nn.init.constant_(norm.weight, 1 / max(1.0, float(weight.detach().norm()) / len(weight) ** 0.5))
        return nn.Sequential(norm, SharedReadout(self.shared, self.every))

    def output(self, features: int) -> nn.Module:
        """The last layer of a head: [..., features] -> `Unread`."""
        return Readout(features, self.vocabulary, bias=False)

    def _counted(self, targets: Tensor) -> Tensor:
        """The number of targets that count."""
        return (targets != self.ignore_index).sum()

    def _loss(self, output: Any, targets: Tensor) -> Tensor:
        """The sum over all tokens that count of their cross-entropy, in nats, in float32 or wider.

        Raises UserError unless each token of the output has one target, and a logit for each token of the vocabulary.
        """
        output = _logits(output)
        rows, weight, bias = output if isinstance(output, tuple) else (output, None, None)
        self._check_count(rows.shape[-1] if weight is None else len(weight))
        tokens = tuple(rows.shape[:-1])
        if tuple(targets.shape) != tokens:
            raise UserError(
                f"targets of shape {tuple(targets.shape)} do not belong to an output for tokens of shape {tokens}: "
                "give the token behind each token of the inputs"
            )
        rows = full_precision(rows.flatten(0, -2))
        if weight is None:
            return F.cross_entropy(rows, targets.flatten(), reduction="sum", ignore_index=self.ignore_index)
        return next_token_loss(rows, weight, bias, targets.flatten(), self.ignore_index)


def _logits(output: Any) -> Any:
    """What a network gives, or the logits in it where it gives a dictionary, as those of transformers do."""
    return output["logits"] if isinstance(output, Mapping) and "logits" in output else output


def next_token_loss(
    features: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignored: int = -100
) -> Tensor:
    """Cross-entropy of `features @ weight.T + bias`, sum over the tokens that count, with few logits in memory.

    The logits of a chunk of tokens become their gradient in place, and that goes to the features and to the readout at
    once. A chunk has 256 tokens, or fewer if its logits would be larger than the readout, but at least as many as make
    its logits as large as all features. The product is computed in the dtype of the features.

    Args:
        features: [N, width].
        weight: [vocabulary, width].
        bias: [vocabulary], or None.
        targets: int64 [N].
        ignored: The value of targets that do not count.
    """
    weight, bias = weight.to(features.dtype), None if bias is None else bias.to(features.dtype)
    return cast(Tensor, _Chunks.apply(features, weight, bias, targets, ignored))


def plain_next_token_loss(
    features: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignored: int = -100
) -> Tensor:
    """The same as `next_token_loss`, from all logits at once."""
    return F.cross_entropy(F.linear(features, weight, bias), targets, reduction="sum", ignore_index=ignored)


class _Chunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignored: int
    ) -> Tensor:
        wanted = [t if need else None for t, need in zip((features, weight, bias), ctx.needs_input_grad, strict=False)]
        gradients = [None if t is None else torch.zeros_like(t) for t in wanted]
        loss = features.new_zeros(())
        rows = max(min(CHUNK, weight.shape[1]), features.numel() // len(weight))
        for start in range(0, len(features), rows):
            h, chosen = features[start : start + rows], targets[start : start + rows, None]
            left_out = chosen == ignored
            chosen = chosen.masked_fill(left_out, 0)
            logits = F.linear(h, weight, bias)
            logits.sub_(logits.amax(1, keepdim=True))
            picked = logits.gather(1, chosen)
            total = logits.exp_().sum(1, keepdim=True)
            loss += (total.log() - picked).masked_fill_(left_out, 0).sum()
            if any(ctx.needs_input_grad):  # Logits become their gradient, which is 0 where a token does not count.
                logits.div_(total.masked_fill_(left_out, math.inf))
                logits.scatter_add_(1, chosen, left_out.to(logits.dtype).sub_(1))
                _add(gradients, logits, h, weight, start)
            del logits
        ctx.gradients = gradients
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.gradients is None:
            raise UserError("the loss of a language model has one backward pass: leave retain_graph out")
        gradients, ctx.gradients = ctx.gradients, None  # They are scaled in place, to hold them once.
        return *(None if t is None else t.mul_(scale) for t in gradients), None, None


def _add(gradients: list[Tensor | None], of_logits: Tensor, h: Tensor, weight: Tensor, start: int) -> None:
    """Adds what a chunk gives to the gradients of features, weight and bias. None: that gradient is not wanted."""
    of_features, of_weight, of_bias = gradients
    if of_features is not None:
        torch.mm(of_logits, weight, out=of_features[start : start + len(h)])
    if of_weight is not None:
        of_weight.addmm_(of_logits.mT, h)
    if of_bias is not None:
        of_bias += of_logits.sum(0)
