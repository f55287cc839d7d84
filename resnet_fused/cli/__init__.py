"""The commands of ``python -m resnet_fused``, and what only they need."""
