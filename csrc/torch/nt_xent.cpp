// NT-Xent, InfoNCE and the supervised contrastive loss for CPU tensors.
#include "crosspoint/nt_xent.h"

#include "common.h"

namespace crosspoint::binding {
namespace {

// What the rows are contrasted with, in the dtype that is computed in.
struct Columns {
  Columns(const Tensor& z, const Tensor& t, int64_t first_row, int64_t rows)
      : dtype(compute_dtype(z)), z1(dense(z, dtype)), temperature(dense(t, dtype)), first_row(first_row), rows(rows) {}

  void pair(const Tensor& z, bool within, bool both) {
    z2 = dense(z, dtype);
    within_views = within;
    symmetric = both;
  }

  template <class T>
  void fill(ContrastInput<T>& args) const {
    args.samples = z1.size(0);
    args.channels = z1.size(1);
    args.first_row = first_row;
    args.rows = rows;
    args.z1 = data<T>(z1);
    args.z2 = z2 ? data<T>(*z2) : nullptr;
    args.labels = labels ? data<int64_t>(*labels) : nullptr;
    args.temperature = double(*data<T>(temperature));
    args.within_views = within_views;
    args.symmetric = symmetric;
  }

  Tensor new_result(std::vector<int64_t> shape) const { return new_tensor(z1, shape, dtype); }
  Tensor new_gradient() const { return new_result({rows, z1.size(1)}); }

  ScalarType dtype;
  Tensor z1, temperature;
  int64_t first_row, rows;
  std::optional<Tensor> z2, labels;
  bool within_views = true;
  bool symmetric = false;
};

void run_forward(const Columns& columns, Tensor& loss, Tensor& row_losses, Tensor* row_lse) {
  with_compute_type(columns.dtype, [&](auto zero) {
    using T = decltype(zero);
    NtXentForward<T> args;
    columns.fill(args);
    args.loss = mutable_data<T>(loss);
    args.row_losses = mutable_data<T>(row_losses);
    args.row_lse = row_lse == nullptr ? nullptr : mutable_data<T>(*row_lse);
    nt_xent_forward(args, torch_pool());
  });
}

void run_backward(const Columns& columns, Tensor grad, Tensor row_losses, const Tensor* row_lse, Tensor& dz1,
                  Tensor* dz2, Tensor& dtemperature) {
  grad = dense(grad, columns.dtype);
  row_losses = dense(row_losses, columns.dtype);
  with_compute_type(columns.dtype, [&](auto zero) {
    using T = decltype(zero);
    NtXentBackward<T> args;
    columns.fill(args);
    args.grad = double(*data<T>(grad));
    args.row_losses = data<T>(row_losses);
    args.row_lse = row_lse == nullptr ? nullptr : data<T>(*row_lse);
    args.dz1 = mutable_data<T>(dz1);
    args.dz2 = dz2 == nullptr ? nullptr : mutable_data<T>(*dz2);
    args.dtemperature = mutable_data<T>(dtemperature);
    nt_xent_backward(args, torch_pool());
  });
}

std::tuple<Tensor, Tensor> nt_xent(Tensor z1, Tensor z2, Tensor temperature, bool within_views, bool symmetric,
                                   int64_t first_row, int64_t rows) {
  Columns columns(z1, temperature, first_row, rows);
  columns.pair(z2, within_views, symmetric);
  Tensor loss = columns.new_result({}), row_losses = columns.new_result({2, rows});
  run_forward(columns, loss, row_losses, nullptr);
  return {loss, row_losses};
}

std::tuple<Tensor, Tensor, Tensor> nt_xent_backward_operator(Tensor grad, Tensor z1, Tensor z2, Tensor temperature,
                                                             Tensor row_losses, bool within_views, bool symmetric,
                                                             int64_t first_row, int64_t rows) {
  Columns columns(z1, temperature, first_row, rows);
  columns.pair(z2, within_views, symmetric);
  Tensor dz1 = columns.new_gradient(), dz2 = columns.new_gradient(), dtemperature = columns.new_result({});
  run_backward(columns, grad, row_losses, nullptr, dz1, &dz2, dtemperature);
  return {dense(dz1, z1.scalar_type()), dense(dz2, z1.scalar_type()), dtemperature};
}

std::tuple<Tensor, Tensor, Tensor> sup_con(Tensor z, Tensor labels, Tensor temperature, int64_t first_row,
                                           int64_t rows) {
  Columns columns(z, temperature, first_row, rows);
  columns.labels = dense(labels, ScalarType::Long);
  Tensor loss = columns.new_result({}), row_losses = columns.new_result({rows}), row_lse = columns.new_result({rows});
  run_forward(columns, loss, row_losses, &row_lse);
  return {loss, row_losses, row_lse};
}

std::tuple<Tensor, Tensor> sup_con_backward(Tensor grad, Tensor z, Tensor labels, Tensor temperature,
                                            Tensor row_losses, Tensor row_lse, int64_t first_row, int64_t rows) {
  Columns columns(z, temperature, first_row, rows);
  columns.labels = dense(labels, ScalarType::Long);
  row_lse = dense(row_lse, columns.dtype);
  Tensor dz = columns.new_gradient(), dtemperature = columns.new_result({});
  run_backward(columns, grad, row_losses, &row_lse, dz, nullptr, dtemperature);
  return {dense(dz, z.scalar_type()), dtemperature};
}

// Rows against columns that visit them, in the dtype that is computed in.
struct Visit {
  Visit(const Tensor& z, const Tensor& columns, const Tensor& temperature)
      : dtype(compute_dtype(z)), z(dense(z, dtype)), columns(dense(columns, dtype)), t(dense(temperature, dtype)) {}

