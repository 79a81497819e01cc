// Marks functions that the GPU runs too.
#pragma once

#if defined(__CUDACC__)
#define CROSSPOINT_HD __host__ __device__
#else
#define CROSSPOINT_HD
#endif
