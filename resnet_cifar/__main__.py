"`python -m resnet_cifar` is the command `resnet-cifar`."
import sys

from resnet_cifar.cli import main

if __name__ == '__main__':
    sys.exit(main())
