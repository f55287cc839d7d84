"""Made-up inputs: their form, and that the model takes them."""

import pytest
import torch
from torch import nn

from resnet_fused.cli.model_names import build
from resnet_fused.example_inputs import example_input


def test_shape_dtype_and_device_are_those_of_the_model():
    model = nn.Sequential(nn.BatchNorm2d(5), nn.Conv2d(5, 4, 1)).double()
    images = example_input(model, size=8, batch=3)
    assert images.shape == (3, 5, 8, 8)
    assert images.dtype == torch.float64
    assert example_input(model.to("meta")).is_meta


def test_volumes_have_three_dimensions():
    assert example_input(nn.Conv3d(2, 4, 3), size=8).shape == (2, 2, 8, 8, 8)
    assert example_input(nn.Conv1d(2, 4, 3), size=8).shape == (2, 2, 8)


def test_size_is_what_the_model_states():
    model = nn.Conv2d(3, 4, 3)
    assert example_input(model).shape[-1] == 224
    model.pretrained_cfg = {"input_size": (3, 299, 299)}
    assert example_input(model).shape[-1] == 299


def test_timm_model_that_folds_its_images():
    pytest.importorskip("timm")
    model = build("timm:tresnet_m", initialized=True)
    images = example_input(model, size=64)
    assert images.shape == (2, 3, 64, 64)
    assert model(images).shape == (2, 1000)


def test_transformers_takes_keywords():
    pytest.importorskip("transformers")
    model = build("transformers:ResNetModel", {"depths": [1, 1], "hidden_sizes": [8, 8]}, initialized=True)
    inputs = example_input(model, size=32)
    assert list(inputs) == ["pixel_values"]
    assert model(**inputs).last_hidden_state.shape[:2] == (2, 8)


@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn"])
def test_detection_takes_lists_and_targets(name):
    pytest.importorskip("torchvision")
    arguments = {"min_size": 64, "max_size": 64, "num_classes": 2, "rpn_post_nms_top_n_test": 10}
    model = build(name, arguments, initialized=True).eval()
    (images,) = example_input(model, size=64)
    assert [image.shape for image in images] == [(3, 64, 64)] * 2
    assert len(model(images)) == 2
    images, targets = example_input(model.train(), size=64)
    losses = model(images, targets)
    assert all(torch.isfinite(loss) for loss in losses.values())
