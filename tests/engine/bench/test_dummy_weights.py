import pytest
import torch
from engine.devices import DEVICES
from octavo_engine.loading.dummy_weights import fill_dummy_parameters
from torch import nn


def model(*names: str) -> nn.Module:
    with torch.device("meta"):
        layers = {"linear": nn.Linear(64, 320), "norm": nn.LayerNorm(64), "embedding": nn.Embedding(100, 64)}
        return nn.ModuleDict({name: layers[name] for name in names})


@pytest.mark.parametrize("device", DEVICES)
def test_matrices_are_normal_norms_one_and_biases_zero(device: str) -> None:
    filled = model("linear", "norm", "embedding")
    fill_dummy_parameters(filled, torch.bfloat16, torch.device(device), seed=0)
    values = dict(filled.named_parameters())
    assert {(each.dtype, each.device.type) for each in values.values()} == {(torch.bfloat16, device)}
    assert values["linear.weight"].float().std().item() == pytest.approx(0.02, rel=0.05)
    assert values["linear.weight"].float().mean().abs().item() < 1e-3
    assert values["norm.weight"].eq(1).all()
    assert values["norm.bias"].eq(0).all()
    assert values["linear.bias"].eq(0).all()


def test_values_follow_from_seed_and_name_alone() -> None:
    whole, part, other = model("linear", "embedding"), model("embedding"), model("embedding")
    for each, seed in ((whole, 1), (part, 1), (other, 2)):
        fill_dummy_parameters(each, torch.float32, torch.device("cpu"), seed=seed)
    first, second, third = (dict(each.named_parameters())["embedding.weight"] for each in (whole, part, other))
    assert torch.equal(first, second)
    assert not torch.equal(second, third)


def test_parameters_that_have_values_keep_them() -> None:
    filled = nn.Linear(3, 3)
    before = filled.weight.detach().clone()
    fill_dummy_parameters(filled, torch.float32, torch.device("cpu"), seed=0)
    assert torch.equal(filled.weight, before)
