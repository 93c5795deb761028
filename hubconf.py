"Entry points of `torch.hub`, one for each network: torch.hub.load('.', 'resnet18', source='local', num_classes=10, weights=None)."
from resnet_cifar import models

dependencies = ['torch', 'safetensors']
globals().update({name: getattr(models, name) for name in models.list_models()})
