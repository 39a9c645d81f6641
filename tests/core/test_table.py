"""The table of a model."""

from __future__ import annotations

import re

from small import batch, local, resnet

import localgrad as lg


def test_the_table_shows_each_block() -> None:
    model = lg.localize(resnet(32), blocks=4, method=lg.infopro(), coupling=lg.DeepMAN(), example=batch()[0])
    title, header, *rows = str(model).splitlines()
    assert title == "CifarResNet, infopro, 4 blocks"
    assert header.split() == ["block", "units", "hands", "on", "auxiliary", "parameters", "auxiliary's", "MiB"]
    for k, (row, block) in enumerate(zip(rows, model.blocks, strict=True)):
        own = sum(p.numel() for p in block.parameters())
        extra = sum(p.numel() for p in model.auxiliaries[k].parameters()) if k < 3 else 0
        assert row.split()[0] == str(k)
        assert row.split()[-3:] == [f"{own:,}", f"{extra:,}", f"{4 * (own + extra) / 2**20:.2f}"]
    path = "DeepMAN(layer1.3, layer2.0, layer3.0) -> 0.5 classifier + 5 decoder"
    assert all(text in rows[0] for text in ("stem .. layer1.2 (4)", "16x8x8", path))
    assert "logits" in rows[3]


def test_the_table_shows_what_is_frozen_and_what_is_recomputed() -> None:
    network = resnet()
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name.startswith(("layer2", "layer3", "fc")) and name.endswith("bias"))
    model = lg.recompute(local(lg.MAN(), backbone=network), units=["layer2.1"])
    title, _, *rows = str(model).splitlines()
    beside = sum(p.numel() for p in model.auxiliaries.parameters() if p.requires_grad)
    biases = [7 * 32, 7 * 64 + 10]
    total = sum(p.numel() for p in network.parameters())
    assert title == (
        f"CifarResNet, dgl, 4 blocks, trained: {sum(biases)} of {total:,} parameters, and {beside:,} of the auxiliaries"
    )
    assert re.match(r"0 +stem .. layer1.0 \(2\), frozen +16x8x8 +none: frozen +\S+ +0 ", rows[0])
    assert re.match(r"2 +layer2.1 .. layer2.2 \(2\), 1 recomputed, 128 trained ", rows[2])
    assert re.match(r"3 +layer3.0 .. layer3.2 \(3\), 458 trained ", rows[3])
