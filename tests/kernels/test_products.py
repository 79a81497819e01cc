"""Which product of the contrastive losses a dtype gets."""

import pytest
import torch

from crosspoint.kernels._precision import PRODUCTS, product_of


@pytest.fixture
def setting():
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(("name", "product"), [("highest", "tf32x3"), ("high", "tf32"), ("medium", "bf16")])
def test_float32_follows_the_setting(setting, name, product):
    setting(name)
    assert product_of(torch.float32) == product


@pytest.mark.parametrize("name", ["highest", "high", "medium"])
def test_other_types_have_their_own(setting, name):
    setting(name)
    found = [product_of(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float64)]
    assert found == ["bf16", "f16", "float64"]
    assert set(found) <= set(PRODUCTS)
