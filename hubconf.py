"Entry points of `torch.hub`: torch.hub.load('.', 'resnet18', source='local', num_classes=10, weights=None)."
from resnet_cifar.models import (  # noqa: F401
    plain18, plain20, plain32, plain34, plain44, plain50, plain56, plain101, plain110, plain152,
    resnet8, resnet18, resnet20, resnet32, resnet34, resnet44, resnet50, resnet56, resnet101, resnet110, resnet152,
)

dependencies = ['torch', 'safetensors']
