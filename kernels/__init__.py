"""Triton kernels, installed as crosspoint.kernels. This version has none; every op runs on its C++ or reference backend."""
