"""The models of tools/model_table.py, as data: what each is called, and what it is built and run with."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Model:
    """A model and its example.

    Attributes:
        name: as in ``resnet_fused.cli.model_names.build``.
        arguments: further arguments of its builder.
        size: side of the images; the smallest that leaves no BatchNorm a single value in training.
        batch: how many images.
        quick: whether ``--quick`` has it.
    """

    name: str
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    size: int = 64
    batch: int = 2
    quick: bool = False

    @property
    def title(self) -> str:
        """The name and the arguments that change the network."""
        shown = ", ".join(f"{key}={value}" for key, value in self.arguments.items() if key not in _UNTOLD)
        return f"{self.name} ({shown})" if shown else self.name


# These make an example small or certain, and change no module of the network.
_UNTOLD = {
    *("weights", "init_weights", "mlp_ratio", "min_size", "max_size", "num_classes", "num_queries", "topk_candidates"),
    *("box_score_thresh", "score_thresh", "box_detections_per_img", "detections_per_img"),
    *("rpn_post_nms_top_n_train", "rpn_post_nms_top_n_test"),
}
_FPN_BACKBONE = "torchvision.models.detection.backbone_utils:resnet_fpn_backbone"
_NARROW_HEAD = {"mlp_ratio": 0.1}
_SMALL = {"min_size": 128, "max_size": 128, "num_classes": 5}
# Untrained networks are sure of nothing, and what is below a threshold has no output to compare.
_TWO_STAGE = {
    **_SMALL,
    "box_score_thresh": 0.0,
    "box_detections_per_img": 10,
    "rpn_post_nms_top_n_train": 50,
    "rpn_post_nms_top_n_test": 50,
}
_KEYPOINTS = {**_TWO_STAGE, "num_classes": 2}
_ONE_STAGE = {**_SMALL, "score_thresh": 0.0, "detections_per_img": 10, "topk_candidates": 50}
_RT_DETR_18 = {"layer_type": "basic", "depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512]}
_ONE_LAYER = {"encoder_layers": 1, "decoder_layers": 1}

TORCHVISION = (
    Model("resnet18", quick=True),
    Model("resnet34"),
    Model("resnet50"),
    Model("resnet152"),
    Model("resnext50_32x4d"),
    Model("resnext101_32x8d"),
    Model("wide_resnet50_2"),
    Model("vgg11_bn", {"init_weights": False}),
    Model("googlenet", {"init_weights": False}),
    Model("inception_v3", {"init_weights": False}, size=299),
    Model("regnet_x_400mf"),
    Model("regnet_y_400mf", quick=True),
    Model("densenet121"),
    Model("mobilenet_v2"),
    Model("mobilenet_v3_small"),
    Model("mnasnet0_5"),
    Model("shufflenet_v2_x0_5"),
    Model("efficientnet_b0"),
    Model("deeplabv3_resnet50"),
    Model("fcn_resnet50", {"aux_loss": True}),
    Model("lraspp_mobilenet_v3_large"),
    Model("fasterrcnn_resnet50_fpn", _TWO_STAGE, size=128),
    Model("fasterrcnn_resnet50_fpn_v2", _TWO_STAGE, size=128),
    Model("maskrcnn_resnet50_fpn", _TWO_STAGE, size=128),
    Model("keypointrcnn_resnet50_fpn", _KEYPOINTS, size=128),
    Model("retinanet_resnet50_fpn", _ONE_STAGE, size=128),
    Model("fcos_resnet50_fpn", _ONE_STAGE, size=128),
    # With FrozenBatchNorm2d, which detection models have where their weights are pretrained ones.
    Model(_FPN_BACKBONE, {"backbone_name": "resnet18", "weights": None}, quick=True),
    Model(_FPN_BACKBONE, {"backbone_name": "resnet50", "weights": None}),
    Model("quantized_resnet18", quick=True),
    Model("quantized_resnet50"),
    Model("r3d_18", size=32),
    Model("r2plus1d_18", size=32),
)

TIMM = (
    Model("timm:resnet18", quick=True),
    Model("timm:resnet50"),
    Model("timm:resnet26d"),
    Model("timm:resnet26t"),
    Model("timm:resnet50d"),
    Model("timm:resnet50s"),
    Model("timm:resnet101c"),
    Model("timm:resnet10t", {"drop_path_rate": 0.2, "drop_block_rate": 0.2}, quick=True),
    Model("timm:resnet18d", {"act_layer": "silu"}),
    Model("timm:resnet50", {"output_stride": 8}),
    Model("timm:resnet18", {"features_only": True}),
    Model("timm:resnet33ts"),
    Model("timm:resnet51q"),
    Model("timm:resnetrs50"),
    Model("timm:wide_resnet50_2"),
    Model("timm:resnext50_32x4d"),
    Model("timm:resnext101_64x4d"),
    Model("timm:seresnet18", quick=True),
    Model("timm:seresnet50"),
    Model("timm:seresnext26d_32x4d"),
    Model("timm:legacy_seresnet18"),
    Model("timm:legacy_seresnext26_32x4d"),
    Model("timm:ecaresnet26t"),
    Model("timm:ecaresnet50d"),
    Model("timm:ecaresnetlight"),
    Model("timm:resnetblur18"),
    Model("timm:resnetblur50"),
    Model("timm:resnetaa50"),
    Model("timm:seresnetaa50d"),
    Model("timm:resnetv2_18"),
    Model("timm:resnetv2_50", quick=True),
    Model("timm:resnetv2_50d"),
    Model("timm:resnetv2_50d_gn"),
    Model("timm:resnetv2_50x1_bit"),
    Model("timm:regnetx_002", quick=True),
    Model("timm:regnety_002"),
    Model("timm:regnetz_005"),
    Model("timm:res2net50_26w_4s"),
    Model("timm:res2net50d"),
    Model("timm:res2next50"),
    Model("timm:dla34"),
    Model("timm:dla60"),
    Model("timm:dla60_res2net"),
    Model("timm:hrnet_w18_small"),
    Model("timm:skresnet18"),
    # Their BatchNorms see single positions: two values a channel would be plus and minus one, whatever they were.
    Model("timm:skresnext50_32x4d", batch=8),
    Model("timm:selecsls42b", batch=8),
    Model("timm:resnest14d"),
    Model("timm:resnest50d_1s4x24d", batch=8),
    Model("timm:cspresnet50"),
    Model("timm:cspdarknet53"),
    Model("timm:tresnet_m"),
    Model("timm:vovnet39a"),
    Model("timm:ese_vovnet19b_slim"),
    Model("timm:dpn68"),
    Model("timm:inception_v3", size=128),
    Model("timm:inception_v4", size=128),
    Model("timm:inception_resnet_v2", size=128),
    Model("timm:legacy_xception"),
    Model("timm:xception41"),
    Model("timm:repvgg_a0"),
    Model("timm:densenet121"),
    Model("timm:vgg11_bn", _NARROW_HEAD),
    Model("timm:vgg16_bn", _NARROW_HEAD),
    Model("timm:mobilenetv2_100"),
    Model("timm:efficientnet_b0"),
    Model("timm:rexnet_100"),
    Model("timm:resnet50_clip_gap"),
    Model("timm:resnet50_gn"),
)

TRANSFORMERS = (
    Model("transformers:ResNetModel", {"layer_type": "basic", "depths": [2, 2, 2, 2]}, quick=True),
    Model("transformers:ResNetForImageClassification"),
    Model("transformers:ResNetForImageClassification", {"downsample_in_bottleneck": True, "depths": [2, 2, 2, 2]}),
    Model("transformers:ResNetBackbone", {"out_features": ["stage2", "stage4"], "depths": [2, 2, 2, 2]}),
    Model("transformers:RegNetModel", {"depths": [1, 1, 2, 1], "hidden_sizes": [32, 64, 128, 256], "groups_width": 16}),
    Model("transformers:RegNetForImageClassification", {"layer_type": "x", "depths": [1, 1, 2, 1]}),
    Model("transformers:RTDetrResNetBackbone"),
    Model("transformers:RTDetrResNetBackbone", _RT_DETR_18),
    Model("transformers:DetrForObjectDetection", _ONE_LAYER),
    Model("transformers:TableTransformerForObjectDetection", _ONE_LAYER),
    Model("transformers:RTDetrForObjectDetection", {**_ONE_LAYER, "num_queries": 20}, size=128),
    Model("transformers:MobileNetV2Model"),
    Model("transformers:BitModel", {"depths": [1, 1, 1, 1]}),
)

SMP = (
    Model("smp:Unet/resnet18", quick=True),
    Model("smp:Unet/resnet34"),
    Model("smp:Unet/resnet34", {"decoder_attention_type": "scse"}),
    Model("smp:Unet/vgg11_bn"),
    Model("smp:Unet/se_resnet50"),
    Model("smp:UnetPlusPlus/tu-resnet18"),
    Model("smp:FPN/resnext50_32x4d"),
    Model("smp:DeepLabV3/resnet18"),
    Model("smp:DeepLabV3Plus/resnet50"),
    Model("smp:Linknet/resnet18"),
    Model("smp:PSPNet/resnet18"),
    Model("smp:PAN/resnet18", size=128),
    Model("smp:MAnet/resnet18"),
    Model("smp:UPerNet/resnet18"),
)

MONAI = (
    Model("monai:resnet10", quick=True),
    Model("monai:resnet18"),
    Model("monai:resnet50"),
    Model("monai:resnet18", {"spatial_dims": 3, "n_input_channels": 1}, size=32),
    Model("monai:resnet10", {"spatial_dims": 1}),
    Model("monai:SEResNet50"),
    Model("monai:SEResNext50"),
    Model("monai:UNet", {"norm": "BATCH", "act": "RELU", "num_res_units": 2}),
    Model("monai:AttentionUnet"),
    Model("monai:BasicUNet", {"norm": "BATCH", "act": "RELU"}),
    Model("monai:HighResNet"),
    Model("monai:AHNet", size=128),
    Model("monai:VNet"),
    Model("monai:SegResNet"),
    Model("monai:SegResNet", {"norm": "BATCH"}),
    Model("monai:DenseNet121"),
)

PACKAGES = {"torchvision": TORCHVISION, "timm": TIMM, "transformers": TRANSFORMERS, "smp": SMP, "monai": MONAI}
MODELS = tuple(model for models in PACKAGES.values() for model in models)
