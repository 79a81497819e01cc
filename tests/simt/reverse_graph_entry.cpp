// csrc/cuda/reverse_graph.cu for ctypes.
#include "crosspoint/cuda/reverse_graph.h"

using namespace crosspoint;

#pragma GCC visibility push(default)
extern "C" {

int64_t reverse_graph_workspace_bytes(const cuda::ReverseGraphArgs* args) {
  return static_cast<int64_t>(cuda::reverse_graph_workspace(*args));
}

int reverse_graph(const cuda::ReverseGraphArgs* args, void* workspace) {
  return cuda::reverse_graph(*args, workspace, nullptr);
}
}
