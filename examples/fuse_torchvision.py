"""Fuses a torchvision model and trains it for one step."""

import torch
import torchvision

import resnet_fused

model = torchvision.models.resnet18(num_classes=10)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

resnet_fused.fuse(model)
print(resnet_fused.fusion_report(model))

images, labels = torch.randn(8, 3, 64, 64), torch.randint(10, (8,))
loss = torch.nn.functional.cross_entropy(model(images), labels)
loss.backward()
optimizer.step()
print(f"loss {loss.item():.3f}")
