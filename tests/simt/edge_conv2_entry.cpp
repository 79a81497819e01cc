// The leaves of csrc/cuda/edge_conv2*.cu for ctypes, with the arguments of the operators that bind them; those that it
// shares with edge_conv are in edge_conv_entry.cpp.
#include "crosspoint/cuda/edge_conv2.h"

using namespace crosspoint;
using namespace crosspoint::cuda;

namespace {

template <class F>
int with_type(int64_t is_double, F&& f) {
  return is_double != 0 ? f(double{}) : f(float{});
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// What every tile is given.
struct Tiles {
  int64_t is_double, batch, n, k, c_mid, c_out;
  const int64_t* idx;
  const void *nodes, *gain, *shift;
  double negative_slope;
  int64_t product;
  const void *g, *slot, *rows, *q;  // of the backward pass
  int64_t slot_bytes, row_count;
};

}

namespace {

template <class T>
EdgeTiles<T> tiles_of(const Tiles& t) {
  return {{t.idx, t.batch, t.n, t.k},        t.c_mid,         static_cast<const T*>(t.nodes),
          static_cast<const T*>(t.gain),     static_cast<const T*>(t.shift),
          t.negative_slope,                  static_cast<Product>(t.product)};
}

template <class T>
EdgeTileGradientArgs<T> gradient_of(const Tiles& t) {
  return {tiles_of<T>(t),
          t.c_out,
          static_cast<const T*>(t.g),
          t.slot,
          static_cast<int>(t.slot_bytes),
          static_cast<const T*>(t.rows),
          t.row_count,
          static_cast<const T*>(t.q)};
}

}  // namespace

extern "C" {

int tile_max(const Tiles* t, const void* weight, const void* gamma, void* winner, void* slot, double* sums) {
  return with_type(t->is_double, [&](auto zero) {
    using T = decltype(zero);
    return edge_tile_max(EdgeTileMaxArgs<T>{tiles_of<T>(*t), t->c_out, static_cast<const T*>(weight),
                                            static_cast<const T*>(gamma), static_cast<T*>(winner), slot,
                                            static_cast<int>(t->slot_bytes), sums},
                         nullptr);
  });
}

int activate(int64_t is_double, int64_t batch, int64_t n, int64_t channels, const void* winner, const int32_t* degrees,
             const void* scale, const void* shift, double negative_slope, void* out) {
  return with_type(is_double, [&](auto zero) {
    using T = decltype(zero);
    return edge_activate(
        EdgeActivateArgs<T>{batch, n, channels, static_cast<const T*>(winner), degrees, static_cast<const T*>(scale),
                            static_cast<const T*>(shift), negative_slope, static_cast<T*>(out)},
        nullptr);
  });
}

int own_gradient(const Tiles* t, void* routed, double* sums) {
  return with_type(t->is_double, [&](auto zero) {
    using T = decltype(zero);
    return edge_own_gradient(gradient_of<T>(*t), static_cast<T*>(routed), sums, nullptr);
  });
}

int neighbour_gradient(const Tiles* t, const int32_t* start, const int32_t* edges, void* runs) {
  return with_type(t->is_double, [&](auto zero) {
    using T = decltype(zero);
    return edge_neighbour_gradient(gradient_of<T>(*t), {start, edges, t->batch, t->n, t->k}, static_cast<T*>(runs),
                                   nullptr);
  });
}

int add_runs(int64_t is_double, const void* runs, const int32_t* start, int64_t batch, int64_t n, int64_t k,
             int64_t c_mid, void* routed) {
  return with_type(is_double, [&](auto zero) {
    using T = decltype(zero);
    return edge_add_runs(static_cast<const T*>(runs), {start, nullptr, batch, n, k}, c_mid, static_cast<T*>(routed),
                         nullptr);
  });
}

int products(const Tiles* t, int64_t parts, void* out) {
  return with_type(t->is_double, [&](auto zero) {
    using T = decltype(zero);
    return edge_products(gradient_of<T>(*t), parts, static_cast<T*>(out), nullptr);
  });
}
}
