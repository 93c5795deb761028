"""The sample that comes with the package, as a data set of CIFAR-10's shapes: for runs of seconds."""
import numpy as np

from resnet_cifar.data import sample_cifar10


def write_sample_data(folder):
    """The sample, repeated to 50,000 and 10,000 pictures, as cifar10.npz; for --skip_checksum."""
    sample, arrays = sample_cifar10(), {}
    for part, count in (('train', 50_000), ('test', 10_000)):
        images, labels = (getattr(sample, f'{part}_{kind}') for kind in ('images', 'labels'))
        images = images.permute(0, 2, 3, 1).numpy()
        arrays[f'{part}_images'] = np.resize(images, (count, 32, 32, 3))
        arrays[f'{part}_labels'] = np.resize(labels.numpy().astype(np.uint8), count)
    folder.mkdir(exist_ok=True)
    np.savez(folder / 'cifar10.npz', **arrays)
