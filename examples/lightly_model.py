# %% [markdown]
# # A lightly model
# A SimCLR loop as lightly's examples have it, on point clouds: encoder, projection head, two views, NT-Xent. The loss
# is `crosspoint.interop.lightly.NTXentLoss`, with lightly's constructor and call. Where lightly is installed its
# projection head is used; the loop is the same without it.

# %%
import torch
from torch import nn

from crosspoint.data import CloudAugmentation
from crosspoint.interop.lightly import NTXentLoss
from crosspoint.nn import DynamicEdgeConv

try:
    from lightly.models.modules import SimCLRProjectionHead
except ImportError:

    class SimCLRProjectionHead(nn.Sequential):
        def __init__(self, width, hidden, out):
            super().__init__(
                nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, out)
            )


# %%
class SimCLR(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = DynamicEdgeConv(3, 32, k=12)
        self.conv2 = DynamicEdgeConv(32, 64, k=12)
        self.projection_head = SimCLRProjectionHead(64, 64, 32)

    def forward(self, points):  # (B, N, 3)
        return self.projection_head(self.conv2(self.conv1(points)).amax(1))


torch.manual_seed(0)
generator = torch.Generator().manual_seed(0)
clouds = torch.randn(64, 128, 3) * torch.rand(64, 1, 3)  # ellipsoids, each of its own proportions
view = CloudAugmentation()
model = SimCLR()
criterion = NTXentLoss(temperature=0.2)
optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)

# %%
for step in range(40):
    x0, x1 = view(clouds, generator), view(clouds, generator)
    loss = criterion(model(x0), model(x1))
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    if step in (0, 39):
        print(f"step {step}: loss {loss.item():.3f}")
