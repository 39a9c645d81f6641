"""Text for language models: what is read, how it is divided, contexts by seed and number, and bad input."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import localgrad as lg


def text(size: int, context: int = 4) -> lg.Text:
    return lg.Text(torch.arange(size, dtype=torch.uint8), context)


def test_a_target_is_the_next_token_and_a_context_depends_on_seed_and_number_alone() -> None:
    whole = text(100)
    x, y = whole.batch(range(50), seed=3)
    assert x.dtype == y.dtype == torch.int64
    assert x.shape == y.shape == (50, 4)
    assert torch.equal(y, x + 1)
    assert torch.equal(whole.batch([7, 40], seed=3)[0], x[[7, 40]])
    assert not torch.equal(whole.batch(range(50), seed=4)[0], x)
    starts = whole.batch(range(4000))[0][:, 0]
    assert set(starts.tolist()) == set(range(96))
    assert torch.equal(text(5).batch(range(3))[1], torch.tensor([[1, 2, 3, 4]] * 3))


def test_windows_cover_the_text_once() -> None:
    batches = list(text(23).windows(2))
    assert [len(x) for x, _ in batches] == [2, 2, 1]
    assert torch.cat([y.flatten() for _, y in batches]).tolist() == list(range(1, 21))


def test_the_standard_library_is_divided_by_file() -> None:
    train, test = lg.read_text("stdlib", context=256)
    assert len(train.tokens) > 4e6
    assert 0.05 < len(test.tokens) / len(train.tokens) < 0.2
    again = lg.read_text("stdlib", context=8)[1]
    assert torch.equal(test.tokens, again.tokens)
    both = [bytes(part.tokens.numpy().tobytes()) for part in (train, test)]
    import argparse

    source = Path(argparse.__file__).read_bytes()
    assert [source in part for part in both].count(True) == 1
    assert not any(b"site-packages/torch" in part for part in both)


def test_a_folder_is_divided_by_the_names_of_its_files(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"{number % 3}").mkdir(exist_ok=True)
        (tmp_path / f"{number % 3}" / f"{number}.txt").write_text(f"<{number}>" * 5)
    (tmp_path / ".hidden").write_text("hidden" * 100)
    parts = [part.tokens.numpy().tobytes().decode() for part in lg.read_text(tmp_path, context=8)]
    found = [{n for n in range(40) if f"<{n}>" in part} for part in parts]
    assert found[0] | found[1] == set(range(40))
    assert not found[0] & found[1]
    assert "hidden" not in "".join(parts)
    (tmp_path / "more.txt").write_text("more")
    more = [part.tokens.numpy().tobytes().decode() for part in lg.read_text(tmp_path, context=8)]
    assert [{n for n in range(40) if f"<{n}>" in part} for part in more] == found


def test_a_file_is_cut_after_nine_tenths(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(bytes(range(200)))
    train, test = lg.read_text(tmp_path / "a.txt", context=4)
    assert train.tokens.tolist() == list(range(180))
    assert test.tokens.tolist() == list(range(180, 200))


def test_a_few_files_are_cut_after_nine_tenths_where_a_part_would_be_too_short(tmp_path: Path) -> None:
    names = ("a", "b", "d")  # By their hashes, all three are to train on.
    for name in names:
        (tmp_path / f"{name}.txt").write_text(name * 66)
    whole = "\n".join(name * 66 for name in names).encode()
    train, test = lg.read_text(tmp_path, context=8)
    assert train.tokens.tolist() == list(whole[:180])
    assert test.tokens.tolist() == list(whole[180:])


def refused(source: str | Path, context: int) -> str:
    with pytest.raises(lg.UserError) as caught:
        lg.read_text(source, context=context)
    return str(caught.value)


def test_bad_input_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(bytes(200))
    assert refused(tmp_path / "a.txt", 20) == (
        "the text has 20 bytes, and a context of 20 takes 21 or more: give a longer text, or a shorter context"
    )
    assert "a context has 1 token or more, not 0" in refused(tmp_path / "a.txt", 0)
    assert "there is no text 'sdtlib': give the path" in refused("sdtlib", 4)
    (tmp_path / "few").mkdir()
    (tmp_path / "few/a.txt").write_bytes(bytes(200))
    assert "the text has 20 bytes, and a context of 20 takes 21 or more" in refused(tmp_path / "few", 20)
    (tmp_path / "empty").mkdir()
    assert "there is no file of text in" in refused(tmp_path / "empty", 4)
