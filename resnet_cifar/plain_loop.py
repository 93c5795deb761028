"The loop that most people write, by hand, to compare with: torchvision's ResNet with the stem for CIFAR, PIL transforms, 32-bit numbers."
import torch
import torchvision
from PIL import Image
from torch import nn
from torchvision.transforms import Compose, Normalize, RandomCrop, RandomHorizontalFlip, ToTensor


class Pictures(torch.utils.data.Dataset):
    "As torchvision's CIFAR10: one picture at a time."
    transform = Compose([RandomCrop(32, padding=4), RandomHorizontalFlip(), ToTensor(), Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))])
    def __init__(self, data, targets): self.data, self.targets = data, targets # uint8 array (N, 32, 32, 3), list of int
    def __len__(self): return len(self.data)
    def __getitem__(self, i): return self.transform(Image.fromarray(self.data[i])), self.targets[i]


def make_model(name):
    model = getattr(torchvision.models, name)(num_classes=10)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return model


def train_epoch(model, loader, optimizer, device):
    model.train()
    total_loss = correct = total = 0
    for images, targets in loader:
        images, targets = images.to(device), targets.to(device)
        optimizer.zero_grad()
        logits = model(images)
        loss = nn.functional.cross_entropy(logits, targets)
        loss.backward()
        optimizer.step()
        total_loss += loss.item()*len(targets)
        correct += (logits.argmax(1)==targets).sum().item()
        total += len(targets)
    return total_loss/total, correct/total
