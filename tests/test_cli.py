import dataclasses
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import crosspoint.train
import tiny_run
from crosspoint import cli, info, models
from crosspoint.data.prepare import PrepareConfig
from crosspoint.train import PretrainConfig

ROOT = Path(cli.__file__).parents[1]


def run_python(*arguments, **env):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(autouse=True)
def no_log_handlers(monkeypatch):
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)


@pytest.fixture
def pretrain_configs(monkeypatch):
    """What the pretrain command would have run."""
    configs = []
    monkeypatch.setattr(crosspoint.train, "pretrain", configs.append)
    return configs


def parsed(pretrain_configs, *arguments):
    assert cli.main(["pretrain", *map(str, arguments)]) == 0
    return pretrain_configs[-1]


def test_pretrain_options(pretrain_configs):
    config = parsed(
        pretrain_configs, "pairs", "--out", "run", "--model.k", "7", "--lr", "0.5", "--amp", "--resume"
    )
    model = dataclasses.replace(PretrainConfig().model, k=7)
    assert config == PretrainConfig("pairs", out="run", model=model, lr=0.5, amp=True, resume=True)
    assert type(config) is PretrainConfig


def test_pretrain_defaults(pretrain_configs):
    assert parsed(pretrain_configs) == PretrainConfig()


@pytest.mark.parametrize("style", ["--config {}", "--config={}"])
def test_the_command_line_wins_over_the_recipe(pretrain_configs, tmp_path, style):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "data: from_recipe\nepochs: 7\nlr: 0.5\namp: true\nmodel:\n  k: 9\n  temperature: 0.2\n"
    )
    option = style.format(recipe).split()
    model = dataclasses.replace(PretrainConfig().model, k=9, temperature=0.2)
    expected = PretrainConfig("from_recipe", epochs=7, lr=0.5, amp=True, model=model)
    assert parsed(pretrain_configs, *option) == expected
    changed = parsed(pretrain_configs, "mine", *option, "--epochs", "3", "--no-amp", "--model.k", "5")
    model = dataclasses.replace(model, k=5)
    assert changed == PretrainConfig("mine", epochs=3, lr=0.5, amp=False, model=model)


def test_a_recipe_may_leave_out_what_the_command_line_gives(monkeypatch, tmp_path):
    import crosspoint.data.prepare as module

    configs = []
    monkeypatch.setattr(module, "prepare", configs.append)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("views: 3\n")
    assert cli.main(["prepare", "meshes", "out", "--config", str(recipe), "--points", "99"]) == 0
    assert configs == [PrepareConfig("meshes", "out", points=99, views=3)]


def test_a_recipe_with_an_unknown_key(pretrain_configs, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("epoch: 7\n")
    assert cli.main(["pretrain", "--config", str(recipe)]) == 1
    assert "unknown key epoch; did you mean epochs?" in capsys.readouterr().err
    assert not pretrain_configs


@pytest.mark.parametrize("name", cli._COMMANDS)
def test_help_of_each_command(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*name.split(), "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    command = cli._COMMANDS[name]
    assert f"usage: crosspoint {name}" in text
    assert "--config FILE.yaml" in text
    for positional in command.positional:
        assert re.search(rf"\b{positional.upper()}\b", text.splitlines()[0])
    undocumented = [
        line for line in text.splitlines() if re.search(r"--no-[\w-]+ +\(default: (True|False)\)", line)
    ]
    assert not undocumented


def test_overview(capsys):
    for arguments in ([], ["--help"], ["-h"], ["help"]):
        assert cli.main(arguments) == 0
        text = capsys.readouterr().out
        for word in ("prepare", "pretrain", "evaluate svm", "demo", "info", "--traceback"):
            assert word in text


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"crosspoint {crosspoint.__version__}\n"


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        (["pretran"], "did you mean 'pretrain'?"),
        (["evaluate", "svn"], "did you mean 'evaluate svm'?"),
        (["x"], "unknown command 'x'"),
    ],
)
def test_unknown_command_lists_the_valid_ones(capsys, typed, hint):
    assert cli.main(typed) == 2
    error = capsys.readouterr().err
    assert hint in error
    assert f"The commands are: {', '.join(cli._COMMANDS)}, info" in error


def test_evaluate_alone_lists_the_protocols(capsys):
    assert cli.main(["evaluate"]) == 2
    assert "crosspoint evaluate svm" in capsys.readouterr().out
    assert cli.main(["evaluate", "--help"]) == 0


def test_unknown_option_is_wrong_usage(pretrain_configs, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["pretrain", "--epoch", "3"])
    assert stop.value.code == 2
    assert "--epochs" in capsys.readouterr().err
    assert not pretrain_configs


