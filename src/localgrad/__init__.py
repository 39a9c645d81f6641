"""localgrad: train a deep network as gradient-isolated blocks with momentum auxiliary networks.

    import localgrad as lg
    model = lg.localize(backbone, blocks=4, method=lg.dgl(), coupling=lg.MAN(), example=x)
    out = lg.local_backward(model, x, y)

A name is imported from its module when it is first used, so `import localgrad` alone does not load PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from localgrad.core.as_loss import LossResult, as_loss
    from localgrad.core.auxiliary import Auxiliary, Method, Site, Term
    from localgrad.core.backbones import CifarResNet, build
    from localgrad.core.blocks import Block, Unit, units
    from localgrad.core.boundary import Boundary
    from localgrad.core.couplings import MAN, DeepMAN, MANPlusPlus, update_ema
    from localgrad.core.engine import BlockResult, StepResult, block_steps, local_backward
    from localgrad.core.errors import RunError, UserError
    from localgrad.core.groups import param_groups
    from localgrad.core.language_model import LanguageModel, Readout
    from localgrad.core.methods import auglocal, bp, dgl, infopro, infopro_weights, lopt, predsim
    from localgrad.core.model import LocalModel, localize
    from localgrad.core.task import Classification, Segmentation, Task
    from localgrad.run.text import Text, read_text
    from localgrad.scale.fit import Fit, fit
    from localgrad.scale.memory import PeakBytes, measure_peak, predict_peak
    from localgrad.scale.pipeline import Stage, least_lag
    from localgrad.scale.plan import Planner, plan
    from localgrad.scale.planned import Plan
    from localgrad.scale.recompute import recompute
    from localgrad.scale.replicas import Replicas, SyncBatchNorm, sync_batch_norm
    from localgrad.scale.shards import gather, shard
    from localgrad.scale.shares import block_seconds, shares_of
    from localgrad.scale.speed import Speed, calibrate

_NAMES_OF = {
    "core.as_loss": ("LossResult", "as_loss"),
    "core.auxiliary": ("Auxiliary", "Method", "Site", "Term"),
    "core.backbones": ("CifarResNet", "build"),
    "core.blocks": ("Block", "Unit", "units"),
    "core.boundary": ("Boundary",),
    "core.couplings": ("DeepMAN", "MAN", "MANPlusPlus", "update_ema"),
    "core.engine": ("BlockResult", "StepResult", "block_steps", "local_backward"),
    "core.errors": ("RunError", "UserError"),
    "core.groups": ("param_groups",),
    "core.model": ("LocalModel", "localize"),
    "core.language_model": ("LanguageModel", "Readout"),
    "core.methods": ("auglocal", "bp", "dgl", "infopro", "infopro_weights", "lopt", "predsim"),
    "core.task": ("Classification", "Segmentation", "Task"),
    "run.text": ("Text", "read_text"),
    "scale.fit": ("Fit", "fit"),
    "scale.memory": ("PeakBytes", "measure_peak", "predict_peak"),
    "scale.pipeline": ("Stage", "least_lag"),
    "scale.plan": ("Planner", "plan"),
    "scale.planned": ("Plan",),
    "scale.recompute": ("recompute",),
    "scale.replicas": ("Replicas", "SyncBatchNorm", "sync_batch_norm"),
    "scale.shards": ("gather", "shard"),
    "scale.shares": ("block_seconds", "shares_of"),
    "scale.speed": ("Speed", "calibrate"),
}
_MODULE_OF = {name: module for module, names in _NAMES_OF.items() for name in names}

__all__ = [  # noqa: RUF022 (in the order of the modules)
    "LossResult", "as_loss", "Auxiliary", "Method", "Site", "Term", "CifarResNet", "build", "Block", "Boundary", "Unit",
    "units",
    "DeepMAN", "MAN", "MANPlusPlus", "update_ema", "BlockResult", "LocalModel", "StepResult", "block_steps",
    "local_backward", "localize", "param_groups", "RunError", "UserError", "auglocal", "bp", "dgl", "infopro",
    "infopro_weights", "predsim", "Classification", "Segmentation", "Task", "Fit", "fit", "PeakBytes", "measure_peak",
    "predict_peak", "Stage", "block_seconds", "least_lag", "shares_of", "Plan", "Planner", "plan", "recompute",
    "Replicas", "SyncBatchNorm", "sync_batch_norm", "gather", "shard", "Speed", "calibrate",
    "LanguageModel", "Readout", "lopt", "Text", "read_text",
]  # fmt: skip


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'localgrad' has no attribute '{name}'")
    return getattr(importlib.import_module(f"localgrad.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
