"""Pre-training: the recipe, the loop, the state of a run."""

from crosspoint.train.config import PretrainConfig, load_config, save_config
from crosspoint.train.pretrain import pretrain

__all__ = ["PretrainConfig", "load_config", "pretrain", "save_config"]
