"""Point clouds with rendered views of the same shapes: the ShapeNet / ShapeNetRendering layout."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from crosspoint._optional import require
from crosspoint.data.ply import read_points

__all__ = ["PairDataset", "check_sizes", "listed"]

_LAYOUT = (
    "expected layout: ROOT/ShapeNet/<class>/<id>.ply and ROOT/ShapeNetRendering/<class>/<id>/rendering/*.png "
    "or *.jpg (`crosspoint prepare MESHES ROOT` makes it from meshes)"
)
_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg"}
_SHOWN = 5  # names in an error or a warning


class PairDataset(Dataset):
    """Clouds, each with one or several of its views; which views, `set_epoch` and the seed decide.

    root: folder that holds ShapeNet/<class>/<id>.ply and ShapeNetRendering/<class>/<id>/rendering/*.png|jpg.
    points: points per cloud. A cloud that has more gives its first ones; one that has fewer is an error.
    image_size: views are composited onto white and resized to (image_size, image_size), whatever their
        aspect.
    seed: with the epoch and the index, decides the views.
    views: so many different views a shape at a time. Shapes that have fewer are an error.
    on_error: "raise" names the shapes without a view and the first unusable cloud when the data set is made,
        and a broken image when it is drawn; "skip" reads all images once (about a millisecond each), leaves
        out what is broken and warns; `skipped` then lists (path, reason).

    All clouds are read when the data set is made (12 bytes per point; forked loader processes share them).

    Item: {"points": float32 (points, 3), "image": uint8 (3, image_size, image_size), "index": int}; with several views,
    "image" is (views, 3, image_size, image_size).
    `names` lists "<class>/<id>", sorted; `classes` the classes, sorted; `views_per_shape` how many images each shape
    has.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        points: int = 2048,
        image_size: int = 224,
        seed: int = 0,
        views: int = 1,
        on_error: Literal["raise", "skip"] = "raise",
    ) -> None:
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}")
        check_sizes(points, image_size, views)
        self._image = require("PIL.Image", extra="train")
        self.root, self.points, self.image_size = Path(root), points, image_size
        self.skipped: list[tuple[Path, str]] = []
        skip = self._note if on_error == "skip" else None

        clouds, files_of = [], []
        for path in _cloud_paths(self.root):
            name = f"{path.parent.name}/{path.stem}"
            folder = self.root / "ShapeNetRendering" / name / "rendering"
            files = _image_names(folder)
            if not files and skip is None:
                raise FileNotFoundError(self._missing_views())
            if not files:
                skip(path, f"no image in {folder}")
                continue
            try:
                cloud = self._read_cloud(path)
            except ValueError as error:
                if skip is None:
                    raise
                skip(path, str(error))
                continue
            clouds.append((name, cloud))
            files_of.append(files)
        if skip is not None:
            files_of = self._readable([name for name, _ in clouds], files_of, skip)
            clouds = [cloud for cloud, files in zip(clouds, files_of, strict=True) if files]
            files_of = [files for files in files_of if files]
            self._warn()
        if not clouds:
            raise ValueError(f"no usable shape under {self.root}: {_summary(self.skipped)}; {_LAYOUT}")
        self._clouds = np.stack([cloud for _, cloud in clouds])
        self._files = files_of
        self._set_up([name for name, _ in clouds], list(map(len, files_of)), seed, views)

    def _set_up(self, names: list[str], views_per_shape: list[int], seed: int, drawn: int) -> None:
        """What draws depend on, wherever clouds and views are kept."""
        self.names, self.views_per_shape, self.seed, self._drawn = names, views_per_shape, seed, drawn
        self.classes = sorted({name.split("/")[0] for name in names})
        # Shared memory: loader processes that outlive an epoch see the next one.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._worker_epoch: int | None = None
        few = [name for name, views in zip(names, views_per_shape, strict=True) if views < drawn]
        if few:
            raise ValueError(
                f"{len(few)} shapes under {self.root} have fewer than {drawn} views: {listed(few)}; ask for fewer"
            )

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose views are drawn from now on, before the loader is iterated over.

        In the process that owns the data set this reaches loader processes too, persistent ones included;
        called in a loader process, it holds for that process alone.
        """
        if epoch < 0:
            raise ValueError(f"epoch must not be negative, got {epoch}")
        if get_worker_info() is None:
            self._epoch.fill_(epoch)
        else:
            self._worker_epoch = epoch

    def cloud(self, index: int) -> np.ndarray:
        """The cloud of a shape, (points, 3) float32, new memory."""
        return self._clouds[index].copy()

    def view(self, index: int, view: int) -> np.ndarray:
        """A view of a shape, (image_size, image_size, 3) uint8."""
        return self._read_image(self._view_path(self.names[index], self._files[index][view]))

    def sources(self, index: int) -> list[str]:
        """Where the item at `index` comes from in this epoch: the file of its cloud, then that of each view."""
        folder, stem = self.names[index].split("/")
        clouds = (self.root / "ShapeNet" / folder).iterdir()
        cloud = next(path for path in clouds if path.stem == stem and path.suffix.lower() == ".ply")
        views = [self._view_path(self.names[index], self._files[index][i]) for i in self._draws(index)]
        return list(map(str, [cloud, *views]))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} shapes")
        index %= len(self)
        images = np.stack([self.view(index, i) for i in self._draws(index)])
        image = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        return {
            "points": torch.from_numpy(self.cloud(index)),
            "image": image[0] if self._drawn == 1 else image,
            "index": index,
        }

    def _draws(self, index: int) -> list[int]:
        """The views of a shape in this epoch."""
        epoch = int(self._epoch) if self._worker_epoch is None else self._worker_epoch
        views = self.views_per_shape[index]
        generator = np.random.default_rng((self.seed, epoch, index))
        if self._drawn == 1:
            return [int(generator.integers(views))]
        return generator.permutation(views)[: self._drawn].tolist()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_image"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._image = require("PIL.Image", extra="train")

    def _view_path(self, name: str, file: str) -> Path:
        return self.root / "ShapeNetRendering" / name / "rendering" / file

    def _read_cloud(self, path: Path) -> np.ndarray:
        cloud = read_points(path)
        if len(cloud) < self.points:
            raise ValueError(f"{path}: has {len(cloud)} points, {self.points} were asked for; ask for fewer")
        return cloud[: self.points].copy()

    def _read_image(self, path: Path) -> np.ndarray:
        """The view as uint8 (image_size, image_size, 3)."""
        try:
            with self._image.open(path) as image:
                image.load()
                picture = _on_white(self._image, image)
        except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError and others
            raise ValueError(f"{path}: the image cannot be read ({error})") from error
        size = (self.image_size, self.image_size)
        if picture.size != size:
            picture = picture.resize(size, self._image.Resampling.BILINEAR)
        return np.array(picture)

    def _readable(
        self, names: list[str], views: list[list[str]], skip: Callable[[Path, str], None]
    ) -> list[list[str]]:
        """`views` without the images that cannot be decoded."""

        def broken(item: tuple[int, str]) -> str | None:
            try:
                self._read_image(self._view_path(names[item[0]], item[1]))
            except ValueError as error:
                return str(error)
            return None

        items = [(shape, file) for shape, files in enumerate(views) for file in files]
        readable: list[list[str]] = [[] for _ in views]
        with ThreadPoolExecutor() as threads:
            for (shape, file), reason in zip(items, threads.map(broken, items), strict=True):
                if reason is None:
                    readable[shape].append(file)
                else:
                    skip(self._view_path(names[shape], file), reason)
        return readable

    def _missing_views(self) -> str:
        missing = [
            f"{path.parent.name}/{path.stem}"
            for path in _cloud_paths(self.root)
            if not _image_names(self.root / "ShapeNetRendering" / path.parent.name / path.stem / "rendering")
        ]
        return (
            f"{len(missing)} shapes under {self.root / 'ShapeNet'} have no image under "
            f"{self.root / 'ShapeNetRendering'}: {listed(missing)}; {_LAYOUT}. "
            "Pass on_error='skip' to leave them out"
        )

    def _note(self, path: Path, reason: str) -> None:
        self.skipped.append((path, reason))

    def _warn(self) -> None:
        if self.skipped:
            warnings.warn(f"left out under {self.root}: {_summary(self.skipped)}", stacklevel=3)


def check_sizes(points: int, image_size: int, views: int) -> None:
    for name, value in (("points", points), ("image_size", image_size), ("views", views)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _cloud_paths(root: Path) -> list[Path]:
    """All clouds, in the order of their names."""
    clouds = root / "ShapeNet"
    for folder in (root, clouds):
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder {folder}; {_LAYOUT}")
    classes = [folder for folder in clouds.iterdir() if folder.is_dir() and not folder.name.startswith(".")]
    paths = [
        path
        for folder in classes
        for path in folder.iterdir()
        if path.suffix.lower() == ".ply" and not path.name.startswith(".")
    ]
    if not paths:
        raise FileNotFoundError(f"no .ply file under {clouds}; {_LAYOUT}")
    return sorted(paths, key=lambda path: (path.parent.name, path.stem))


def _image_names(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.suffix.lower() in _IMAGE_SUFFIXES and not path.name.startswith(".")
    )


def _on_white(image_module: Any, image: Any) -> Any:
    """RGB, with whatever is transparent filled with white."""
    if image.mode[0] in "IF":
        raise ValueError(f"images of mode {image.mode} are not supported; 8 bits per channel are expected")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = image_module.new("RGBA", image.size, (255, 255, 255, 255))
        image = image_module.alpha_composite(white, image)
    return image.convert("RGB")


def listed(items: Iterable[str]) -> str:
    """The first of them, and how many more there are."""
    items = list(items)
    more = len(items) - _SHOWN
    return ", ".join(items[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _summary(skipped: list[tuple[Path, str]]) -> str:
    return f"{len(skipped)} files ({listed(f'{path}: {reason}' for path, reason in skipped)})"
