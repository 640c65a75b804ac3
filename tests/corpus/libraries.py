"""Classification networks of torchvision and timm, the smallest of each family, for 10 classes.

Each takes images of 32 pixels, or of 64 where 32 are too few. Nothing is downloaded: the weights
are drawn.
"""

from functools import partial
from typing import Any

import timm
from torchvision import models

# Without what asks for other things than images of any size: inception_v3 needs 75 pixels.
TORCHVISION: dict[str, tuple[Any, int]] = {
    "alexnet": (models.alexnet, 64),
    "convnext_tiny": (models.convnext_tiny, 32),
    "densenet121": (models.densenet121, 32),
    "efficientnet_b0": (models.efficientnet_b0, 32),
    "efficientnet_v2_s": (models.efficientnet_v2_s, 32),
    "googlenet": (partial(models.googlenet, aux_logits=False, init_weights=True), 32),
    "mnasnet0_5": (models.mnasnet0_5, 32),
    "mobilenet_v2": (models.mobilenet_v2, 32),
    "mobilenet_v3_small": (models.mobilenet_v3_small, 32),
    "regnet_x_400mf": (models.regnet_x_400mf, 32),
    "regnet_y_400mf": (models.regnet_y_400mf, 32),
    "resnet18": (models.resnet18, 32),
    "resnext50_32x4d": (models.resnext50_32x4d, 32),
    "shufflenet_v2_x0_5": (models.shufflenet_v2_x0_5, 32),
    "squeezenet1_1": (models.squeezenet1_1, 32),
    "swin_t": (models.swin_t, 32),
    "swin_v2_t": (models.swin_v2_t, 32),
    "vgg11_bn": (models.vgg11_bn, 32),
    "vit_b_16": (partial(models.vit_b_16, image_size=32), 32),
}

TIMM: dict[str, dict[str, Any]] = {
    "convnext_atto": {},
    "convnextv2_atto": {},
    "deit_tiny_patch16_224": {"img_size": 32, "patch_size": 4},
    "densenet121": {},
    "edgenext_xx_small": {},
    "efficientnet_lite0": {},
    "ghostnet_050": {},
    "lcnet_050": {},
    "mixer_s16_224": {"img_size": 32},
    "mobilenetv3_small_050": {},
    "mobilevit_xxs": {},
    "nf_resnet26": {},
    "poolformer_s12": {},
    "regnetx_002": {},
    "repvgg_a0": {},
    "resnet10t": {},
    "resnetv2_50": {},
    "seresnet18": {},
    "swin_tiny_patch4_window7_224": {"img_size": 32, "window_size": 4},
    "tinynet_e": {},
    "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 4},
    "xcit_nano_12_p8_224": {},
}


def of_torchvision(name: str) -> Any:
    return TORCHVISION[name][0](num_classes=10)


def of_timm(name: str) -> Any:
    return timm.create_model(name, num_classes=10, **TIMM[name])
