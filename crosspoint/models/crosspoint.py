"""CrossPoint (CVPR 2022, arXiv 2203.00680): contrast two views of a cloud, and their mean with an image."""

from __future__ import annotations

import contextlib
import dataclasses
import typing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from crosspoint.models.heads import image_projection_head
from crosspoint.models.image_encoders import check_image_encoder, create_image_encoder
from crosspoint.models.registry import POINT_ENCODERS, accepted, create
from crosspoint.nn import NTXentLoss, convert_sync_batch_norm

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["CrossPoint", "CrossPointConfig", "CrossPointOutput", "build"]


class CrossPointOutput(NamedTuple):
    """Losses (scalars) and the projected, un-normalised vectors (B, D) they were computed from.

    `loss` is the weighted sum; a loss of weight 0 is not computed and stands as 0. `image` is the mean over the images
    of a shape; None without the cross-modal loss.
    """

    loss: Tensor
    intra_modal: Tensor
    cross_modal: Tensor
    view1: Tensor
    view2: Tensor
    image: Tensor | None


class CrossPoint(nn.Module):
    """A point encoder and an image encoder trained together by two NT-Xent losses, added with weights.

    Intra-modal: the projections of two augmented views of a cloud. Cross-modal: the mean of these two
    projections (before normalisation, not detached) and the projection of an image of the shape; of several images, the
    mean of their projections. Both views go through the point encoder as one batch of 2B clouds, so they share its
    batch-norm statistics; so do all images.

    Args:
        point_encoder: maps (B, N, 3), and lengths where they are given, to (B, feature_dim), and has a
            `projection` module.
        image_encoder: maps (B, 3, H, W) to (B, feature_dim). If it has a `projection` module that is used;
            else a head is made here for its `feature_dim`, as wide as the point encoder's `projection_dim`.
        temperature: of both losses.
        image_feature_dim: feature width of an image encoder that has no `feature_dim` attribute.
        intra_weight, cross_weight: of the losses; at 0 a loss is left out, and without the second so are the images.
        freeze_image_encoder: leave the image encoder as it is, in evaluation mode; its projection is trained.
        impl: backend of the loss; the point encoder has its own.
    """

    def __init__(
        self,
        point_encoder: nn.Module,
        image_encoder: nn.Module,
        *,
        temperature: float = 0.1,
        image_feature_dim: int | None = None,
        intra_weight: float = 1.0,
        cross_weight: float = 1.0,
        freeze_image_encoder: bool = False,
        impl: str = "auto",
    ):
        super().__init__()
        _check_weights(intra_weight, cross_weight)
        if not isinstance(getattr(point_encoder, "projection", None), nn.Module):
            raise ValueError(
                f"the point encoder ({type(point_encoder).__name__}) needs a `projection` module; "
                "DGCNN has one unless it was made with projection_dim=None"
            )
        self.point_encoder = point_encoder
        self.image_encoder = image_encoder
        self.image_projection = None
        if not isinstance(getattr(image_encoder, "projection", None), nn.Module):
            self.image_projection = _image_head(point_encoder, image_encoder, image_feature_dim)
        self.criterion = NTXentLoss(temperature, impl=impl)
        self.intra_weight, self.cross_weight = intra_weight, cross_weight
        self.freeze_image_encoder = freeze_image_encoder
        if freeze_image_encoder:
            for name, parameter in image_encoder.named_parameters():
                parameter.requires_grad_(name.startswith("projection."))
            self.train(self.training)

    def forward(
        self, view1: Tensor, view2: Tensor, images: Tensor, lengths: Tensor | None = None
    ) -> CrossPointOutput:
        """The losses of a batch.

        Args:
            view1, view2: (B, N, 3), two augmentations of the same clouds.
            images: (B, 3, H, W), normalised floats, an image of each shape; or (B, V, 3, H, W), V of each.
            lengths: (B,) valid points per cloud, the same in both views; None: all N.
        """
        return self.losses(*self.project(view1, view2, images, lengths))

    def project(
        self, view1: Tensor, view2: Tensor, images: Tensor, lengths: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """The projections that `losses` compares, (B, D): of both views, and of the images if they are compared."""
        if view1.shape != view2.shape:
            raise ValueError(
                f"both views must have one shape (B, N, 3), got {tuple(view1.shape)}, {tuple(view2.shape)}"
            )
        if len(images) != len(view1):
            raise ValueError(f"expected one image per cloud: {len(view1)} clouds, {len(images)} images")
        points = torch.cat([view1, view2])
        if lengths is None:
            feature = self.point_encoder(points)
        else:
            feature = self.point_encoder(points, torch.cat([lengths, lengths]))
        views = self.point_encoder.projection(feature).chunk(2)
        return (*views, self.project_images(images)) if self.cross_weight else views

    def losses(self, z1: Tensor, z2: Tensor, z_image: Tensor | None = None) -> CrossPointOutput:
        """The losses of projections (B, D)."""
        intra_modal = cross_modal = z1.new_zeros(())
        if self.intra_weight:
            intra_modal = self.criterion(z1, z2)
        if self.cross_weight:
            cross_modal = self.criterion((z1 + z2) / 2, z_image)
        loss = self.intra_weight * intra_modal + self.cross_weight * cross_modal
        return CrossPointOutput(loss, intra_modal, cross_modal, z1, z2, z_image)

    def project_images(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, projection_dim); of (B, V, 3, H, W) the mean over the V images of each shape."""
        if images.dim() == 5:
            return self.project_images(images.flatten(0, 1)).unflatten(0, images.shape[:2]).mean(1)
        with torch.no_grad() if self.freeze_image_encoder else contextlib.nullcontext():
            feature = self.image_encoder(images)
        if self.image_projection is None:
            return self.image_encoder.projection(feature)
        width = self.image_projection[0].in_features
        if not isinstance(feature, Tensor) or feature.dim() != 2 or feature.shape[1] != width:
            got = tuple(feature.shape) if isinstance(feature, Tensor) else type(feature).__name__
            name = type(self.image_encoder).__name__
            raise ValueError(f"the image encoder ({name}) must return (B, {width}), got {got}")
        return self.image_projection(feature)

    def synchronise(self, group: ProcessGroup | None = None, *, exchange: str = "gather") -> CrossPoint:
        """Take negatives and batch statistics from all ranks of `group` (None: all there are), and return the model.

        `exchange`: how the ranks see each other's embeddings, as `NTXentLoss` has it.
        Then the loss is the same on every rank, and under DistributedDataParallel, which averages gradients, every
        parameter gets the gradient that one process would have given it with the batches of all ranks.
        """
        self.criterion.gather_over(group, exchange)
        return convert_sync_batch_norm(self, group)

    def train(self, mode: bool = True) -> CrossPoint:
        super().train(mode)
        if self.freeze_image_encoder:  # batch norm, too, stays as it is
            for name, child in self.image_encoder.named_children():
                child.train(mode and name == "projection")
            self.image_encoder.training = False
        return self


def _check_weights(intra: float, cross: float) -> None:
    if not (0 <= intra < float("inf") and 0 <= cross < float("inf")) or intra == cross == 0:
        raise ValueError(
            f"intra_weight and cross_weight must be numbers from 0 on, not both 0; got {intra} and {cross}"
        )


def _image_head(point_encoder: nn.Module, image_encoder: nn.Module, feature_dim: int | None) -> nn.Module:
    name = type(image_encoder).__name__
    if feature_dim is None:
        feature_dim = getattr(image_encoder, "feature_dim", None)
    if not isinstance(feature_dim, int):
        raise ValueError(
            f"the image encoder ({name}) has neither a `projection` module nor an integer `feature_dim`: "
            "pass image_feature_dim=, the width of the features that it returns"
        )
    projection_dim = getattr(point_encoder, "projection_dim", None)
    if not isinstance(projection_dim, int):
        raise ValueError(
            f"the point encoder ({type(point_encoder).__name__}) needs an integer `projection_dim`, the "
            f"output width of its `projection`, so that a head of the same width can be made for {name}"
        )
    return image_projection_head(feature_dim, projection_dim)


@dataclass(frozen=True)
class CrossPointConfig:
    """What `build` needs to make a CrossPoint; plain values, so that JSON and YAML hold it."""

    point_encoder: Literal["dgcnn", "dgcnn_part", "dgcnn_semantic", "pointnet"] = "dgcnn"
    """Encoder of the clouds, whose coordinates are all that it sees."""
    k: int = 20
    """Neighbours in its graphs, the point itself included; PointNet has none."""
    image_encoder: str = "resnet50"
    """Encoder of the images: resnet18, resnet50, or torchvision:NAME, timm:NAME, transformers:NAME where these are
    installed."""
    projection_dim: int = 256
    """Width of the space in which the losses compare."""
    temperature: float = 0.1
    """Temperature of both losses."""
    intra_weight: float = 1.0
    """Weight of the intra-modal loss; 0 leaves it out."""
    cross_weight: float = 1.0
    """Weight of the cross-modal loss; 0 leaves it out, and the images with it."""
    image_weights: Literal["random", "pretrained"] = "random"
    """Where the image encoder starts: "pretrained" is what torchvision (for resnet18 and resnet50, too), timm or
    transformers has for it, and may download it."""
    freeze_image_encoder: bool = False
    """Leave the image encoder as it starts, and train its projection alone."""

    def __post_init__(self):
        for field in ("point_encoder", "image_weights"):
            known = typing.get_args(typing.get_type_hints(type(self))[field])
            if getattr(self, field) not in known:
                raise ValueError(f"{field} must be one of {sorted(known)}, got {getattr(self, field)!r}")
        check_image_encoder(self.image_encoder)
        _check_weights(self.intra_weight, self.cross_weight)
        for field in ("k", "projection_dim"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{field} must be a positive integer, got {value!r}")
        if not isinstance(self.temperature, (int, float)) or not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be a positive number, got {self.temperature!r}")

    @property
    def point_options(self) -> dict[str, Any]:
        """The options with which `create` makes the point encoder."""
        options = {"k": self.k, "in_channels": 3, "projection_dim": self.projection_dim}
        return {key: options[key] for key in accepted(POINT_ENCODERS[self.point_encoder]) if key in options}

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CrossPointConfig:
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown CrossPointConfig keys {unknown}; known: {sorted(known)}")
        return cls(**values)


def build(config: CrossPointConfig, *, impl: str = "auto") -> CrossPoint:
    """A CrossPoint with fresh weights from torch's global generator (but for `image_weights`); `impl` is the operators'
    backend."""
    points = create(config.point_encoder, **config.point_options, impl=impl)
    images = create_image_encoder(
        config.image_encoder, weights=config.image_weights, projection_dim=config.projection_dim
    )
    return CrossPoint(
        points,
        images,
        temperature=config.temperature,
        intra_weight=config.intra_weight,
        cross_weight=config.cross_weight,
        freeze_image_encoder=config.freeze_image_encoder,
        impl=impl,
    )
