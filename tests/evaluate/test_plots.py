from pathlib import Path

import numpy as np
import pytest

from crosspoint.evaluate import plots

NAMES = ["ball", "long_stick", "disc"]


def pixels(path: Path) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def near(image: np.ndarray, colour: tuple[float, float, float]) -> int:
    """How many pixels have about that colour."""
    return int((np.abs(image - 255 * np.array(colour)).max(axis=2) < 12).sum())


@pytest.fixture
def canvas():
    figure = plots.new_figure(5, 4)
    return figure, figure.subplots()


@pytest.fixture
def clusters():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 30)
    centres = 5 * rng.standard_normal((3, 20))
    return (centres[labels] + rng.standard_normal((90, 20))).astype(np.float32), labels


def test_figures_have_their_size_and_appear_by_rename(canvas, tmp_path):
    figure, axes = canvas
    axes.plot([0, 1], [0, 1])
    path = tmp_path / "figure.png"
    path.write_bytes(b"former")
    plots.save_figure(figure, path, dpi=50)
    assert pixels(path).shape == (200, 250, 3)
    assert [each.name for each in tmp_path.iterdir()] == ["figure.png"]


def test_a_failed_drawing_leaves_the_former_figure(canvas, tmp_path, monkeypatch):
    figure, _ = canvas

    def fail(file, **_):
        file.write(b"half")
        raise RuntimeError("drawing failed")

    monkeypatch.setattr(figure, "savefig", fail)
    path = tmp_path / "figure.png"
    path.write_bytes(b"former")
    with pytest.raises(RuntimeError, match="drawing failed"):
        plots.save_figure(figure, path)
    assert path.read_bytes() == b"former"
    assert [each.name for each in tmp_path.iterdir()] == ["figure.png"]