def test_a_user_error_is_one_line(tmp_path, capsys):
    assert cli.main(["pretrain", str(tmp_path / "nowhere"), "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("crosspoint pretrain: error: ")
    assert error.count("\n") == 1
    assert "nowhere" in error


@pytest.mark.parametrize("how", ["option", "variable"])
def test_traceback_on_request(tmp_path, capsys, monkeypatch, how):
    arguments = ["pretrain", str(tmp_path / "nowhere"), "--out", str(tmp_path / "run")]
    if how == "option":
        arguments.insert(1, "--traceback")
    else:
        monkeypatch.setenv("CROSSPOINT_TRACEBACK", "1")
    assert cli.main(arguments) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(monkeypatch):
    def broken(config):
        raise AttributeError("a bug")

    monkeypatch.setattr(crosspoint.train, "pretrain", broken)
    with pytest.raises(AttributeError, match="a bug"):
        cli.main(["pretrain"])


def test_interruption(monkeypatch, capsys):
    def interrupted(config):
        raise KeyboardInterrupt("stopped after step 3")

    monkeypatch.setattr(crosspoint.train, "pretrain", interrupted)
    assert cli.main(["pretrain"]) == 130
    assert capsys.readouterr().err == "crosspoint pretrain: stopped after step 3\n"


def test_missing_extra_is_one_line_that_names_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert cli.main(["pretrain"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "pip install 'crosspoint[train]'" in error


def test_info_needs_torch_and_numpy_alone():
    code = """
import sys

class OnlyTheBaseInstall:
    blocked = {"tyro", "yaml", "tqdm", "trimesh", "h5py", "PIL", "scipy", "sklearn", "matplotlib", "kornia",
               "safetensors", "tensorboard"}
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.blocked:
            raise ImportError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, OnlyTheBaseInstall())
from crosspoint.cli import main
raise SystemExit(main(["info"]))
"""
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    for text in (crosspoint.__version__, torch.__version__, "knn_graph", "edge_conv", "nt_xent", "reference"):
        assert text in done.stdout


def test_info_says_why_native_is_not_usable():
    done = run_python("-m", "crosspoint", "info", CROSSPOINT_NATIVE="0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("no native: switched off by CROSSPOINT_NATIVE=0") == 1
    assert re.search(r"edge_conv +no ", done.stdout)


def test_info_tells_what_a_bug_report_needs():
    done = run_python("-m", "crosspoint", "info", CROSSPOINT_CPU="baseline")
    assert done.returncode == 0, done.stderr
    for pattern in (
        r"CPU variant in use +baseline",
        r"built against +torch \S+, stable ABI of torch 2\.11",
        r"compiler +\S",
        r"CPU variants +baseline",
        r"CUDA kernels +\S",
        r"cpu +.*\d+ cores, \d+ threads",
        r"CROSSPOINT_CPU=baseline",
    ):
        assert re.search(pattern, done.stdout), pattern


def test_info_takes_no_options(capsys):
    assert cli.main(["info", "--x"]) == 1
    assert "info takes no options, got '--x'" in capsys.readouterr().err
    assert cli.main(["info", "--help"]) == 0


def test_missing_packages_of_extras():
    requirements = [
        "torch>=2.11",
        'pytest>=8; extra == "dev"',
        'surely-not-installed>=2; extra == "dev"',
        "also_not_installed ; extra == 'train'",
        'crosspoint[train]; extra == "eval"',
    ]
    assert info.missing_packages(requirements) == {
        "dev": ["surely-not-installed"],
        "train": ["also_not_installed"],
        "eval": ["also_not_installed"],
    }


def test_pretrain_from_the_command_line(tmp_path):
    """The real thing once: a new process, the real models, a run folder that loads."""
    data, out = tiny_run.write_pairs(tmp_path / "pairs"), tmp_path / "run"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: {k: 4, image_encoder: resnet18, projection_dim: 8}\nimage_size: 32\nworkers: 0\n"
    )
    options = ["--config", str(recipe), "--epochs", "1", "--batch-size", "5", "--points", "32"]
    command = ["-m", "crosspoint", "pretrain", str(data), "--out", str(out), *options]
    done = run_python(*command)
    assert done.returncode == 0, done.stderr
    assert "11 shapes, 2 steps of 5 an epoch (1 shapes" in done.stderr
    assert re.search(r"epoch 1/1: 100%.* loss \d+\.\d+, \d+\.\d shapes/s", done.stderr)
    assert models.checkpoints.load_config(out).k == 4
    models.checkpoints.load_model(out)

    done = run_python(*command)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "--resume" in done.stderr
