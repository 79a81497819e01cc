# %% [markdown]
# # One operator in foreign code
# A DGCNN written the usual way finds neighbours through the matrix of all distances and `topk`. Only that function
# changes here: same name, same (B, C, N) layout, same result. The rest of the model does not notice.

# %%
import torch

import crosspoint
from crosspoint.ops import knn_graph
from crosspoint.testing import assert_same_graph


def knn_by_matrix(x, k):  # (B, C, N) -> (B, N, k)
    squares = x.square().sum(1)
    distances = squares[:, :, None] - 2 * x.transpose(1, 2) @ x + squares[:, None]
    return distances.topk(k, largest=False).indices


def knn(x, k):  # (B, C, N) -> (B, N, k)
    return knn_graph(x.transpose(1, 2), k)


# %% [markdown]
# The model's own function, which stays as it is: edge features from whatever `find` finds.


# %%
def get_graph_feature(x, k, find):  # (B, C, N) -> (B, 2C, N, k)
    idx = find(x, k)
    rows = x.transpose(1, 2)
    neighbours = rows[torch.arange(len(x))[:, None, None], idx]
    centres = rows[:, :, None].expand_as(neighbours)
    return torch.cat([neighbours - centres, centres], -1).permute(0, 3, 1, 2)


torch.manual_seed(0)
x = torch.randn(8, 3, 1024)
before = get_graph_feature(x, 20, knn_by_matrix).amax(-1)
after = get_graph_feature(x, 20, knn).amax(-1)
assert_same_graph(knn(x, 20), knn(x.double(), 20), x.transpose(1, 2))
same = (before == after).float().mean().item()
print(f"maxima over neighbours that are equal: {same:.2%}")

# %% [markdown]
# Where a call runs, and what could run it:

# %%
print(crosspoint.explain(knn_graph, x.transpose(1, 2), 20))