def test_drawing_needs_no_pyplot():
    import subprocess
    import sys

    code = "import sys\nfrom crosspoint.evaluate import plots\nplots.new_figure(1, 1)\n"
    code += "print('matplotlib.pyplot' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_tsne_separates_clusters_and_repeats(clusters):
    features, labels = clusters
    positions = plots.tsne(features, seed=0)
    assert positions.shape == (90, 2)
    distances = np.linalg.norm(positions[:, None] - positions[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    assert (labels[distances.argmin(axis=1)] == labels).all()
    np.testing.assert_array_equal(positions, plots.tsne(features, seed=0))


def test_tsne_takes_few_features_and_refuses_too_few():
    rng = np.random.default_rng(0)
    assert plots.tsne(rng.standard_normal((4, 7))).shape == (4, 2)
    with pytest.raises(ValueError, match="at least 4 features, got 3"):
        plots.tsne(rng.standard_normal((3, 7)))
    with pytest.raises(ValueError, match="collapsed"):
        plots.tsne(np.ones((10, 7)))


def test_embedding_shows_every_class_in_its_colour(canvas, clusters, tmp_path):
    figure, axes = canvas
    _, labels = clusters
    positions = np.array([[0, 0], [10, 0], [5, 8]])[labels] + np.random.default_rng(1).normal(size=(90, 2))
    plots.draw_embedding(axes, positions, labels, NAMES, title="title")
    plots.save_figure(figure, tmp_path / "figure.png")
    image = pixels(tmp_path / "figure.png")
    for colour in plots.class_colours(3):
        assert near(image, tuple(0.8 * np.array(colour) + 0.2)) > 40  # drawn at 80 % opacity
    assert [text.get_text() for text in axes.texts] == ["ball", "long stick", "disc"]
    for text, centre in zip(axes.texts, ([0, 0], [10, 0], [5, 8]), strict=True):
        assert np.abs(np.array(text.get_position()) - centre).max() < 1


def test_embedding_leaves_out_a_class_without_members(canvas):
    _, axes = canvas
    plots.draw_embedding(axes, np.zeros((2, 2)), np.array([0, 2]), NAMES, title="title")
    assert [text.get_text() for text in axes.texts] == ["ball", "disc"]


def test_forty_classes_have_forty_colours():
    colours = np.array(plots.class_colours(40))
    distances = np.linalg.norm(colours[:, None] - colours[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    assert distances.min() > 0.05


def test_confusion_counts_and_percentages(canvas):
    _, axes = canvas
    labels = np.array([0, 0, 0, 0, 1, 1])
    predictions = np.array([0, 0, 0, 2, 1, 0])
    expected = np.array([[3, 0, 1], [1, 1, 0], [0, 0, 0]])
    np.testing.assert_array_equal(plots.confusion_counts(labels, predictions, 3), expected)
    plots.draw_confusion(axes, labels, predictions, NAMES, title="title")
    (image,) = axes.images
    np.testing.assert_allclose(image.get_array(), [[75, 0, 25], [50, 50, 0], [0, 0, 0]])
    written = {text.get_position(): text.get_text() for text in axes.texts}
    assert written == {(0, 0): "75", (2, 0): "25", (0, 1): "50", (1, 1): "50"}


def test_class_accuracies_are_where_they_belong(canvas):
    _, axes = canvas
    accuracies = {"pre-trained": {"ball": 0.9, "disc": 0.5}, "random": {"ball": 0.3, "disc": 0.6}}
    plots.draw_class_accuracies(axes, accuracies, NAMES)
    first, second = (np.array(dots.get_offsets()) for dots in axes.collections)
    np.testing.assert_allclose(first[[0, 2]], [[90, 0], [50, 2]])
    np.testing.assert_allclose(second[[0, 2]], [[30, 0], [60, 2]])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["pre-trained", "random"]


def test_loss_curves_follow_the_log(canvas):
    _, axes = canvas
    records = [{"step": 10 * i, "loss": 6.0 - 0.1 * i, "intra_modal": 2.0, "epoch": 1} for i in range(1, 31)]
    plots.draw_losses(axes, records)
    raw, smooth = axes.lines[:2]
    np.testing.assert_allclose(raw.get_xdata(), 10 * np.arange(1, 31))
    np.testing.assert_allclose(raw.get_ydata(), 6.0 - 0.1 * np.arange(1, 31))
    np.testing.assert_allclose(
        smooth.get_ydata()[1:-1], raw.get_ydata()[1:-1]
    )  # a mean keeps a straight line
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["total", "intra-modal"]


def test_one_step_is_a_curve_and_none_is_an_error(canvas):
    _, axes = canvas
    plots.draw_losses(axes, [{"step": 1, "loss": 2.0}])
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.draw_losses(axes, [])


def test_pairs_show_each_image_beside_its_cloud(tmp_path):
    figure = plots.new_figure(8, 2)
    images = [np.full((3, 8, 8), value, np.uint8) for value in (200, 120)]
    images[0][0], images[1][2] = 10, 250
    cloud = np.random.default_rng(0).standard_normal((100, 3))
    plots.draw_pairs(figure, images, [cloud, cloud], ["first", "second_shape"], columns=3)
    views, clouds = figure.axes[0::2], figure.axes[1::2]
    assert [axes.get_title(loc="left") for axes in views] == ["first", "second shape", ""]
    np.testing.assert_array_equal(views[0].images[0].get_array(), np.moveaxis(images[0], 0, -1))
    assert [len(axes.collections) for axes in clouds] == [1, 1, 0]
    assert len(clouds[0].collections[0].get_offsets()) == 100
    plots.save_figure(figure, tmp_path / "figure.png", dpi=60)
    image = pixels(tmp_path / "figure.png")
    assert near(image, (10 / 255, 200 / 255, 200 / 255)) > 1000
    assert near(image, (120 / 255, 120 / 255, 250 / 255)) > 1000


def test_a_tall_shape_is_drawn_tall():
    figure = plots.new_figure(2, 2)
    axes = figure.subplots()
    plots.draw_cloud(axes, np.random.default_rng(0).uniform(-1, 1, (500, 3)) * [0.1, 1.0, 0.1])
    width, height = np.ptp(axes.collections[0].get_offsets(), axis=0)
    assert height > 3 * width
