"""What the benchmarks share: tables that go on where they stopped, and times of things that take turns."""

from __future__ import annotations

from pathlib import Path

from common import Table, medians_in_turn, seconds_of


def test_a_table_with_a_key_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path = tmp_path / "new" / "table.csv"
    Table(path, key=("name", "size")).add({"name": "a", "size": 1, "time": 5}, {"name": "a", "size": 1, "time": 6})
    table = Table(path, key=("name", "size"), same={"machine": "x, y"})
    assert ("a", 1) in table
    assert ("a", 2) not in table
    assert ("a", "1") in table
    table.add({"name": "a", "size": 2, "time": 7})
    assert path.read_bytes() == b'name,size,time,machine\na,1,5,\na,1,6,\na,2,7,"x, y"\n'
    table.add({"name": "a", "size": 1, "time": 8})  # takes the place of both rows of this key
    assert [row["time"] for row in Table(path, key=("name",)).rows] == ["7", "8"]


def test_a_table_without_a_key_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("old\n1\n")
    table = Table(path)
    assert path.read_text() == "old\n1\n"  # until there is a row
    for i in range(2):
        table.add({"new": i})
    assert path.read_bytes() == b"new\n0\n1\n"


def test_things_to_compare_take_turns_and_the_warm_up_does_not_count() -> None:
    calls: list[str] = []

    def timer(name: str, values: list[float]) -> float:
        calls.append(name)
        return values.pop(0)

    first, second = [100.0, 1.0, 9.0, 2.0], [100.0, 4.0, 6.0, 5.0]
    medians = medians_in_turn([lambda: timer("a", first), lambda: timer("b", second)], repeats=3, warm_up=1)
    assert medians == [2.0, 5.0]
    assert calls == ["a", "b"] * 4
    assert 0 <= seconds_of(lambda: None) < 1
