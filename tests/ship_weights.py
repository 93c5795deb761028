"Puts the network of a run into the package, in half precision: python tests/ship_weights.py checkpoints/resnet20"
import sys
from pathlib import Path

from resnet_cifar.files import read_json
from resnet_cifar.weights import load_model, save_weights

run = Path(sys.argv[1])
name = read_json(run/'config.json')['model_name']
path = Path(__file__).parent.parent/'resnet_cifar'/'weights'/f'{name.lower()}.safetensors'
path.parent.mkdir(exist_ok=True)
save_weights(load_model(run).half(), path)
print(f'{path.name}: {path.stat().st_size:,} bytes')
