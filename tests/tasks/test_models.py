"""Architectures: sizes, shapes, names."""

import pytest
import torch
from torch import nn

from lit_compress.tasks.models import MODELS, build_model, digits_cnn, mobilenet_v1


def _num_params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "kwargs", "expected"),
    [
        # He et al. 2016, table 6: 0.27, 0.46 and 0.85 million.
        ("resnet20", {}, 269_722),
        ("resnet32", {}, 464_154),
        ("resnet56", {}, 853_018),
        ("plain20", {}, 269_722),
        # He et al. 2016, table 1: torchvision's 11,181,642 with 10 classes, less 49 * 3 * 64 of its
        # stem, more 9 * 3 * 64 of ours.
        ("resnet18_cifar", {}, 11_173_962),
        ("mobilenet_v1", {"width": 0.5}, 823_722),
        # Simonyan and Zisserman's thirteen convolutions, 14,714,688, and 5,130 of the classifier.
        ("vgg16", {}, 14_719_818),
        ("vgg16_bn", {}, 14_714_688 + 2 * 4_224 - 4_224 + 5_130),
    ],
)
def test_number_of_parameters(name, kwargs, expected):
    assert _num_params(build_model(name, 10, **kwargs)) == expected


def test_mobilenet_of_the_paper_has_4_2_million_parameters():
    # Howard et al. 2017, table 8.
    assert _num_params(mobilenet_v1(1000, input_size=224)) == pytest.approx(4.2e6, rel=0.01)


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"digits_cnn"}))
def test_every_model_gives_logits_and_gradients_at_32_pixels(name):
    model = build_model(name, num_classes=7)
    logits = model(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 7)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_digits_cnn_takes_grey_8_pixel_images():
    assert digits_cnn()(torch.randn(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize(("input_size", "last"), [(32, 4), (224, 7)])
def test_mobilenet_layouts_end_at_the_right_resolution(input_size, last):
    model = mobilenet_v1(5, width=0.25, input_size=input_size).eval()
    images = torch.randn(1, 3, input_size, input_size)
    assert model.features(images).shape[-2:] == (last, last)
    assert model(images).shape == (1, 5)


def test_option_a_shortcut_subsamples_and_pads_channels_on_both_sides():
    block = build_model("resnet20").layer2[0].eval()
    nn.init.zeros_(block.bn2.weight)  # only the shortcut is left
    images = torch.rand(1, 16, 4, 4)
    outputs = block(images)
    torch.testing.assert_close(outputs[:, 8:24], images[:, :, ::2, ::2])
    assert outputs[:, :8].count_nonzero() == 0
    assert outputs[:, 24:].count_nonzero() == 0


def test_option_b_shortcut_is_a_convolution_where_the_shape_changes():
    model = build_model("resnet18_cifar").eval()
    assert isinstance(model.layer2[0].shortcut[0], nn.Conv2d)
    assert model.layer1[0].shortcut is None
    assert model.layer2[1].shortcut is None
    block = model.layer2[0]
    nn.init.zeros_(block.bn2.weight)  # only the shortcut is left
    images = torch.rand(1, 64, 4, 4)
    torch.testing.assert_close(block(images), block.shortcut(images).relu())


@pytest.mark.parametrize(
    "name", ["resnet20", "resnet18_cifar", "digits_cnn", "vgg16_bn", "mobilenet_v1"]
)
def test_no_module_is_used_twice_in_one_forward(name):
    calls: dict[str, int] = {}
    model = build_model(name).eval()
    for path, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(
                lambda *_, path=path: calls.__setitem__(path, calls.get(path, 0) + 1)
            )
    model(torch.randn(1, 1, 8, 8) if name == "digits_cnn" else torch.randn(1, 3, 32, 32))
    assert calls
    assert set(calls.values()) == {1}


def test_torchvision_models_by_name():
    model = build_model("squeezenet1_1", num_classes=3)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 3)


def test_unknown_name_is_answered_with_near_ones():
    with pytest.raises(ValueError, match=r"'resnet21'.*did you mean .*resnet20"):
        build_model("resnet21")


def test_name_near_to_nothing_is_answered_with_ours():
    with pytest.raises(ValueError, match="ours are digits_cnn, mobilenet_v1"):
        build_model("@@@@")


def test_refused_argument_names_model_and_argument():
    with pytest.raises(ValueError, match=r"'resnet20' was given .*'depth'"):
        build_model("resnet20", depth=3)


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: build_model("resnet20", num_classes=0), "num_classes came as 0"),
        (lambda: mobilenet_v1(width=0), "width came as 0"),
        (lambda: mobilenet_v1(input_size=64), "input_size came as 64.*32 and 224"),
        (lambda: digits_cnn(width=0), "width came as 0"),
    ],
)
def test_values_out_of_range_are_refused(build, match):
    with pytest.raises(ValueError, match=match):
        build()
