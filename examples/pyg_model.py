# %% [markdown]
# # A PyTorch Geometric model
# `crosspoint.interop.pyg` has PyG's `DynamicEdgeConv`, with its constructor and call. A module written for PyG takes
# the other import and is fused: same weights, same output. Here it classifies spheres, cubes and cylinders of 128
# points.

# %%
import torch
from torch import nn
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader
from torch_geometric.nn import global_max_pool

from crosspoint.interop.pyg import DynamicEdgeConv

torch.manual_seed(0)


def shape(kind, points=128):
    x = torch.randn(points, 3)
    if kind == 0:
        x = x / x.norm(dim=1, keepdim=True)  # sphere
    elif kind == 1:
        x = x / x.abs().amax(1, keepdim=True)  # cube
    else:
        x = torch.cat([x[:, :2] / x[:, :2].norm(dim=1, keepdim=True), x[:, 2:].clamp(-1, 1)], 1)  # cylinder
    return Data(pos=x @ torch.linalg.qr(torch.randn(3, 3)).Q, y=torch.tensor([kind]))


def block(c_in, c_out):
    return nn.Sequential(nn.Linear(2 * c_in, c_out, bias=False), nn.BatchNorm1d(c_out), nn.LeakyReLU(0.2))


# %%
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = DynamicEdgeConv(block(3, 32), k=12)
        self.conv2 = DynamicEdgeConv(block(32, 64), k=12)
        self.head = nn.Linear(64, 3)

    def forward(self, pos, batch):
        x = self.conv1(pos, batch)
        return self.head(global_max_pool(self.conv2(x, batch), batch))


train = DataLoader([shape(i % 3) for i in range(180)], batch_size=12, shuffle=True)
test = DataLoader([shape(i % 3) for i in range(90)], batch_size=90)
model = Model()
optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
for _ in range(6):
    for data in train:
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(data.pos, data.batch), data.y).backward()
        optimiser.step()

# %%
model.eval()
with torch.no_grad():
    (data,) = test
    accuracy = (model(data.pos, data.batch).argmax(1) == data.y).float().mean().item()
print(f"test accuracy: {accuracy:.1%}")
