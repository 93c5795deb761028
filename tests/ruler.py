"""The ruler: numbers that a refactoring of the whole package must not change.

`python tests/ruler.py` measures and compares with tests/ruler.json; `--write` keeps the numbers.
The last bits depend on the processor, so there is a set for each kind of machine: where it is
stored all numbers must be equal, elsewhere those that no processor changes, and accuracies within
five points. Only what users have is used: commands, their files, networks by name, the sample.
"""
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from resnet_cifar.data import sample_cifar10
from resnet_cifar.models import create_model, list_models
from sample_data import write_sample_data

FILE = Path(__file__).with_name('ruler.json')
ENVIRONMENT = os.environ | {'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
COMMON = ('--root data --skip_checksum --device cpu --num_epochs 3 --batch_size 50 '
          '--limit_train 400 --limit_test 300 --valid_size 300')
ADAMW = ('--model_name ResNet18 --width 8 --optimizer AdamW --lr 0.01 --transform '
         '--lr_scheduler CosineAnnealingLR --t_max 2 --precision fp32 --num_workers')
SGD = ('--model_name resnet20 --width 8 --optimizer SGD --lr 0.05 --lr_scheduler OneCycleLR '
       '--ema_decay 0.9 --label_smoothing 0.1 --precision fp32 --num_workers 0')
MUON = ('--model_name resnet10 --width 8 --optimizer Muon --lr 0.1 --lr_scheduler OneCycleLR '
        '--whiten --transform --alternating_flips --image_sizes 16 24 32 --num_workers 0')
TWO = 'torch.distributed.run --standalone --nproc_per_node 2 -m'
RUNS = {  # name -> the words behind `python -m`
    'sgd': f'resnet_cifar train {SGD}',
    'sgd, interrupted': f'resnet_cifar train {SGD}',
    'adamw': f'resnet_cifar train {ADAMW} 0',
    'adamw, two workers': f'resnet_cifar.trainer {ADAMW} 2',
    'adamw by two processes': f'{TWO} resnet_cifar.trainer {ADAMW} 0',
    'muon': f'resnet_cifar train {MUON} --precision fp32',
    'muon in bf16': f'resnet_cifar train {MUON} --precision bf16'}

def machine():
    """What the bits depend on: PyTorch, the threads, and what the processor can do."""
    known, kernels = torch.cpu.get_capabilities(), torch.backends.cpu.get_cpu_capability()
    able = sorted(k if v is True else f'{k}={v}' for k, v in known.items() if v)
    return ' '.join([f'torch={torch.__version__} threads=1 kernels={kernels}', *able])

def call(words, folder, stop=None):
    """What `python -m` prints; with `stop`, a run is ended a second after this file is there."""
    process = subprocess.Popen([sys.executable, '-m', *words], cwd=folder, env=ENVIRONMENT,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while stop and process.poll() is None and not stop.exists():
        time.sleep(0.02)
    if stop:
        time.sleep(1)
        process.terminate()
    said = process.communicate()[0]
    if process.returncode != (143 if stop else 0):
        raise RuntimeError(f'{" ".join(words)}: exit code {process.returncode}\n{said}')
    return said

def rounded(text, form):
    """JSON with its fractions as text of this form."""
    return json.loads(text, parse_float=lambda number: format(float(number), form))

def train(name, folder):
    """History and result of one run."""
    run = folder / name.replace(' ', '_')
    words = [*RUNS[name].split(), *COMMON.split(), '--ckpt_dir', run.name]
    if name.endswith('interrupted'):
        call(words, folder, run / 'last.ckpt')
        words += ['--resume', 'auto']
    call(words, folder)
    rows = np.genfromtxt(run / 'history.csv', delimiter=',', names=True)
    result = rounded((run / 'result.json').read_text(), '.10g')
    found = {c: ' '.join(f'{x:.10g}' for x in rows[c]) for c in rows.dtype.names if c != 'seconds'}
    return found | {key: result[key] for key in ('state_digest', 'test_accuracy', 'test_loss')}

def pretrained(folder):
    """What the weights in the package say of 500 pictures, and of ten that are files."""
    words = 'evaluate --ckpt DEFAULT --root data --skip_checksum --limit_test 500 --report report'
    call(['resnet_cifar', *words.split(), '--precision', 'fp32'], folder)
    metrics = rounded((folder / 'report' / 'metrics.json').read_text(), '.6g')
    found = {k: str(metrics[k]) for k in metrics if k not in ('about', 'versions', 'mirror_accuracy', 'tta_accuracy')}
    names = [f'{number}.png' for number in range(10)]
    for name, image in zip(names, sample_cifar10().test_images.permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image).save(folder / name)
    said = call(['resnet_cifar', 'predict', *names, '--json', '--precision', 'fp32'], folder)
    answers = [rounded(line, '.5f') for line in said.splitlines()]
    return found | {a['file']: f'{a["class"]} {a["probabilities"]}' for a in answers}

def networks():
    """A checksum of each network's first weights, and its logits for two pictures."""
    torch.set_num_threads(1)
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465, 0.2470, 0.2435, 0.2616]).view(2, 3, 1, 1)
    images, found = (sample_cifar10().test_images[:2].float() / 255 - mean) / std, {}
    for name in list_models():
        torch.manual_seed(0)
        model, digest = create_model(name, num_classes=10).eval(), hashlib.sha256()
        for key, x in model.state_dict().items():
            digest.update(f'{key} {x.dtype} {tuple(x.shape)} '.encode() + x.numpy().tobytes())
        with torch.no_grad():
            logits = ' '.join(f'{x:.6g}' for x in model(images).flatten().tolist())
        found[f'networks/{name}'] = {'weights': digest.hexdigest(), 'logits': logits}
    return found

