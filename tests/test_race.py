"""The race over slow links: what its ways learn, which runs it wants, and what is made of its curves and times."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import common
import draw_pictures
import fill_tables
import loop
import pytest
import race
import race_tables
import race_ways
import torch
from torch.nn import functional as F

import localgrad as lg
from localgrad.run import data as data_room
from localgrad.run.recipe import Recipe, settle
from localgrad.run.recipes import RECIPES
from localgrad.run.tables import write_csv
from localgrad.run.train import train

Row = dict[str, str]
BASE = RECIPES["fashion_small"]()
MACHINE = {"torch": "2", "machine": "one", "threads": "1"}


def step(link: int, way: str, blocks: int, micro: int, seconds: float) -> Row:
    values = (link, way, blocks, micro, seconds)
    return (
        dict(zip(("link_ms", "way", "blocks", "micro_batches", "step_seconds"), map(str, values), strict=True))
        | MACHINE
    )


def curve(way: str, blocks: int, micro: int, seed: int, errors: str) -> Row:
    names = ("way", "blocks", "micro_batches", "seed", "errors", "epochs", "steps_per_epoch")
    values = (way, blocks, micro, seed, errors, len(errors.split()), 10)
    return dict(zip(names, map(str, values), strict=True))


# At 0 ms the slowest way takes 1.2 s for a step, so 72 s for six epochs. At 100 ms that is 1F1B.
STEPS = [
    step(0, "bp", 1, 1, 1.2),
    step(0, "1f1b", 1, 2, 0.79), step(0, "1f1b", 1, 4, 0.77), step(0, "1f1b", 1, 8, 1.0),
    step(0, "1c1f@4", 2, 1, 0.7),
    step(100, "bp", 1, 1, 1.2),
    step(100, "1f1b", 1, 2, 2.4), step(100, "1f1b", 1, 4, 3.0), step(100, "1f1b", 1, 8, 4.0),
    step(100, "1c1f@4", 2, 1, 0.7),
]  # fmt: skip
CURVES = [
    curve("bp", 1, 1, 0, "30 20 15 12 11 10"), curve("bp", 1, 1, 1, "32 22 17 14 13 12"),
    curve("bp", 1, 2, 0, "31 21 16 13 12 11"), curve("bp", 1, 2, 0, "40 30 24 19 15 12 10.5 10.4 10.4"),
    curve("1c1f@4", 2, 1, 0, "28 19 15 12.5 11.6 11.4"),
    curve("1c1f@4", 2, 1, 0, "40 30 25 21 17 15 12 10 9.5"),
    curve("1c1f@4", 2, 1, 0, "41 31 26 22 18 16 14 13 11 10 9.8 9.7"),
]  # fmt: skip


@pytest.fixture
def rows() -> list[Row]:
    return [{name: str(value) for name, value in row.items()} for row in race_tables.joined(CURVES, STEPS)]


def ways(rows: list[Row], link: str) -> dict[str, list[Row]]:
    return race_tables.ways_of(rows, link)


# What is learned


def test_the_best_settings_are_those_of_the_recipes() -> None:
    for blocks in (2, 4):
        assert settle(race_ways.recipe_of(BASE, "1c1f@4", blocks, 1)) == RECIPES[f"fashion_small_k{blocks}"]()


def test_each_way_that_is_timed_is_learned() -> None:
    micro_batches = (1, 2)
    learned = race_ways.all_learned(micro_batches)
    for name, blocks, micro in race_ways.timed(micro_batches):
        assert (race_tables.learned_as(name), blocks, micro) in learned
        assert name in race_tables.NAMES
        assert name in draw_pictures.RACERS
    for name, blocks, micro in learned:
        recipe = race_ways.recipe_of(BASE, name, blocks, micro)
        assert settle(recipe) == recipe
        assert recipe.batch_size * recipe.accumulate == BASE.batch_size
        assert recipe.cut == 1 if blocks == 1 else len(recipe.blocks.split(",")) == blocks - 1
        assert recipe.lag == (lg.least_lag() if name == "man" else 0)


def test_two_replicas_have_the_mean_of_their_gradients_and_the_statistics_of_the_first() -> None:
    source = torch.Generator().manual_seed(0)
    x = torch.randn(6, 3, 8, 8, dtype=torch.float64, generator=source)
    y = torch.randint(4, (6,), generator=source)

    def network() -> lg.LocalModel:
        torch.manual_seed(1)
        return lg.localize(lg.build("resnet20", classes=4).double(), blocks=1, method=lg.bp(), example=x)

    both = [network().backbone.train() for _ in range(2)]
    for module, rows in zip(both, (slice(0, 3), slice(3, 6)), strict=True):
        F.cross_entropy(module(x[rows]), y[rows]).backward()
    model = network()
    race_ways.replicated(model, x, y, None)
    for parameter, *others in zip(model.backbone.parameters(), *(module.parameters() for module in both), strict=True):
        mean = torch.stack([p.grad for p in others if p.grad is not None]).mean(0)
        torch.testing.assert_close(parameter.grad, mean, rtol=1e-9, atol=1e-11)
    found, expected = dict(model.backbone.named_buffers()), dict(both[0].named_buffers())
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_the_loop_of_the_curves_learns_what_the_command_learns(tmp_path: Path) -> None:
    """With a lag, to the same bits as blocks that step as they go. A pipeline equals those (see test_pipeline.py)."""
    recipe = Recipe(
        model="resnet20", data="digits", limit_train=160, blocks="3", head="1c2f", lag=2, epochs=2, batch_size=32,
        momentum=0.5, precision="float32", step_as_you_go=True,
    )  # fmt: skip
    train(recipe, tmp_path / "run")
    rows = common.read_csv(tmp_path / "run" / "summary.csv")
    commanded = [f"{100 - float(row['eval_top1']):.2f}" for row in rows]
    data = data_room.load("digits", limit_train=160, seed=0)
    found = loop.train(replace(recipe, step_as_you_go=False), data, every_epoch=True)
    assert found["errors"].split() == commanded
    assert commanded[-1] == found["error"]


# What is to be trained


def test_the_best_number_of_micro_batches_is_the_smallest_fast_one() -> None:
    best = race_tables.chosen(STEPS)
    assert [row["micro_batches"] for row in best if row["way"] == "1f1b"] == ["2", "2"]
    slower = [row | {"step_seconds": "0.9"} if row["micro_batches"] == "2" else row for row in STEPS[:5]]
    assert [row["micro_batches"] for row in race_tables.chosen(slower) if row["way"] == "1f1b"] == ["4"]


def test_each_way_has_the_longest_schedule_that_the_slowest_one_leaves_time_for() -> None:
    best = race_tables.chosen(STEPS)
    found = {(row["link_ms"], row["way"]): race_tables.epochs_in_time(row, best) for row in best}
    assert found == {
        ("0", "bp"): 6, ("0", "1f1b"): 9, ("0", "1c1f@4"): 9,
        ("100", "bp"): 12, ("100", "1f1b"): 6, ("100", "1c1f@4"): 12,
    }  # fmt: skip


def test_six_epochs_of_all_ways_come_first_and_equal_runs_once(tmp_path: Path) -> None:
    settings = race.Settings(results=tmp_path, seeds=(0, 1))
    without = race.runs_of(settings)
    assert {run[:3] for run in without} == set(race_ways.all_learned(settings.micro_batches))
    assert {run[3] for run in without} == {6}
    write_csv(tmp_path / race.STEPS, STEPS)
    runs = race.runs_of(settings)
    names = [("bp", 1, 1), ("bp", 1, 2), ("1c1f@4", 2, 1)]
    assert runs[:6] == [(*name, 6, seed) for seed in (0, 1) for name in names]
    longer = {("bp", 1, 2, 9), ("1c1f@4", 2, 1, 9), ("bp", 1, 1, 12), ("1c1f@4", 2, 1, 12)}
    assert [run[-1] for run in runs[6:]] == [0] * 4 + [1] * 4
    assert {run[:-1] for run in runs[6:]} == longer


def test_a_link_is_timed_anew_if_a_way_has_no_row(tmp_path: Path) -> None:
    settings = race.Settings(results=tmp_path, links=(0, 10), micro_batches=(1, 2))
    assert race.missing_links(settings) == (0, 10)
    done = [step(link, *name, 1.0) for link in (0, 10) for name in race_ways.timed((1, 2))]
    write_csv(tmp_path / race.STEPS, done[:-1])
    assert race.missing_links(settings) == (10,)
    write_csv(tmp_path / race.STEPS, done)
    assert race.missing_links(settings) == ()


def test_an_unknown_part_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no part 'step': take steps, rates, curves"):
        race.main(race.Settings(results=tmp_path, parts="step"))


# What follows


def test_curves_and_times_are_joined(rows: list[Row]) -> None:
    bp = ways(rows, "0")["BP, one process"]
    assert [row["seconds"] for row in bp] == ["12.0", "24.0", "36.0", "48.0", "60.0", "72.0"]
    assert [(row["error_mean"], row["error_std"], row["n"]) for row in bp[::5]] == [
        ("31.000", "1.414", "2"),
        ("11.000", "1.414", "2"),
    ]
    assert {row["limit"] for row in rows if row["link_ms"] == "0"} == {"72.0"}
    assert {row["limit"] for row in rows if row["link_ms"] == "100"} == {"144.0"}

    def lengths(link: str, name: str) -> list[int]:
        return [len(curve) for curve in race_tables.curves_of(ways(rows, link)[name])]

    assert lengths("0", "DGL, 1c1f@4, K=2") == [6, 9]  # There is no time for twelve.
    assert lengths("100", "DGL, 1c1f@4, K=2") == [6, 9, 12]
    assert lengths("100", "BP, 1F1B") == [6]


def test_the_time_to_an_error_is_that_of_the_quickest_curve(rows: list[Row]) -> None:
    local = ways(rows, "0")["DGL, 1c1f@4, K=2"]
    assert race_tables.seconds_to(local, 12.5) == 28.0  # after the fourth of six epochs
    assert race_tables.seconds_to(local, 10.0) == 56.0  # after the eighth of nine
    assert race_tables.seconds_to(local, 9.0) is None


def test_the_error_at_a_moment_is_that_of_the_last_test(rows: list[Row]) -> None:
    curves = race_tables.curves_of(ways(rows, "0")["DGL, 1c1f@4, K=2"])
    assert race_tables.error_at(curves, 6.9) is None
    assert race_tables.error_at(curves, 7.0) == race_tables.error_at(curves, 13.9) == 28.0
    assert race_tables.error_at(curves, 55.9) == 11.4
    assert race_tables.error_at(curves, 1000.0) == 9.5


def test_the_lead_is_a_share_of_the_time_in_which_both_were_tested() -> None:
    def points(*pairs: tuple[float, float]) -> list[Row]:
        return [{"seconds": str(seconds), "error_mean": str(error)} for seconds, error in pairs]

    ours, theirs = points((1, 30), (2, 20), (6, 10)), points((4, 15), (8, 5))
    # From 4 s to 6 s they are ahead, from 6 s to 8 s we are, and then they are.
    assert race_tables.lead([ours], [theirs], 10.0) == pytest.approx(2 / 6)
    assert race_tables.lead([theirs], [ours], 10.0) == pytest.approx(4 / 6)
    assert race_tables.lead([ours], [], 10.0) is None
    assert race_tables.lead([ours], [theirs], 4.0) is None


def test_the_section_tells_who_is_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[Row]) -> None:
    for module in (common, race_tables, draw_pictures):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    page = "before\n<!-- race:begin -->\nold\n<!-- race:end -->\nafter\n"
    assert fill_tables.filled(page) == "before\n<!-- race:begin -->\n\n<!-- race:end -->\nafter\n"
    assert not draw_pictures.is_there("race")
    (tmp_path / "results").mkdir()
    write_csv(tmp_path / "results" / "race.csv", rows)
    text = fill_tables.filled(page)
    assert "takes 72 s for 6 epochs. First at 13.0%: DGL, 1c1f@4, K=2 after 28 s, then BP, 1F1B after 32 s." in text
    assert "First at 11.5%: DGL, 1c1f@4, K=2 after 42 s, then BP, 1F1B after 47 s." in text
    assert "| 0 | BP, 1F1B | 2 | 790 | 9 | 21.0 | 13.0 | 10.40 | 1 | 32 | 47 |" in text
    assert "| 100 | BP, one process |  | 1200 | 6 | 16.0 | 11.0 | 11.00 ± 1.41 | 2 | 48 | 72 |" in text
    assert draw_pictures.is_there("race")
    figure = draw_pictures.race()
    figure.savefig(tmp_path / "race.svg")
    panels = figure.axes
    assert [axes.get_title() for axes in panels] == ["messages 0 ms late", "messages 100 ms late"]
    assert [len(axes.containers) for axes in panels] == [3, 3]


def test_before_backpropagation_is_trained_no_level_is_told(rows: list[Row]) -> None:
    others = [row for row in rows if row["way"] != "bp"]
    assert race_tables.levels_of(others) == []
    assert "First" not in race_tables.told(others, "0")
    assert "s to" not in race_tables.compared(others)
