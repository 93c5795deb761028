"""Residual networks on CIFAR-10, step by step.

    from resnet_cifar.models import create_model
    model = create_model('resnet20', weights='DEFAULT')

The meaning of each parameter stands behind it in the source: `create_model??` in Jupyter
shows it, as do the API pages of `make docs`.
"""
__version__ = "0.1.0"