def measure():
    """All numbers, path -> text; two programs run at a time."""
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(2) as pool:
        write_sample_data((folder := Path(name)) / 'data')
        jobs = {'pretrained': pool.submit(pretrained, folder)}
        jobs |= {f'runs/{run}': pool.submit(train, run, folder) for run in RUNS}
        found = networks() | {job: future.result() for job, future in jobs.items()}
    assert found['runs/sgd, interrupted'] == found['runs/sgd'], found
    assert found['runs/adamw, two workers'] == found['runs/adamw'], found
    return {f'{part}/{key}': text for part in found for key, text in found[part].items()}

def differences(stored, here, numbers):
    """A line for each number that is not what it was, as far as this machine can tell."""
    before, found = stored[here if here in stored else min(stored)], []
    for path in dict.fromkeys([*before, *numbers]):
        both = old, new = before.get(path, 'missing'), numbers.get(path, 'missing')
        same, strict = old == new, here in stored or 'missing' in both
        if not strict and path.endswith('accuracy'):
            same = np.allclose(*(np.array(t.split(), float) for t in both), rtol=0, atol=0.05)
        if not same and (strict or path.endswith(('accuracy', 'epoch', 'lr', 'num_images'))):
            found.append(f'{path}\n    was {old}\n    is  {new}')
    return found

def main():
    """Compare, or with --write keep; the exit code is 1 where something differs."""
    begun, here, numbers = time.monotonic(), machine(), measure()
    stored = json.loads(FILE.read_text()) if FILE.exists() else {}
    if '--write' in sys.argv:
        FILE.write_text(json.dumps(stored := stored | {here: numbers}, indent=1) + '\n')
    wrong = differences(stored, here, numbers)
    print(here if here in stored else f'no numbers are stored for {here}')
    for part in dict.fromkeys(path.partition('/')[0] for path in numbers):
        count, off = (sum(p.startswith(f'{part}/') for p in paths) for paths in (numbers, wrong))
        print(f'{part:10}{count:4} numbers, {off} differ')
    print(f'measured in {time.monotonic() - begun:.0f} s', *wrong, sep='\n')
    return int(bool(wrong))

if __name__ == '__main__':
    sys.exit(main())
