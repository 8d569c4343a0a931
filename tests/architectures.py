"""Published architectures, small: those of Transformers, as they are, with random numbers."""

import torch
import transformers as t


def _images():
    return (torch.randn(2, 3, 64, 64),)


def _resnet():
    config = t.ResNetConfig(depths=[1, 2], hidden_sizes=[16, 32], embedding_size=8, num_labels=5)
    return t.ResNetForImageClassification(config), _images()


def _regnet():
    sizes = [8, 16, 16, 24]
    config = t.RegNetConfig(
        depths=[1, 1, 1, 1], hidden_sizes=sizes, embedding_size=8, groups_width=4
    )
    return t.RegNetForImageClassification(config), _images()


def _mobilenet_v1():
    config = t.MobileNetV1Config(depth_multiplier=0.25, image_size=64)
    return t.MobileNetV1ForImageClassification(config), _images()


def _mobilenet_v2():
    config = t.MobileNetV2Config(depth_multiplier=0.25, image_size=64)
    return t.MobileNetV2ForImageClassification(config), _images()


def _efficientnet():
    config = t.EfficientNetConfig(
        width_coefficient=0.25, depth_coefficient=0.3, image_size=64, hidden_dim=320
    )
    return t.EfficientNetForImageClassification(config), _images()


def _mobilevit():
    config = t.MobileViTConfig(
        hidden_sizes=[16, 24, 32],
        neck_hidden_sizes=[8, 8, 16, 16, 24, 32, 64],
        image_size=64,
        num_attention_heads=2,
    )
    return t.MobileViTForImageClassification(config), _images()


def _levit():
    config = t.LevitConfig(
        image_size=64,
        hidden_sizes=[16, 24, 32],
        num_attention_heads=[1, 2, 2],
        depths=[1, 1, 1],
        key_dim=[8, 8, 8],
    )
    return t.LevitForImageClassification(config), _images()


def _segformer():
    config = t.SegformerConfig(
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=16,
    )
    return t.SegformerForSemanticSegmentation(config), _images()


def _swiftformer():
    config = t.SwiftFormerConfig(image_size=64, depths=[1, 1, 1, 1], embed_dims=[8, 16, 16, 24])
    return t.SwiftFormerForImageClassification(config), _images()


def _detr():
    backbone = t.ResNetConfig(
        depths=[1, 1], hidden_sizes=[16, 32], embedding_size=8, out_features=["stage2"]
    )
    config = t.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=5,
    )
    return t.DetrForObjectDetection(config), _images()


def _rt_detr():
    backbone = t.RTDetrResNetConfig(
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 16, 16, 24],
        embedding_size=8,
        out_features=["stage2", "stage3", "stage4"],
    )
    config = t.RTDetrConfig(
        backbone_config=backbone,
        encoder_hidden_dim=16,
        encoder_in_channels=[16, 16, 24],
        feat_strides=[8, 16, 32],
        d_model=16,
        encoder_layers=1,
        encoder_ffn_dim=16,
        encoder_attention_heads=2,
        decoder_in_channels=[16, 16, 16],
        decoder_layers=1,
        decoder_ffn_dim=16,
        decoder_attention_heads=2,
        num_queries=5,
        num_denoising=0,
    )
    return t.RTDetrForObjectDetection(config), _images()


def _wav2vec2_conformer():
    config = t.Wav2Vec2ConformerConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(8, 8),
        conv_stride=(5, 4),
        conv_kernel=(10, 8),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        conv_depthwise_kernel_size=7,
    )
    return t.Wav2Vec2ConformerForSequenceClassification(config), (torch.randn(2, 1600),)


def _fastspeech2_conformer():
    config = t.FastSpeech2ConformerConfig(
        hidden_size=16,
        vocab_size=20,
        num_mel_bins=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_num_attention_heads=2,
        decoder_num_attention_heads=2,
        encoder_linear_units=16,
        decoder_linear_units=16,
        speech_decoder_postnet_units=8,
        duration_predictor_channels=8,
        energy_predictor_channels=8,
        pitch_predictor_channels=8,
    )
    return t.FastSpeech2ConformerModel(config), (torch.randint(1, 20, (2, 6)),)


_MAKERS = {
    "resnet": _resnet,
    "regnet": _regnet,
    "mobilenet_v1": _mobilenet_v1,
    "mobilenet_v2": _mobilenet_v2,
    "efficientnet": _efficientnet,
    "mobilevit": _mobilevit,
    "levit": _levit,
    "segformer": _segformer,
    "swiftformer": _swiftformer,
    "detr": _detr,
    "rt_detr": _rt_detr,
    "wav2vec2_conformer": _wav2vec2_conformer,
    "fastspeech2_conformer": _fastspeech2_conformer,
}

ARCHITECTURES = tuple(_MAKERS)


def make_architecture(name):
    """Return a model in evaluation, and the arguments of a call.

    Its batch norms, also those that are frozen and of no class of torch, have the statistics and
    the affine part of a network that was trained: none of them is the identity.
    """
    torch.manual_seed(0)
    model, example = _MAKERS[name]()
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "running_var", None) is None:
                continue
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2)
            if module.weight is not None:
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.3)
    return model.eval(), example
