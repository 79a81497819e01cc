# %% [markdown]
# # Linear probe
# How much of the classes do an encoder's frozen features hold? Embed labelled clouds, fit a linear classifier on some
# of them, score it on the rest. `crosspoint evaluate svm RUN` does this on ModelNet40 with the paper's protocol; here
# it is by hand, on built-in shapes, with a random encoder.

# %%
import numpy as np
import torch
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from crosspoint.data.generated import make_mesh
from crosspoint.evaluate.features import embed
from crosspoint.models import DGCNN

classes = ["chair", "lamp", "table", "rocket", "bench", "arrow"]
shapes = [(label, number) for label in range(len(classes)) for number in range(20)]
clouds = np.stack(
    [make_mesh(classes[label], number, seed=0).sample(256, seed=number) for label, number in shapes]
)
clouds -= clouds.mean(1, keepdims=True)
clouds /= np.linalg.norm(clouds, axis=2).max(1)[:, None, None]
labels = np.array([label for label, _ in shapes])
test = np.array([number >= 10 for _, number in shapes])

# %% [markdown]
# For a pre-trained encoder: `crosspoint.models.checkpoints.load_model(RUN).point_encoder`.

# %%
torch.manual_seed(0)
encoder = DGCNN(k=10)
features = embed(encoder, clouds.astype(np.float32), batch_size=24)  # (120, 2048)
probe = make_pipeline(StandardScaler(), LinearSVC(C=0.01, random_state=0)).fit(features[~test], labels[~test])
accuracy = probe.score(features[test], labels[test])
print(f"accuracy on {test.sum()} clouds: {accuracy:.1%}; guessing gives {1 / len(classes):.1%}")
