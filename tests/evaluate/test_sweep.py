"""Sweeps over real, tiny pre-trainings and SVMs."""

import json
import statistics

import numpy as np
import pytest
import torch
import yaml

import tiny_run
from crosspoint import models
from crosspoint.data import LabelledClouds, write_modelnet40
from crosspoint.evaluate import sweep as module
from crosspoint.evaluate.sweep import SweepConfig, sweep
from crosspoint.train.config import load_config

BASE = {
    "epochs": 1,
    "batch_size": 4,
    "points": 48,
    "image_size": 16,
    "workers": 0,
    "model": {"k": 4, "image_encoder": "resnet18", "projection_dim": 16},
}
LIST = {
    "base": BASE,
    "seeds": [0, 3],
    "runs": {"warm": {}, "hot": {"model": {"temperature": 0.5}}},
    "evaluate": {"svm": {"points": 16, "c_grid": [0.1, 1.0], "random_init": True}},
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(models, "build", tiny_run.build_tiny)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write(folder, values):
    path = folder / "list.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("sweep")
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(2), 5)
    for split in ("train", "test"):
        points = rng.normal(size=(10, 16, 3)) * np.where(labels, 1.0, [[0.1], [1.0], [1.0]]).T[:, None]
        clouds = LabelledClouds(torch.from_numpy(points.astype(np.float32)), torch.from_numpy(labels), "ab")
        write_modelnet40(root / "labelled", split, clouds)
    return tiny_run.write_pairs(root / "pairs"), root / "labelled"


def config(folders, tmp_path, values):
    return SweepConfig(
        write(tmp_path, values), str(folders[0]), tmp_path / "out", labelled=folders[1], device="cpu"
    )


def test_one_table_and_no_run_twice(folders, tmp_path, monkeypatch, capsys):
    given = config(folders, tmp_path, LIST)
    results = sweep(given)
    rows = results["rows"]
    assert set(rows) == {
        f"{name}{what}" for name in ("warm", "hot") for what in ("", ", random initialisation")
    }
    for name in ("warm", "hot"):
        files = [json.loads((given.out / name / f"seed_{seed}/svm.json").read_text()) for seed in (0, 3)]
        for row, key in ((name, "pretrained"), (f"{name}, random initialisation", "random_init")):
            values = [each["encoders"][key]["accuracy"] for each in files]
            assert rows[row]["linear SVM"] == {
                "mean": pytest.approx(statistics.mean(values)),
                "std": pytest.approx(statistics.stdev(values)),
                "values": values,
                "seeds": [0, 3],
            }
        trained = load_config(module.PretrainConfig, given.out / name / "seed_3/config.yaml")
        assert trained.seed == 3 and trained.model.k == 4
        assert trained.model.temperature == (0.5 if name == "hot" else 0.1)
    assert json.loads((given.out / "sweep.json").read_text()) == json.loads(json.dumps(results))
    table = (given.out / "sweep.md").read_text()
    assert table.startswith("| run | linear SVM |\n|---|---|\n| warm | ") and "± " in table and "(2)" in table
    assert table.strip() in capsys.readouterr().out

    def again(_):
        raise AssertionError("done twice")

    with monkeypatch.context() as patch:
        patch.setitem(module._PROTOCOLS, "svm", module._PROTOCOLS["svm"]._replace(run=again))
        assert sweep(given) == results
        write(tmp_path, {**LIST, "evaluate": {"svm": {"points": 16, "c_grid": [0.5]}}})
        with pytest.raises(AssertionError, match="done twice"):  # other options
            sweep(given)
    write(tmp_path, {**LIST, "base": {**BASE, "lr": 0.5}})
    with pytest.raises(ValueError, match=r"lr: 0\.001 in the run, 0\.5 now"):
        sweep(given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runs": {}}, "runs and evaluate must each name at least one"),
        ({"runs": {"a/b": {}}}, "a run's name is a folder's, got 'a/b'"),
        ({"runs": {"a": {"epoch": 3}}}, r"runs\.a: unknown key epoch; did you mean epochs\?"),
        ({"runs": {"a": {"seed": 3}}}, r"runs\.a: the sweep itself decides seed"),
        ({"runs": {"a": 3}}, r"runs\.a must hold"),
        ({"runs": {"a": {"views": 0}}}, r"runs\.a: views must be at least 1"),
        ({"runs": {"a": {"model": {"cross_weight": -1}}}}, "must be numbers from 0 on"),
        ({"seeds": [1, 1]}, "seeds must be different numbers"),
        (
            {"evaluate": {"svn": {}}},
            r"evaluate\.svn: the protocols are svm, few-shot, retrieval, cross-modal",
        ),
        ({"evaluate": {"svm": {"cgrid": 1}}}, r"evaluate\.svm: unknown key cgrid"),
        ({"sedes": [1]}, "unknown key sedes; did you mean seeds"),
    ],
)
def test_a_list_that_cannot_work_runs_nothing(folders, tmp_path, changes, message):
    given = config(folders, tmp_path, {**LIST, **changes})
    with pytest.raises(ValueError, match=message):
        sweep(given)
    assert not given.out.exists()


@pytest.mark.parametrize(
    "path", sorted((tiny_run.Path(__file__).parents[2] / "configs/sweeps").glob("*.yaml"))
)
def test_shipped_lists_can_run(path, tmp_path):
    given = SweepConfig(path, "pairs", tmp_path)
    jobs = list(module._jobs(given, load_config(module.SweepList, path)))
    assert len(jobs) >= 12 and {job.training.seed for job in jobs} == {0, 1, 2}
    assert len({job.training.out for job in jobs}) == len(jobs)
