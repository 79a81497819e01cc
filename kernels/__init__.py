"""Triton kernels, installed as crosspoint.kernels. This version has none: ops run in C++ or on the reference."""
