// How tensor cores multiply.
#pragma once

namespace crosspoint::cuda {

// In the order of crosspoint.kernels._precision.PRODUCTS. tf32x3 keeps the digits of float32 by three products of tf32;
// float64 is multiplied without tensor cores.
enum class Product : int { bf16, f16, tf32, tf32x3, float64 };

}  // namespace crosspoint::cuda
