"""The command line as a person meets it: help, each command, and one sentence for each mistake."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.onnx
from tiny import QUICK

import localgrad as lg
from localgrad.cli import COMMANDS, _warnings_shown, main
from localgrad.core.errors import UserError
from localgrad.run.arguments import Compare, parse_changes
from localgrad.run.compare import grid
from localgrad.run.folder import summary_rows
from localgrad.run.recipe import Recipe, Saving, read_recipe
from localgrad.run.train import train

Fails = Callable[..., str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "run"
    assert main(["train", *QUICK, "--out", str(folder)]) == 0
    return folder


def test_help_is_quick_and_loads_no_torch() -> None:
    probe = (
        "import sys, time; start = time.perf_counter()\n"
        "from localgrad.cli import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules\n"
        "print(time.perf_counter() - start, file=sys.stderr)"
    )
    command = [sys.executable, "-c", probe]
    tries = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(3)]
    assert min(float(t.stderr) for t in tries) < 0.5
    assert "--coupling" in tries[0].stdout


@pytest.mark.parametrize("argv", [["--help"], *[[name, "--help"] for name in COMMANDS]])
def test_help(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(SystemExit):  # tyro ends a subcommand's help this way
        main(argv)
    assert "usage: localgrad" in capsys.readouterr().out


def test_the_flags_of_train_are_the_recipe_and_what_stays_out_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = set(re.findall(r"--((?!no-)[a-z][a-z-]*)", capsys.readouterr().out))
    fields = {f.name.replace("_", "-") for kind in (Recipe, Saving) for f in dataclasses.fields(kind)}
    others = "out tensorboard budget nproc pipeline shard restarts rank-timeout help recipe plan"
    assert shown == fields | {*others.split()}


def test_eval_agrees_with_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(run)]) == 0
    out = capsys.readouterr().out
    assert f"top1 {summary_rows(run)[-1]['eval_top1']:.2f}%" in out
    assert "360 images of digits, float32" in out


def test_a_finished_run_is_not_trained_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "model.safetensors").stat().st_mtime_ns
    assert main(["train", *QUICK, "--out", str(run)]) == 0
    assert "finished" in capsys.readouterr().out
    assert (run / "model.safetensors").stat().st_mtime_ns == before


def test_a_config_file_is_a_recipe(run: Path, tmp_path: Path) -> None:
    assert main(["train", "--recipe", str(run / "config.yaml"), "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()


def test_export_safetensors(run: Path, tmp_path: Path) -> None:
    assert main(["export", str(run), "--out", str(tmp_path / "w.safetensors")]) == 0
    assert (tmp_path / "w.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()


def test_list_shows_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    for word in ("auglocal", "deep-man", "1c2f", "resnet1202", "timm:NAME", "fashion_small", "digits", "scikit-learn"):
        assert word in out


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--model", "resnet33"], "did you mean 'resnet32'"),
        (["--model", "timm:resnet11"], "did you mean 'timm:resnet"),
        (["--model", "torchvision:resnet51"], "did you mean 'torchvision:resnet"),
        (["--method", "infpro"], "did you mean 'infopro'"),
        (["--coupling", "deepman"], "did you mean 'deep-man'"),
        (["--head", "1c"], "unknown head '1c'"),
        (["--data", "digit"], "did you mean 'digits'"),
        (["--recipe", "fashion"], "did you mean 'fashion_small'"),
        (["--recipe"], "--recipe takes a name"),
        (["--recipe", "nowhere.yaml"], "no recipe at nowhere.yaml"),
        (["--blocks", "5"], "so 1 to 4"),
        (["--blocks", "0"], "out of range"),
        (["--blocks", "layer1.9"], "did you mean 'layer1."),
        (["--blocks", "layer2.0,layer1.0"], "in their order"),
        (["--data", "cifar10", "--data-dir", "nowhere"], "nowhere"),
        (["--image-size", "32"], "8"),
        (["--limit-train", "5"], "5"),
        (["--init", "nowhere.safetensors"], "no checkpoint at nowhere.safetensors"),
        (["--batch-size", "1"], "at least 2"),
        (["--model-args", "depth"], "takes NAME=VALUE split by commas, not 'depth'"),
        (["--model-args", "depth="], "takes NAME=VALUE split by commas, not 'depth='"),
        (["--model-args", "a=[1,b=2"], "takes NAME=VALUE split by commas, not 'a=[1,b=2'"),
        (["--model-args", "in_channels=1"], "cannot set in_channels: the model and the data tell it"),
        (["--model-args", "wide=2"], "'resnet8' cannot be built with wide=2"),
        (["--accumulate", "99"], "more than the training set holds"),
        (["--model-args", "num_classes=3"], "cannot set num_classes: the model and the data tell it"),
        (["--model-args", "pretrained=true"], "weights come from --init FILE"),
        (["--model-args", "weights=DEFAULT", "--model", "torchvision:resnet18"], "weights come from --init FILE"),
        (["--init", "."], ". is a folder: name the file of weights in it"),
        (["--init=~/nowhere.pth"], "no checkpoint at home/nowhere.pth"),
        (["--recipe=~/nowhere.yaml"], "no recipe at home/nowhere.yaml"),
        (["--plan", "~/nowhere.yaml"], "home/nowhere.yaml holds no plan"),
        (["--freeze", "stem,layer1.1"], "unknown unit 'layer1.1': did you mean 'layer1.0'? (layer1.0, layer2.0, lay"),
        (["--freeze", "layer2.0:stem"], "'layer2.0:stem' runs backwards: 'stem' comes first"),
        (["--backbone-lr", "-1"], "backbone_lr must be at least 0"),
    ],
)
def test_mistakes_get_one_sentence(
    flags: list[str], says: str, tmp_path: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "home")
    base = [] if "--recipe" in flags else QUICK
    assert says in fails("train", *base, "--out", "run", *flags)
    assert list(tmp_path.iterdir()) == []


def test_mistakes_of_other_commands(run: Path, tmp_path: Path, fails: Fails) -> None:
    assert "did you mean 'train'" in fails("trian")
    assert "is no run folder" in fails("eval", str(tmp_path))
    assert "different run" in fails("train", *QUICK, "--lr", "0.7", "--out", str(run))
    assert "cannot write" in fails("export", str(run), "--out", str(tmp_path / "no" / "w"))
    for command in (["export", str(run)], ["export", str(run), "--format", "onnx"], ["plan", "--model", "resnet20"]):
        assert "is a folder: name a file with --out" in fails(*command, "--out", str(tmp_path))
    assert "image_size must be at least 1, not -3" in fails("plan", "--image-size", "-3")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.yaml").write_text((run / "config.yaml").read_text())
    assert "not finished" in fails("eval", str(tmp_path / "half"))
    (tmp_path / "half" / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes()[:1000])
    assert "is damaged" in fails("eval", str(tmp_path / "half"), code=3)


def test_a_wrong_flag_is_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "--epoch", "3"])
    assert stop.value.code == 2
    assert "--epochs" in capsys.readouterr().err


def test_an_init_of_another_network_is_refused(run: Path, tmp_path: Path, fails: Fails) -> None:
    init = ["--init", str(run / "model.safetensors"), "--model", "resnet32"]
    assert "does not fit this backbone" in fails("train", *QUICK, *init, "--out", tmp_path / "r")


def test_a_command_says_each_warning_once(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        show = _warnings_shown()
        for text in ("a", "b", "a"):
            show(UserWarning(text), UserWarning, "file", 1)
        assert capsys.readouterr().err == "localgrad: warning: a\nlocalgrad: warning: b\n"


def test_a_run_starts_from_weights_for_other_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The note is of the start alone: a run that goes on has its own classifier."""
    weights = lg.build("resnet8", classes=1000, in_channels=1).state_dict()
    torch.save({"state_dict": {f"module.{n}": t for n, t in weights.items()}}, tmp_path / "w.pth")
    command = ["train", *QUICK, "--init", str(tmp_path / "w.pth"), "--out", str(tmp_path / "r")]
    assert main(command) == 0
    note = f"the classifier of {tmp_path / 'w.pth'} is left out (fc.weight 1000x64, fc.bias 1000)"
    assert note in capsys.readouterr().out
    assert note in (tmp_path / "r" / "metrics.jsonl").read_text()
    assert main([*command, "--epochs", "2"]) == 0
    said = capsys.readouterr().out
    assert "going on from" in said
    assert note not in said


