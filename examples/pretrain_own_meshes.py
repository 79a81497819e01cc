# %% [markdown]
# # Pre-training on your own meshes
# A folder of .off, .obj, .ply, .stl or .glb files, one sub-folder per class (classes are only names here: no label is
# used), becomes pairs of points and rendered views; then an encoder is trained on them. `crosspoint prepare` and
# `crosspoint pretrain` do the same from a shell. The sizes are for seconds on a CPU: drop `points`, `image_size`,
# `epochs` and `model` for the paper's.

# %%
import tempfile
from pathlib import Path

from crosspoint.data.generated import write_meshes
from crosspoint.data.prepare import PrepareConfig, prepare
from crosspoint.models import CrossPointConfig, checkpoints
from crosspoint.train import PretrainConfig, pretrain

work = Path(tempfile.mkdtemp())
meshes = work / "meshes"  # yours; these stand in for them
write_meshes(meshes, per_class=4, seed=0, classes=["chair", "lamp", "table"])

# %%
report = prepare(
    PrepareConfig(str(meshes), str(work / "pairs"), points=256, views=2, image_size=32, workers=0)
)
print(f"{report.prepared} of {report.shapes} shapes prepared")

# %%
config = PretrainConfig(
    data=str(work / "pairs"),
    out=str(work / "run"),
    epochs=2,
    batch_size=6,
    points=128,
    image_size=32,
    workers=0,
    device="cpu",
    model=CrossPointConfig(k=8, image_encoder="resnet18", projection_dim=64),
)
summary = pretrain(config)
print(f"{summary['steps']} steps, loss {summary['loss']:.2f}")

# %% [markdown]
# The run folder is all that is needed later: the file of weights says what model they belong to.

# %%
model = checkpoints.load_model(work / "run")
print(f"encoder of {model.point_encoder.feature_dim} features, from {work / 'run'}")
