"""The layer that wraps Transformer Engine's linear, on a stand-in with the same contract
(its v2.12), because that needs a GPU.

The contract: with delayed weight gradients a backward pass queues the product, returns a
placeholder for the weight's gradient, and the bias's gradient only where the product does
not make it (FP8, row-parallel). The product adds the weight's gradient to `main_grad`.
"""

import queue
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from megatron_apt.models.parameters import frozen
from megatron_apt.models.spec import _Layer
from megatron_apt.parallel.deferred import WeightGradients, deferring


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, x, bias, layer):
        ctx.save_for_backward(weight, x)
        ctx.layer, ctx.requires_wgrad = layer, weight.requires_grad
        return x @ weight.t() + bias

    @staticmethod
    def backward(ctx, dy):
        weight, x = ctx.saved_tensors
        layer = ctx.layer

        def product(x, dy):
            layer.weight.main_grad.addmm_(dy.t(), x)
            return None, dy.sum(0) if layer.bias_in_product else None

        if not ctx.requires_wgrad:
            return None, dy @ weight, None, None
        layer.wgrad_store.put((x, dy), product)
        return torch.full_like(weight, 99.0), dy @ weight, None if layer.bias_in_product else dy.sum(0), None


class Store:
    def __init__(self):
        self.context = queue.Queue()

    def put(self, tensors, product):
        self.context.put((tensors, product))

    def pop(self):
        tensors, product = self.context.get_nowait()
        return product(*tensors), tensors


class Linear(nn.Module):
    def __init__(self, width_in, width_out, bias_in_product):
        super().__init__()
        self.config, self.bias_in_product = SimpleNamespace(delay_wgrad_compute=True), bias_in_product
        self.weight = nn.Parameter(torch.randn(width_out, width_in, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(width_out, dtype=torch.float64))
        for p in (self.weight, self.bias):
            p.main_grad = torch.zeros_like(p)
        self.wgrad_store = Store()

    def forward(self, x):
        return Product.apply(self.weight, x, self.bias, self), None


class Wrapped(_Layer, Linear):
    pass


@pytest.mark.parametrize("bias_in_product", [True, False])
def test_weight_gradients_of_microbatches_on_their_way_add_up(bias_in_product):
    """Two input gradients before the first weight gradient, as interleaved schedules have
    it, and a frozen pass between.
    """
    torch.manual_seed(5)
    layer = Wrapped(5, 3, bias_in_product)
    batches = [torch.randn(7, 5, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    stores = [WeightGradients() for _ in batches]
    for i, (x, store) in enumerate(zip(batches, stores, strict=True)):
        with deferring(store):
            if i == 1:
                with frozen(layer):
                    layer(x)[0].square().sum().backward()
            else:
                layer(x)[0].square().sum().backward()
        assert layer.weight.grad is None and layer.bias.grad is None
    for store in stores:
        store.run()
    whole = torch.cat([batches[0], batches[2]]).detach()
    weight, bias = (p.detach().clone().requires_grad_() for p in (layer.weight, layer.bias))
    (whole @ weight.t() + bias).square().sum().backward()
    torch.testing.assert_close(layer.weight.main_grad, weight.grad)
    torch.testing.assert_close(layer.bias.main_grad, bias.grad)
    x = batches[1].detach().requires_grad_()
    (x @ weight.t() + bias).square().sum().backward()
    torch.testing.assert_close(batches[1].grad, x.grad)
    assert layer.wgrad_store.context.empty()