@pytest.mark.parametrize("spelt", ["~", pytest.param("~{user}", marks=pytest.mark.slow)])
def test_a_tilde_is_the_home_folder(
    spelt: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In every path, behind --flag= too, where bash expands none; and no folder is called ~."""
    home, here = tmp_path / "home", tmp_path / "here"
    here.mkdir()
    shutil.copytree(run, home / "run")
    monkeypatch.chdir(here)
    if spelt == "~":
        monkeypatch.setenv("HOME", str(home))
    else:
        user = SimpleNamespace(pw_dir=str(home))
        monkeypatch.setattr(pwd, "getpwnam", lambda name: user if name == "somebody" else pwd.getpwall()[-1])
    tilde = spelt.format(user="somebody")
    (home / "r.yaml").write_text(
        f"{{model: resnet8, method: bp, coupling: none, blocks: 1, init: {tilde}/run/model.safetensors}}"
    )
    bp = [*QUICK, "--method", "bp"]
    for command in (
        ["train", *bp, f"--out={tilde}/x"],
        ["train", *QUICK, f"--recipe={tilde}/r.yaml", "--out", f"{tilde}/y"],
        ["eval", f"{tilde}/run"],
        ["export", f"{tilde}/run", f"--out={tilde}/e.safetensors"],
        ["plan", *QUICK[:2], "--budget", "1GiB", f"--out={tilde}/plan.yaml"],
        ["train", *bp, f"--plan={tilde}/plan.yaml", f"--out={tilde}/z"],
        ["list", f"--data-dir={tilde}"],
    ):
        assert main(command) == 0, capsys.readouterr().err
    assert {"x", "y", "z", "e.safetensors", "plan.yaml"} <= set(os.listdir(home))
    assert os.listdir(here) == []
    assert read_recipe(home / "y" / "config.yaml").init == str(home / "run" / "model.safetensors")


def test_a_path_that_is_called_tilde_stays(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    shutil.copytree(run, tmp_path / "~" / "run")
    assert main(["train", *QUICK, "--init=./~/run/model.safetensors", "--out", "./~/x"]) == 0
    (cell,) = grid(Compare(methods="bp", set=("model=resnet8", "epochs=1")))
    train(cell.recipe, Path("./~/grid") / cell.name)
    assert main(["compare", "--methods", "bp", "--set", "model=resnet8", "--set", "epochs=1", "--out", "./~/grid"]) == 0
    assert main(["eval", "./~/x", "--data-dir=./~/data"]) == 0
    assert {"run", "x", "grid"} == set(os.listdir("~"))
    assert not {"run", "x", "grid", "data"} & set(os.listdir("home") if Path("home").exists() else ())


@pytest.mark.parametrize("argv", [["train"], ["train", "--nproc", "2"], ["compare"]])
def test_runs_need_a_posix_system(
    argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: Fails
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    assert fails(*argv).startswith("localgrad: localgrad's training runs need Linux or macOS")
    assert os.listdir(tmp_path) == []


def test_other_commands_need_no_posix_system(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)
    for name in ("pthread_sigmask", "alarm"):
        monkeypatch.delattr(signal, name)
    for argv in (["list"], ["--help"], ["eval", str(run)], ["plan", *QUICK[:2]]):
        assert main(argv) == 0, argv


@pytest.mark.slow
def test_other_commands_are_imported_on_no_posix_system() -> None:
    code = (
        "import signal, sys; sys.modules['fcntl'] = None; del signal.pthread_sigmask, signal.alarm\n"
        "from localgrad.cli import main\n"
        "for argv in (['list'], ['--help'], ['plan', '--model', 'resnet20']):\n"
        "    assert main(argv) == 0, argv"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_options_without_effect_warn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--coupling", "none", "--momentum", "0.9", "--blocks", "2"]
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert main(["train", *QUICK, *flags, "--out", str(tmp_path / "r")]) == 0
    assert capsys.readouterr().err.strip() == "localgrad: warning: momentum has no effect: there is no EMA"


def test_sigterm_ends_an_export(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    assert main(["export", str(run), "--format", "onnx"]) == 143


def test_set_parses_like_the_flags() -> None:
    assert parse_changes(["lr=0.05", "decay-norms=False", "limit_train=100", "blocks=stem"]) == {
        "lr": 0.05, "decay_norms": False, "limit_train": 100, "blocks": "stem",
    }  # fmt: skip
    for wrong in ("lr", "lr=", "lrr=1", "lr=x", "lr=-1", "method=foo"):
        with pytest.raises(UserError):
            parse_changes([wrong])