  template <class T>
  void fill(ContrastVisit<T>& args) const {
    args.rows = z.size(0);
    args.columns = columns.size(0);
    args.channels = z.size(1);
    args.z = data<T>(z);
    args.visiting = data<T>(columns);
    args.temperature = double(*data<T>(t));
  }

  ScalarType dtype;
  Tensor z, columns, t;
};

Tensor nt_xent_visit(Tensor z, Tensor columns, Tensor temperature) {
  const Visit visit(z, columns, temperature);
  Tensor lse = new_tensor(z, {z.size(0)}, ScalarType::Double);
  with_compute_type(visit.dtype, [&](auto zero) {
    ContrastVisitForward<decltype(zero)> args;
    visit.fill(args);
    args.lse = mutable_data<double>(lse);
    contrast_visit_forward(args, torch_pool());
  });
  return lse;
}

// `largest` is for GPUs: no softmax exceeds it.
std::tuple<Tensor, Tensor> nt_xent_visit_backward(Tensor z, Tensor columns, Tensor temperature, Tensor row_lse,
                                                  Tensor column_lse, Tensor /*largest*/) {
  const Visit visit(z, columns, temperature);
  row_lse = dense(row_lse, ScalarType::Double);
  column_lse = dense(column_lse, ScalarType::Double);
  Tensor sums = new_tensor(z, {z.size(0), z.size(1)}, visit.dtype), moment = new_tensor(z, {}, ScalarType::Double);
  with_compute_type(visit.dtype, [&](auto zero) {
    using T = decltype(zero);
    ContrastVisitBackward<T> args;
    visit.fill(args);
    args.row_lse = data<double>(row_lse);
    args.column_lse = data<double>(column_lse);
    args.sums = mutable_data<T>(sums);
    args.moment = mutable_data<double>(moment);
    contrast_visit_backward(args, torch_pool());
  });
  return {sums, moment};
}

}  // namespace
}  // namespace crosspoint::binding

STABLE_TORCH_LIBRARY_IMPL(crosspoint, CPU, m) {
  m.impl("nt_xent", TORCH_BOX(&crosspoint::binding::nt_xent));
  m.impl("nt_xent_backward", TORCH_BOX(&crosspoint::binding::nt_xent_backward_operator));
  m.impl("nt_xent_visit", TORCH_BOX(&crosspoint::binding::nt_xent_visit));
  m.impl("nt_xent_visit_backward", TORCH_BOX(&crosspoint::binding::nt_xent_visit_backward));
  m.impl("sup_con", TORCH_BOX(&crosspoint::binding::sup_con));
  m.impl("sup_con_backward", TORCH_BOX(&crosspoint::binding::sup_con_backward));
}
