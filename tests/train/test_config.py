from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crosspoint.models import CrossPointConfig
from crosspoint.train import PretrainConfig, load_config, save_config
from crosspoint.train.config import config_from_dict, config_to_dict

ROOT = Path(__file__).parents[2]


@pytest.fixture
def recipe(tmp_path):
    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**63),
    lr=st.floats(1e-300, 1e300),
    weight_decay=st.floats(0, 1e-300),
    temperature=st.floats(1e-6, 1e6),
    data=st.text(),
    amp=st.booleans(),
    up=st.sampled_from(["y", "z"]),
)
def test_round_trip_is_exact(tmp_path_factory, seed, lr, weight_decay, temperature, data, amp, up):
    config = PretrainConfig(
        data,
        seed=seed,
        lr=lr,
        weight_decay=weight_decay,
        amp=amp,
        up=up,
        model=CrossPointConfig(temperature=temperature),
    )
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    save_config(path, config)
    assert load_config(PretrainConfig, path) == config


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_recipes_load(path):
    load_config(PretrainConfig, path).validate()


def test_full_recipe_is_the_published_one():
    assert load_config(PretrainConfig, ROOT / "configs/pretrain_full.yaml") == PretrainConfig(workers=8)
    config = PretrainConfig()
    assert (config.epochs, config.batch_size, config.points, config.image_size) == (100, 20, 2048, 224)
    assert (config.lr, config.weight_decay) == (1e-3, 1e-6)
    assert (config.model.k, config.model.image_encoder, config.model.temperature) == (15, "resnet50", 0.1)


def test_missing_keys_keep_their_defaults(recipe):
    config = load_config(PretrainConfig, recipe("epochs: 3\nmodel:\n  image_encoder: resnet18\n"))
    # Inside `model` too: k stays what pre-training uses, not what the model class defaults to.
    expected = replace(PretrainConfig().model, image_encoder="resnet18")
    assert config == PretrainConfig(epochs=3, model=expected)


def test_empty_recipe_is_the_default(recipe):
    assert load_config(PretrainConfig, recipe("# nothing\n")) == PretrainConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", r"unknown key epoch; did you mean epochs\?"),
        (
            "model:\n  image_encode: resnet18",
            r"unknown key model\.image_encode; did you mean model\.image_encoder\?",
        ),
        ("k: 3", r"unknown key k; did you mean model\.k\?"),
        ("qqqqqq: 3", r"unknown key qqqqqq; valid keys: data, out"),
        ("epochs: many", r"epochs must be an integer, got 'many'"),
        ("epochs: true", r"epochs must be an integer, got True"),
        ("epochs: 2.5", r"epochs must be an integer"),
        ("amp: 1", r"amp must be true or false"),
        ("lr: fast", r"lr must be a number"),
        ("up: x", r"up must be one of 'y', 'z', got 'x'"),
        ("model: 3", r"model must hold `key: value` lines, got 3"),
        ("model:\n  k: 0", r"k must be a positive integer"),
        ("- 1", r"must hold `key: value` lines"),
        ("a: [", r"not valid YAML"),
    ],
)
def test_errors_name_the_file_and_the_key(recipe, text, message):
    path = recipe(text)
    with pytest.raises(ValueError, match=message) as error:
        load_config(PretrainConfig, path)
    assert str(path) in str(error.value)


def test_numbers_as_people_write_them(recipe):
    config = load_config(PretrainConfig, recipe("lr: 1e-3\nweight_decay: 0"))
    assert (config.lr, config.weight_decay) == (1e-3, 0.0)
    assert isinstance(config.lr, float)
    assert isinstance(config.weight_decay, float)


def test_other_field_types():
    @dataclass
    class Inner:
        x: float | None = None

    @dataclass
    class Outer:
        path: Path
        grid: tuple[float, ...] = (1.0,)
        names: list[str] = field(default_factory=list)
        mode: Literal["a", "b"] | None = None
        workers: int | None = None

    config = Outer(Path("a/b"), (0.1, 2.0), ["x", "y"], "b", 3)
    assert config_from_dict(Outer, config_to_dict(config)) == config
    assert config_from_dict(Outer, {"path": "p", "workers": None}) == Outer(Path("p"))
    with pytest.raises(ValueError, match=r"grid\[1\] must be a number, got 'x'"):
        config_from_dict(Outer, {"path": "p", "grid": [1, "x"]})
    with pytest.raises(ValueError, match="path is missing"):
        config_from_dict(Outer, {})
    assert config_from_dict(Inner, {"x": 1}) == Inner(1.0)
