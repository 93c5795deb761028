"Puts the network of a recorded run into the package, in half precision: python tests/ship_weights.py checkpoints/resnet20"
import json
import sys
from pathlib import Path

from safetensors.torch import save_file

from resnet_cifar.checkpoint import load_model, facts_of

run = Path(sys.argv[1])
model, config = load_model(run), json.loads((run/'config.json').read_text())
weights = {key: value.half() if value.is_floating_point() else value for key, value in model.state_dict().items()}
path = Path(__file__).parent.parent/'resnet_cifar'/'weights'/f"{config['model_name']}.safetensors"
path.parent.mkdir(exist_ok=True)
save_file(weights, path, metadata=dict(resnet_cifar=json.dumps(facts_of(model))))
print(f'{path.name}: {path.stat().st_size:,} bytes')
