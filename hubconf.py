"Entry points of `torch.hub`: torch.hub.load('.', 'resnet18', source='local', num_classes=10)."
import functools

from resnet_cifar import models

dependencies = ['torch', 'safetensors']
for name in models.list_models():
    globals()[name] = getattr(models, name, functools.partial(models.create_model, name))
