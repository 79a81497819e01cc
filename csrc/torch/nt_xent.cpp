// NT-Xent and InfoNCE for CPU tensors.
#include "crosspoint/nt_xent.h"

#include "common.h"

namespace crosspoint::binding {
namespace {

template <class T>
void fill_input(ContrastInput<T>& args, const Tensor& z1, const Tensor& z2, const Tensor& temperature,
                bool within_views, bool symmetric) {
  args.samples = z1.size(0);
  args.channels = z1.size(1);
  args.z1 = data<T>(z1);
  args.z2 = data<T>(z2);
  args.temperature = double(*data<T>(temperature));
  args.within_views = within_views;
  args.symmetric = symmetric;
}

std::tuple<Tensor, Tensor> nt_xent(Tensor z1, Tensor z2, Tensor temperature, bool within_views,
                                   bool symmetric) {
  const ScalarType dtype = compute_dtype(z1);
  z1 = dense(z1, dtype);
  z2 = dense(z2, dtype);
  temperature = dense(temperature, dtype);
  Tensor loss = new_tensor(z1, {}, dtype);
  Tensor row_losses = new_tensor(z1, {2, z1.size(0)}, dtype);
  with_compute_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    NtXentForward<T> args;
    fill_input(args, z1, z2, temperature, within_views, symmetric);
    args.loss = mutable_data<T>(loss);
    args.row_losses = mutable_data<T>(row_losses);
    nt_xent_forward(args, torch_pool());
  });
  return {loss, row_losses};
}

std::tuple<Tensor, Tensor, Tensor> nt_xent_backward(Tensor grad, Tensor z1, Tensor z2, Tensor temperature,
                                                    Tensor row_losses, bool within_views, bool symmetric) {
  const ScalarType output = z1.scalar_type(), dtype = compute_dtype(z1);
  z1 = dense(z1, dtype);
  z2 = dense(z2, dtype);
  temperature = dense(temperature, dtype);
  grad = dense(grad, dtype);
  row_losses = dense(row_losses, dtype);
  Tensor dz1 = new_tensor(z1, {z1.size(0), z1.size(1)}, dtype);
  Tensor dz2 = new_tensor(z1, {z1.size(0), z1.size(1)}, dtype);
  Tensor dtemperature = new_tensor(z1, {}, dtype);
  with_compute_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    NtXentBackward<T> args;
    fill_input(args, z1, z2, temperature, within_views, symmetric);
    args.grad = double(*data<T>(grad));
    args.row_losses = data<T>(row_losses);
    args.dz1 = mutable_data<T>(dz1);
    args.dz2 = mutable_data<T>(dz2);
    args.dtemperature = mutable_data<T>(dtemperature);
    crosspoint::nt_xent_backward(args, torch_pool());
  });
  return {dense(dz1, output), dense(dz2, output), dtemperature};
}

}  // namespace
}  // namespace crosspoint::binding

STABLE_TORCH_LIBRARY_IMPL(crosspoint, CPU, m) {
  m.impl("nt_xent", TORCH_BOX(&crosspoint::binding::nt_xent));
  m.impl("nt_xent_backward", TORCH_BOX(&crosspoint::binding::nt_xent_backward));
}
