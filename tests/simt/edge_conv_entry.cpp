// The leaves of csrc/cuda/edge_conv*.cu for ctypes, with the arguments of the operators that bind them.
#include "crosspoint/cuda/edge_conv.h"
#include "crosspoint/cuda/edge_layer.h"
#include "crosspoint/cuda/reverse_graph.h"

using namespace crosspoint;
using namespace crosspoint::cuda;

namespace {

template <class F>
int with_type(int64_t is_double, F&& f) {
  return is_double != 0 ? f(double{}) : f(float{});
}

template <class T>
EdgeLayer<T> layer_of(int64_t batch, int64_t in_channels, int64_t width, int64_t out_channels, const void* weight,
                      const void* gamma, int64_t signs) {
  return {batch, in_channels, width, out_channels, static_cast<const T*>(weight), static_cast<const T*>(gamma), signs};
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

int degrees(const int64_t* idx, int64_t batch, int64_t n, int64_t k, int32_t* degrees) {
  return edge_conv_degrees({idx, batch, n, k}, degrees, nullptr);
}

int centre(int64_t is_double, int64_t batch, int64_t n, int64_t channels, const void* x, const int32_t* degrees,
           void* centre) {
  return with_type(is_double, [&](auto zero) {
    using T = decltype(zero);
    return edge_conv_centre(
        EdgeConvCentreArgs<T>{batch, n, channels, static_cast<const T*>(x), degrees, static_cast<T*>(centre)}, nullptr);
  });
}

int subtract(int64_t is_double, int64_t batch, int64_t n, int64_t channels, const void* x, void* centre,
             const int32_t* degrees, void* out) {
  return with_type(is_double, [&](auto zero) {
    using T = decltype(zero);
    return edge_conv_subtract(
        EdgeConvCentreArgs<T>{batch, n, channels, static_cast<const T*>(x), degrees, static_cast<T*>(centre)},
        static_cast<T*>(out), nullptr);
  });
}

int neighbor_sum(int64_t is_double, const int64_t* idx, int64_t batch, int64_t n, int64_t k, int64_t channels,
                 const void* x, void* out) {
  return with_type(is_double, [&](auto zero) {
    using T = decltype(zero);
    return edge_conv_neighbor_sum(
        EdgeConvSumArgs<T>{{idx, batch, n, k}, channels, static_cast<const T*>(x), static_cast<T*>(out)}, nullptr);
  });
}

int moments(int64_t is_double, int64_t batch, int64_t n, int64_t channels, int64_t parts, const void* x,
            const void* sums, const int32_t* degrees, void* gram, double* first) {
  return with_type(is_double, [&](auto zero) {
    using T = decltype(zero);
    return edge_conv_moments(EdgeConvMomentsArgs<T>{batch, n, channels, parts, static_cast<const T*>(x),
                                                    static_cast<const T*>(sums), degrees, static_cast<T*>(gram), first},
                             nullptr);
  });
}

int sum_parts(int64_t is_double, int64_t batch, int64_t parts, int64_t channels, const void* gram, const double* first,
              double* moments) {
  return with_type(is_double, [&](auto zero) {
    using T = decltype(zero);
    return edge_sum_parts(
        EdgeSumPartsArgs<T>{batch, parts, channels, static_cast<const T*>(gram), first, moments}, nullptr);
  });
}

int norm(int64_t is_double, int64_t batch, int64_t in_channels, int64_t width, int64_t out_channels, const double* moments,
         int64_t parts, const double* partial, const void* weight, const void* gamma, const void* beta, int64_t signs,
         void* running_mean, void* running_var, int64_t running_double, const void* centre, int64_t centre_double,
         const double* edges, double momentum, double eps, void* halves, double* offset, double* rstd, void* scale,
         void* shift) {
  return with_type(is_double, [&](auto zero) {
    using T = decltype(zero);
    const EdgeLayer<T> layer = layer_of<T>(batch, in_channels, width, out_channels, weight, gamma, signs);
    const EdgeNorm<T> norm{edges,        centre,         centre_double, static_cast<const T*>(beta),
                           running_mean, running_var,    running_double, momentum,
                           eps,          offset,         rstd,          static_cast<T*>(scale),
                           static_cast<T*>(shift)};
    if (halves == nullptr) return edge_sums_norm(EdgeSumsNormArgs<T>{layer, parts, partial, norm}, nullptr);
    return edge_norm(EdgeNormArgs<T>{layer, moments, norm, static_cast<T*>(halves)}, nullptr);
  });
}

int pivot(int64_t is_double, int64_t batch, int64_t channels, const void* gamma, const void* beta, const double* rstd,
          const double* offset, double negative_slope, double* pivot) {
  return with_type(is_double, [&](auto zero) {
    using T = decltype(zero);
    return edge_pivot(EdgePivotArgs<T>{batch, channels, static_cast<const T*>(gamma), static_cast<const T*>(beta), rstd,
                                       offset, negative_slope, pivot},
                      nullptr);
  });
}

int affine(int64_t is_double, int64_t batch, int64_t channels, const void* gamma, const void* beta, int64_t signs,
           const double* rstd, const double* offset, void* scale, void* shift) {
  return with_type(is_double, [&](auto zero) {
    using T = decltype(zero);
    return edge_affine(EdgeAffineArgs<T>{batch, channels, static_cast<const T*>(gamma), static_cast<const T*>(beta), signs,
                                         rstd, offset, static_cast<T*>(scale), static_cast<T*>(shift)},
                       nullptr);
  });
}

int norm_gradient(int64_t is_double, int64_t batch, int64_t parts, int64_t channels, const double* partial,
                  const void* gamma, int64_t signs, const double* offset, const double* rstd, const double* edges,
                  void* grad_gamma, void* grad_beta, double* sum, double* mean_term, double* slope_term) {
  return with_type(is_double, [&](auto zero) {
    using T = decltype(zero);
    return edge_norm_gradient(
        EdgeNormGradientArgs<T>{batch, parts, channels, partial, static_cast<const T*>(gamma), signs, offset, rstd, edges,
                                static_cast<T*>(grad_gamma), static_cast<T*>(grad_beta), sum, mean_term, slope_term},
        nullptr);
  });
}

int input_terms(int64_t is_double, int64_t batch, int64_t in_channels, int64_t width, int64_t out_channels,
                const void* weight, const void* gamma, int64_t signs, const double* rstd, const double* mean_term, const double* slope_term,
                void* halves, void* constant, void* square) {
  return with_type(is_double, [&](auto zero) {
    using T = decltype(zero);
    return edge_input_terms(
        EdgeInputTermsArgs<T>{
            layer_of<T>(batch, in_channels, width, out_channels, weight, gamma, signs), rstd, mean_term, slope_term, static_cast<T*>(halves), static_cast<T*>(constant), static_cast<T*>(square)},
        nullptr);
  });
}

int weight_gradient(int64_t is_double, int64_t batch, int64_t in_channels, int64_t width, int64_t out_channels,
                    const void* sparse, const void* weight, const void* gamma, int64_t signs, const double* rstd,
                    const void* centre, int64_t centre_double, const double* edges, const double* mean_term, const double* slope_term, const double* moments,
                    double* sum, void* grad) {
  return with_type(is_double, [&](auto zero) {
    using T = decltype(zero);
    return edge_weight_gradient(
        EdgeWeightGradientArgs<T>{
            layer_of<T>(batch, in_channels, width, out_channels, weight, gamma, signs), static_cast<const T*>(sparse),
            rstd, centre, centre_double, edges, mean_term, slope_term, moments, sum,
            static_cast<T*>(grad)},
        nullptr);
  });
}

int gather_max(int64_t is_double, const int64_t* idx, int64_t batch, int64_t n, int64_t k, int64_t channels,
               const void* nodes, const void* gamma, const void* scale, const void* shift, double negative_slope,
               void* out, void* winner, void* slot, int64_t slot_bytes) {
  return with_type(is_double, [&](auto zero) {
    using T = decltype(zero);
    return edge_conv_max(
        EdgeConvMaxArgs<T>{{idx, batch, n, k}, channels, static_cast<const T*>(nodes), static_cast<const T*>(gamma),
                           static_cast<const T*>(scale), static_cast<const T*>(shift), negative_slope,
                           static_cast<T*>(out), static_cast<T*>(winner), slot, static_cast<int>(slot_bytes)},
        nullptr);
  });
}

int winner_gradient(int64_t is_double, int64_t batch, int64_t n, int64_t channels, int64_t parts, const void* grad,
                    const void* winner, const int32_t* degrees, const void* scale, const void* shift,
                    double negative_slope, void* routed, int64_t stride, double* sums) {
  return with_type(is_double, [&](auto zero) {
    using T = decltype(zero);
    return edge_conv_winner_gradient(
        EdgeConvGradientArgs<T>{batch, n, channels, parts, static_cast<const T*>(grad), static_cast<const T*>(winner),
                                degrees, static_cast<const T*>(scale), static_cast<const T*>(shift), negative_slope,
                                static_cast<T*>(routed), stride, sums},
        nullptr);
  });
}

int64_t reverse_graph_bytes(const int64_t* idx, int64_t batch, int64_t nodes, int64_t k, int64_t n) {
  return static_cast<int64_t>(reverse_graph_workspace({idx, batch, nodes, k, n, nullptr, nullptr}));
}

int turn_graph(const int64_t* idx, int64_t batch, int64_t nodes, int64_t k, int64_t n, int32_t* start, int32_t* edges,
               void* workspace) {
  return reverse_graph({idx, batch, nodes, k, n, start, edges}, workspace, nullptr);
}

int route(int64_t is_double, const int32_t* start, const int32_t* edges, int64_t batch, int64_t n, int64_t k,
          int64_t channels, const void* slot, int64_t slot_bytes, void* routed) {
  return with_type(is_double, [&](auto zero) {
    using T = decltype(zero);
    return edge_conv_route(EdgeConvRouteArgs<T>{{start, edges, batch, n, k}, channels, slot,
                                                static_cast<int>(slot_bytes), static_cast<T*>(routed)},
                           nullptr);
  });
}

int dense_gradient(int64_t is_double, const int32_t* start, const int32_t* edges, int64_t batch, int64_t n, int64_t k,
                   int64_t channels, const void* x, const void* sums, const int32_t* degrees, const void* constant,
                   void* dense, void* grad_x) {
  return with_type(is_double, [&](auto zero) {
    using T = decltype(zero);
    return edge_conv_dense_gradient(
        EdgeConvDenseArgs<T>{{start, edges, batch, n, k}, channels, static_cast<const T*>(x),
                             static_cast<const T*>(sums), degrees, static_cast<const T*>(constant),
                             static_cast<T*>(dense), static_cast<T*>(grad_x)},
        nullptr);
  });
}
}
