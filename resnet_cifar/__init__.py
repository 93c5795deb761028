"Residual networks on CIFAR-10, step by step."
__version__ = "0.1.0"
