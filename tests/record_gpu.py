"Records the recipe `best` for all five sizes on this machine's GPU, in pieces: call it again until it says that all is there."
import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from resnet_cifar.config import RECIPES

ROOT = Path(__file__).parent.parent
RUNS = [('resnet18', 0), ('resnet18', 1), ('resnet34', 0), ('resnet50', 0), ('resnet101', 0), ('resnet152', 0)] # network, seed
NETWORKS = list(dict(RUNS))


def stopped_after(words:list, seconds:float)->bool:
    "Run `python -m resnet_cifar …`; when the time is over, ask it to save and stop. Whether it had to."
    process = subprocess.Popen([sys.executable, '-m', 'resnet_cifar', *map(str, words)], cwd=ROOT)
    try: code = process.wait(max(seconds, 0))
    except subprocess.TimeoutExpired: code = None
    finally: # when this program is stopped too
        if process.poll() is None: process.terminate()
        process.wait()
    if code is None and process.returncode in (143, -signal.SIGTERM): return True # the latter before it could listen
    if process.returncode: sys.exit(f'error: ended with {process.returncode}: {" ".join(map(str, words))}')
    return False


def pixels_share(num_epochs:int, sizes:tuple)->float:
    "Pixels of all epochs' images, in epochs of 32x32: what they cost."
    return sum((sizes[min(epoch, len(sizes) - 1)]/32)**2 if sizes else 1 for epoch in range(num_epochs))


def choose_epochs(images_per_second:dict, minutes:float)->int:
    "The largest number of epochs, the same for all networks, with which all runs fit into so many minutes, by the measured speeds."
    epoch = sum(50000/images_per_second[name] for name, _ in RUNS) # seconds at 32x32, one of each run
    fitting = [n for n in range(1, 201) if epoch*pixels_share(n, RECIPES['best'].image_sizes) <= 60*minutes]
    if not fitting: sys.exit(f'error: an epoch of all runs takes {epoch:.0f} s here, more than --minutes {minutes} allow')
    return fitting[-1]


if __name__=='__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--minutes', type=float, default=14., help='of all trainings together, by the speed of SGD\'s steps; Muon\'s take a little longer (default: %(default)s)')
    parser.add_argument('--piece', type=float, default=8.5, help='minutes after which this call stops (default: %(default)s)')
    parser.add_argument('--root', default='data/datasets', help='folder of the data')
    known, more = parser.parse_known_args() # the rest goes to each training
    if '--device' not in more and not torch.cuda.is_available(): sys.exit('error: no CUDA GPU here; --device cpu tries it without')
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    end, runs = time.monotonic() + 60*known.piece, ROOT/'nbs'/'runs'
    for name in NETWORKS:
        path = runs/f'gpu-bench-{name}.json'
        if not path.exists() and stopped_after(['bench', '--model_name', name, '--batch_size', RECIPES['best'].batch_size, '--root', known.root, '--no_compile', '--json', path], end - time.monotonic()):
            sys.exit(f'stopped: {path.name} is not measured yet; the same command goes on')
    epochs = choose_epochs({name: json.loads((runs/f'gpu-bench-{name}.json').read_text())['images_per_second'] for name in NETWORKS}, known.minutes)
    print(f'{epochs} epochs', flush=True)
    for name, seed in RUNS:
        label = f'gpu-{name}-{seed}'
        if (runs/f'{label}.json').exists(): continue
        words = ['train', '--recipe', 'best', '--model_name', name, '--random_seed', seed, '--num_epochs', epochs, '--root', known.root,
                 '--ckpt_dir', f'checkpoints/{label}', '--resume', 'auto', '--record', *more]
        if stopped_after(words, end - time.monotonic()): sys.exit(f'stopped within {label}; the same command goes on')
    print('all runs are recorded in nbs/runs')
