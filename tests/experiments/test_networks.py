"""What is measured: known networks, real patches, the asked precision."""

from __future__ import annotations

import pytest
import torch

from pcamlib.data.patches import open_split
from pcamlib.errors import ConfigError
from pcamlib.experiments import networks, roofline


def test_the_large_one_is_much_larger(synthetic_dir):
    patches = open_split(synthetic_dir, "train")
    models = {name: networks.network(name, patches) for name in networks.MODELS}
    work = {name: roofline.flops(model, networks.batch(patches, 1)) for name, model in models.items()}
    weights = {name: sum(one.numel() for one in model.parameters()) for name, model in models.items()}
    assert work == {"small": 56_033_792, "large": 875_300_864} and weights["large"] > 15 * weights["small"]
    assert not any(model.training for model in models.values())


def test_a_batch_is_of_patches_and_may_be_larger_than_the_split(synthetic_dir):
    patches = open_split(synthetic_dir, "valid")
    images = networks.batch(patches, 300)
    assert images.shape == (300, *roofline.PATCH) and images.dtype == torch.uint8
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert (images[256:].permute(0, 2, 3, 1).numpy() == patches.images[:44]).all()


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_precision_is_that_of_the_arithmetic(synthetic_dir, precision, dtype):
    patches = open_split(synthetic_dir, "valid")
    model, seen = networks.network("small", patches), []
    model.network.stages[1].conv1.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    logits = networks.forward(model, precision)(networks.batch(patches, 2))
    assert seen == [dtype] and logits.dtype == torch.float32 and not logits.requires_grad


def test_an_unknown_name_names_the_nearest():
    with pytest.raises(ConfigError, match="unknown model 'larg'; did you mean 'large'"):
        networks.settings("larg")
